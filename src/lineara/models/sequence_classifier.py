"""The encoder that Long Range Arena compares attention mechanisms in."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lineara.nn import EncoderBlock
from lineara.nn.checks import check_attention_maker, check_boolean, made_by, probability
from lineara.nn.initial_values import multiply
from lineara.nn.sequence_attention import ShardedPositions
from lineara.nn.sequence_parallel import shard_positions
from lineara.ops.checks import check_integer
from lineara.ops.precision import accumulation_dtype
from lineara.ops.sequence_parallel import name_of_group, process_group, sum_over_group
from lineara.ops.tracing import is_plain

if TYPE_CHECKING:
    from lineara.ops.sequence_parallel import Group

_STD = 0.02


class SequenceClassifier(nn.Module):
    """Token embedding, learned positions, pre-norm encoder blocks, mean over the valid positions, classifier head.

        x = embedding(tokens) + positions,   x = block(x) for every layer,   logits = head(mean over valid of norm(x))

    The defaults are those of the published PyTorch harness: 2 layers, dim 64, feed-forward 128, dropout
    0.1, head Linear(64, 128)-ReLU-Linear; its 2 heads are for `attention` to have. We differ in one point: the mean
    runs over the valid positions only.

    With `num_sequences` 2 it compares two sequences: both are encoded by the same weights, and the head sees
    [a, b, a * b, a - b] of their means a and b.

    Sequences too long for one process are shared among several by `shard_positions`.

    Args:
        vocab_size: number of token ids; 0 is padding.
        num_classes: number of classes.
        max_len: longest sequence, in tokens.
        attention: makes one attention layer: called once per block as attention(dim). A class, a function, or in a
            recipe a class path with its further arguments.
        dim: channels.
        num_layers: encoder blocks.
        mlp_dim: channels inside the feed-forward part of a block.
        head_dim: channels inside the classifier head.
        dropout: probability, after the embedding and in the blocks.
        num_sequences: sequences per example, 1 or 2.

    Source: Tay et al., "Long Range Arena", ICLR 2021, arXiv 2011.04006; settings as in mlpen/Nystromformer.

    Example:
        >>> model = SequenceClassifier(16, 10, 2000, attention=lambda dim: EfficientAttention(dim, num_heads=2))
        >>> model(torch.randint(1, 16, (4, 1000))).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        max_len: int,
        *,
        attention: Callable[[int], nn.Module],
        dim: int = 64,
        num_layers: int = 2,
        mlp_dim: int = 128,
        head_dim: int = 128,
        dropout: float = 0.1,
        num_sequences: int = 1,
    ) -> None:
        super().__init__()
        check_attention_maker(attention, optional=False)
        vocab_size, num_classes, dim = (
            check_integer("vocab_size", vocab_size),
            check_integer("num_classes", num_classes),
            check_integer("dim", dim),
        )
        num_layers, head_dim = check_integer("num_layers", num_layers, least=0), check_integer("head_dim", head_dim)
        dropout = probability("dropout", dropout)
        if num_sequences not in (1, 2):
            raise ValueError(f"num_sequences must be 1 or 2, got {num_sequences!r}")
        self.num_sequences = check_integer("num_sequences", num_sequences)
        self.max_len = check_integer("max_len", max_len)
        self._part: _Part | None = None
        self.embedding = _TokenEmbedding(vocab_size, dim, padding_idx=0)
        self.positions = nn.Parameter(torch.empty(self.max_len, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, made_by(attention, dim), mlp_dim=mlp_dim, dropout=dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        features = dim if self.num_sequences == 1 else 4 * dim
        self.head = nn.Sequential(nn.Linear(features, head_dim), nn.ReLU(), nn.Linear(head_dim, num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the positions anew; every part resets its own weights."""
        nn.init.normal_(self.positions, std=_STD)

    def shard_positions(self, group: "Group") -> Self:
        """Let every rank of a group work on its own part of the positions of each batch.

        From then on all ranks call the network with the same whole batch. Each embeds and encodes the consecutive
        positions that are its own, about as many as any other's and none where there are fewer positions than ranks,
        and the sums behind the means are added over ranks: all ranks return the same logits. Dropout is each rank's.

        Every rank's loss is that of the whole batch, and its gradients are its share of those of the sum of all ranks'
        losses, so that their mean over ranks, which data-parallel wrappers take, is the gradient of one process.

        Args:
            group: as for `lineara.nn.sequence_parallel.shard_positions`; None: all positions are here again.

        Returns:
            The network, changed in place.

        Raises:
            ValueError: for a network with a block whose attention is not a linear one of `lineara.nn`, or a group that
                this rank cannot talk to. Nothing is changed then.
            TypeError: for a group that is none.

        Cost: for each pass a message of (batch, dim) and those of the attention layers; activations of 1 / ranks of the
            positions on each.
        """
        name = name_of_group(group)
        for index, block in enumerate(self.blocks):
            if not any(isinstance(layer, ShardedPositions) for layer in block.modules()):
                raise ValueError(
                    "every block must have an attention layer that can take a group, EfficientAttention or "
                    f"MultiresolutionAttention, got {type(getattr(block, 'attention', block)).__name__} in block "
                    f"{index}"
                )
        if len(self.blocks):
            shard_positions(self.blocks, group)
        self._part = _Part(name, process_group(name).rank(), process_group(name).size()) if name else None
        return self

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Classify token sequences, or pairs of them.

        Args:
            tokens: integer (batch, positions), with `num_sequences` 2 (batch, 2, positions); ids below vocab_size. All
                positions, also where ranks share them.
            mask: boolean, of the shape of tokens, True = a token, False = padding; None is tokens != 0.

        Returns:
            Logits (batch, num_classes).

        Raises:
            ValueError: for tokens or a mask of another shape, no positions, sequences longer than max_len, or ids
                outside the vocabulary (on the CPU; a GPU would have to be waited for).
            TypeError: for tokens that are not integers, or a mask that is not boolean.
        """
        self._check_tokens(tokens)
        pairs = self.num_sequences == 2
        if tokens.dim() != 2 + pairs or tokens.shape[-1] > self.max_len or (pairs and tokens.shape[1] != 2):
            shape = "(batch, 2, positions)" if pairs else "(batch, positions)"
            raise ValueError(
                f"tokens must have the shape {shape} with at most max_len={self.max_len} positions, "
                f"got {tuple(tokens.shape)}"
            )
        if tokens.shape[-1] == 0:
            raise ValueError(
                f"tokens must have at least 1 position, got {tuple(tokens.shape)}; pad an empty sequence with a 0, and "
                "mask it"
            )
        self._check_ids(tokens)
        if mask is None:
            mask = tokens != 0
        else:
            check_boolean("mask", mask, "True = a token", beside=("tokens", tokens))
        if mask.shape != tokens.shape:
            raise ValueError(f"mask must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(mask.shape)}")
        if not pairs:
            return self.head(self._encode(tokens, mask))
        means = self._encode(tokens.flatten(0, 1), mask.flatten(0, 1))  # (2B, dim)
        a, b = means.unflatten(0, (-1, 2)).unbind(dim=1)  # (B, dim) each
        return self.head(torch.cat([a, b, a * b, a - b], dim=1))

    def _encode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        # Counted before the ranks share them: each has the whole mask.
        valid = mask.sum(dim=1, keepdim=True).clamp_min(1)  # (B, 1)
        positions = self.positions[: tokens.shape[1]]  # (N, dim)
        if self._part is not None:
            here = self._part.of(tokens.shape[1])
            tokens, positions, mask = tokens[:, here], positions[here], mask[:, here]
        x = self.dropout(self.embedding(tokens) + positions)  # (B, n, dim)
        for block in self.blocks:
            x = block(x, key_mask=mask)
        x = self.norm(x)
        total = x.masked_fill(~mask[:, :, None], 0.0).sum(dim=1, dtype=accumulation_dtype(x.dtype))  # (B, dim)
        total = total if self._part is None else sum_over_group(total, self._part.group_name)
        return (total / valid).to(x.dtype)

    @staticmethod
    def _check_tokens(tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens must be a torch.Tensor, got {type(tokens).__name__}")
        if tokens.is_nested:
            raise TypeError("tokens must not be a nested tensor; pad it with 0, tokens.to_padded_tensor(0)")
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"tokens must be int32 or int64, got {tokens.dtype}; write tokens.long()")

    def _check_ids(self, tokens: Tensor) -> None:
        # Only where their numbers are at hand: no graph is broken, no GPU waited for.
        if not is_plain(tokens) or not tokens.numel() or not isinstance(self.embedding, nn.Embedding):
            return
        least, largest = (int(bound) for bound in tokens.aminmax())
        if least < 0 or largest >= self.embedding.num_embeddings:
            raise ValueError(
                f"tokens must be ids from 0 to vocab_size - 1 = {self.embedding.num_embeddings - 1}, got "
                f"{least if least < 0 else largest}; give a larger vocab_size, or unknown tokens an id of their own"
            )


class _TokenEmbedding(nn.Embedding):
    """With the initial values of the harness; padding is zero."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=_STD)
        ids = torch.arange(self.num_embeddings, device=self.weight.device)[:, None]
        multiply(self.weight, ids != self.padding_idx)


class _Part(NamedTuple):
    """Which positions are this rank's; not the group itself, which torch cannot copy. A pickle of it is None."""

    group_name: str
    rank: int
    num_ranks: int

    def of(self, positions: int) -> slice:
        return slice(self.rank * positions // self.num_ranks, (self.rank + 1) * positions // self.num_ranks)

    def __deepcopy__(self, _: Any) -> "_Part":
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
