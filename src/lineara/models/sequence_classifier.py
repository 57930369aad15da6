"""The encoder that Long Range Arena compares attention mechanisms in."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor, nn

from lineara.nn import EncoderBlock
from lineara.nn.sequence_attention import ShardedPositions
from lineara.nn.sequence_parallel import shard_positions
from lineara.ops.sequence_parallel import name_of_group, process_group, sum_over_group

if TYPE_CHECKING:
    from lineara.ops.sequence_parallel import Group


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
        if num_sequences not in (1, 2):
            raise ValueError(f"num_sequences must be 1 or 2, got {num_sequences}")
        self.num_sequences = num_sequences
        self.max_len = max_len
        self._part: _Part | None = None
        self.embedding = nn.Embedding(vocab_size, dim, padding_idx=0)
        self.positions = nn.Parameter(torch.empty(max_len, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, attention(dim), mlp_dim=mlp_dim, dropout=dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        features = dim if num_sequences == 1 else 4 * dim
        self.head = nn.Sequential(nn.Linear(features, head_dim), nn.ReLU(), nn.Linear(head_dim, num_classes))
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        with torch.no_grad():
            self.embedding.weight[0].zero_()

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
            mask: boolean, of the shape of tokens, True = a token, False = padding; None means that every position is
                valid.

        Returns:
            Logits (batch, num_classes).

        Raises:
            ValueError: for tokens or a mask of another shape, no positions, or sequences longer than max_len.
        """
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
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"mask must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(mask.shape)}")
        if not pairs:
            return self.head(self._encode(tokens, mask))
        means = self._encode(tokens.flatten(0, 1), None if mask is None else mask.flatten(0, 1))  # (2B, dim)
        a, b = means.unflatten(0, (-1, 2)).unbind(dim=1)  # (B, dim) each
        return self.head(torch.cat([a, b, a * b, a - b], dim=1))

    def _encode(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        # Counted before the ranks share them: each has the whole mask.
        valid = tokens.shape[1] if mask is None else mask.sum(dim=1, keepdim=True).clamp_min(1)  # (B, 1)
        positions = self.positions[: tokens.shape[1]]  # (N, dim)
        if self._part is not None:
            here = self._part.of(tokens.shape[1])
            tokens, positions = tokens[:, here], positions[here]
            mask = None if mask is None else mask[:, here]
        x = self.dropout(self.embedding(tokens) + positions)  # (B, n, dim)
        for block in self.blocks:
            x = block(x, key_mask=mask)
        x = self.norm(x)
        total = (x if mask is None else x.masked_fill(~mask[:, :, None], 0.0)).sum(dim=1)  # (B, dim)
        return (total if self._part is None else sum_over_group(total, self._part.group_name)) / valid


class _Part(NamedTuple):
    """Which positions are this rank's; not the group itself, which torch cannot copy."""

    group_name: str
    rank: int
    num_ranks: int

    def of(self, positions: int) -> slice:
        return slice(self.rank * positions // self.num_ranks, (self.rank + 1) * positions // self.num_ranks)
