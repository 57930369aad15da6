"""The choice that every query makes among heads."""

from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from lineara.nn.deferred_term import DeferredTerms, lost
from lineara.ops.checks import check_integer
from lineara.ops.precision import accumulation_dtype
from lineara.ops.tracing import is_exporting, transform_of


class Routing(NamedTuple):
    """What a router decided in one forward call, over the valid queries (of this rank, where positions are sharded).

    `choice` and `probability` hold every query, masked ones too; `load` and `load_balancing` count valid ones only.
    """

    choice: Tensor  # (batch, positions, top_k): the heads of each query, the likeliest first
    probability: Tensor  # (batch, positions, heads), without a gradient
    load: Tensor  # (heads,): the share of all choices that fell on each head, without a gradient
    load_balancing: Tensor  # (): heads * sum of load * mean probability, 1 where both are even; has a gradient


class Router(nn.Module):
    """Probabilities over heads from a query, and a gate that keeps those of the `top_k` likeliest heads.

        p_i = softmax(W q_i + b),   g_ih = H p_ih if head h is among the top_k of query i, else 0

    The factor H makes 1 of the gate of an undecided router, so that attention does not start H times weaker.

    The load balancing term is H sum_h f_h P_h, f_h being the share of choices that fell on head h and P_h the mean
    probability of head h (Fedus et al., "Switch Transformers", arXiv 2101.03961, equation 4).

    Args:
        dim: channels of a query, all heads together.
        num_heads: heads to choose from.
        top_k: heads that a query uses.
        device: of the weights.
        dtype: of the weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        top_k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.top_k = checked_top_k(top_k, num_heads)
        self.logits = nn.Linear(dim, num_heads, device=device, dtype=dtype)
        self._last: Routing | None = None
        self._term: ref[Tensor] | None = None  # with its graph, which the graph of the gate keeps
        self._deferred = DeferredTerms()

    @property
    def last(self) -> Routing | None:
        """What was decided in the last forward call; None before it, and in copies.

        The load balancing term has a gradient while the gate's graph lives: the router keeps none. Differentiated later
        than that it raises an error. Under `torch.utils.checkpoint` with use_reentrant=True it must be differentiated
        once, in the backward pass of the layer's output, which is checked. What was decided inside a transform of
        torch.func can be read inside it alone.
        """
        if self._last is None or self._term is None:
            return self._last
        term = self._term()
        return self._last._replace(load_balancing=lost(self._last.load_balancing) if term is None else term)

    def forward(self, query: Tensor, query_mask: Tensor | None) -> Tensor:
        """The gate (batch, heads, positions), in the dtype of the query, and in `last` what was decided.

        Args:
            query: (batch, positions, dim).
            query_mask: boolean (batch, positions), False = not to be counted in the statistics; None counts all.
        """
        # Heads before positions: over a last axis of so few entries torch's softmax takes many times as long.
        logits = self.logits(query)
        logits = logits.to(accumulation_dtype(logits.dtype)).mT.contiguous()  # (B, H, N)
        probability = logits.softmax(dim=1)  # (B, H, N)
        choice = probability.detach().topk(self.top_k, dim=1).indices  # (B, top_k, N)
        chosen = torch.zeros_like(probability).scatter(1, choice, 1.0)  # (B, H, N)
        gate = (probability * (self.num_heads * chosen)).to(query.dtype)
        if not is_exporting():  # which has no place to put it
            self._remember(gate, probability, choice, chosen, query_mask)
        return gate

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}"

    def _remember(
        self, gate: Tensor, probability: Tensor, choice: Tensor, chosen: Tensor, query_mask: Tensor | None
    ) -> None:
        hidden = None if query_mask is None else ~query_mask[:, None]  # (B, 1, N)
        counted = probability
        if hidden is not None:  # a product would keep the NaN that a masked query may hold
            chosen, counted = chosen.masked_fill(hidden, 0.0), probability.masked_fill(hidden, 0.0)
        load = chosen.sum(dim=(0, 2))  # (H,)
        load = load / load.sum().clamp_min(1.0)
        mean_probability = counted.sum(dim=(0, 2))  # (H,), up to the number of queries
        num_counted = mean_probability.detach().sum().clamp_min(1.0)
        term = self.num_heads * (load * mean_probability / num_counted).sum()
        self._term = None
        # (Elsewhere the term is differentiated by other means, which need it as it is.)
        if not torch.compiler.is_compiling() and transform_of(probability) is None:
            slope = self.num_heads * load / num_counted  # (H,), of the term by a probability
            term = self._deferred.in_place_of(term, probability, slope, hidden)
            if gate.grad_fn is not None and term.requires_grad:
                node: Any = gate.grad_fn
                node.metadata["lineara.nn.router"] = term
                self._term = ref(term)
                term = term.detach()
        self._last = Routing(choice.mT, probability.detach().mT, load, term)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle is of the weights; the last decision belongs to a graph that cannot be copied.
        return {**self.__dict__, "_last": None, "_term": None, "_deferred": DeferredTerms()}


def checked_top_k(top_k: int, num_heads: int) -> int:
    """The number as an int; raise unless a query can use so many heads."""
    top_k = check_integer("top_k", top_k, least=None)
    if not 1 <= top_k <= num_heads:
        raise ValueError(f"top_k must be at least 1 and at most num_heads={num_heads}, got {top_k}")
    return top_k
