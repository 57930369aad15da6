"""The choice that every query makes among heads."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lineara.ops.precision import accumulation_dtype


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
        check_top_k(top_k, num_heads)
        self.num_heads = num_heads
        self.top_k = top_k
        self.logits = nn.Linear(dim, num_heads, device=device, dtype=dtype)
        self.last: Routing | None = None

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
        self.last = self._routing(probability, choice, chosen, query_mask)
        return (probability * (self.num_heads * chosen)).to(query.dtype)

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}"

    def _routing(self, probability: Tensor, choice: Tensor, chosen: Tensor, query_mask: Tensor | None) -> Routing:
        counted = probability
        if query_mask is not None:  # a product would keep the NaN that a masked query may hold
            hidden = ~query_mask[:, None]  # (B, 1, N)
            chosen, counted = chosen.masked_fill(hidden, 0.0), probability.masked_fill(hidden, 0.0)
        load = chosen.sum(dim=(0, 2))  # (H,)
        load = load / load.sum().clamp_min(1.0)
        mean_probability = counted.sum(dim=(0, 2))  # (H,), up to the number of queries
        mean_probability = mean_probability / mean_probability.detach().sum().clamp_min(1.0)
        load_balancing = self.num_heads * (load * mean_probability).sum()
        return Routing(choice.mT, probability.detach().mT, load, load_balancing)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle is of the weights; the last decision belongs to a graph that cannot be copied.
        return {**self.__dict__, "last": None}


def check_top_k(top_k: int, num_heads: int) -> None:
    """Raise unless a query can use so many heads."""
    if isinstance(top_k, bool) or not isinstance(top_k, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"top_k must be an integer, got {top_k!r}")
    if not 1 <= top_k <= num_heads:
        raise ValueError(f"top_k must be at least 1 and at most num_heads={num_heads}, got {top_k}")
