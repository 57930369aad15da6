"""What the layers for (batch, positions, dim) sequences share: projections to heads and back."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lineara.ops.checks import check_choice
from lineara.ops.dispatch import IMPLEMENTATIONS

if TYPE_CHECKING:
    from lineara.ops.sequence_parallel import Group


class SequenceAttention(nn.Module):
    """Project to queries, keys and values, `attend` per head, project back; a layer says how to attend.

    Args:
        dim: channels of the input and of the output.
        num_heads: heads; they split key and value channels contiguously.
        key_dim: channels of all queries, and of all keys, together; default `dim`.
        value_dim: channels of all values together; default `dim`.
        context_dim: channels of the `context` input of cross-attention; default `dim`.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        device: of the weights.
        dtype: of the weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.key_dim = dim if key_dim is None else key_dim
        self.value_dim = dim if value_dim is None else value_dim
        self.context_dim = dim if context_dim is None else context_dim
        check_widths(num_heads, dim=dim, key_dim=self.key_dim, value_dim=self.value_dim, context_dim=self.context_dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, self.key_dim, bias=qkv_bias, **factory)
        self.key = nn.Linear(self.context_dim, self.key_dim, bias=qkv_bias, **factory)
        self.value = nn.Linear(self.context_dim, self.value_dim, bias=qkv_bias, **factory)
        self.output = nn.Linear(self.value_dim, dim, **factory)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        """Attend from every position of `x` to the positions of `context`, or of `x` itself.

        Args:
            x: (batch, positions, dim).
            context: (batch, context positions, context_dim); None attends to `x`.
            key_mask: boolean (batch, positions of what is attended to), True = takes part.

        Returns:
            (batch, positions, dim).

        Raises:
            ValueError: for inputs or masks of another shape.
            TypeError: for a mask that is not boolean.
        """
        self._check_input("x", x, self.dim)
        query_mask = key_mask if context is None else None
        if context is None:
            context = x
            if self.context_dim != self.dim:
                raise ValueError(
                    f"context must be given when context_dim differs from dim, got context_dim={self.context_dim}, "
                    f"dim={self.dim} and no context"
                )
        else:
            self._check_input("context", context, self.context_dim)
        query = self._split_heads(self.query(x))  # (B, H, N, K)
        key = self._split_heads(self.key(context))  # (B, H, M, K)
        value = self._split_heads(self.value(context))  # (B, H, M, V)
        attended = self.attend(query, key, value, key_mask, query_mask)  # (B, H, N, V)
        return self.output(attended.transpose(1, 2).flatten(2))  # (B, N, dim)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, query_mask: Tensor | None
    ) -> Tensor:
        """The operation, on (batch, heads, positions, channels per head).

        The query mask, (batch, query positions), says which queries mean something; None where that is not known.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        widths = "".join(
            f", {name}={width}"
            for name, width in (
                ("key_dim", self.key_dim),
                ("value_dim", self.value_dim),
                ("context_dim", self.context_dim),
            )
            if width != self.dim
        )
        return f"dim={self.dim}, num_heads={self.num_heads}{widths}"

    def _split_heads(self, projected: Tensor) -> Tensor:
        batch, positions, channels = projected.shape
        heads = projected.view(batch, positions, self.num_heads, channels // self.num_heads)  # (B, N, H, D)
        return heads.transpose(1, 2)  # (B, H, N, D)

    @staticmethod
    def _check_input(name: str, tensor: Tensor, dim: int) -> None:
        if tensor.dim() != 3 or tensor.shape[2] != dim:
            raise ValueError(f"{name} must have the shape (batch, positions, {dim}), got {tuple(tensor.shape)}")


class ShardedPositions(nn.Module):
    """A module that calls an operation with `group`: the ranks over which positions are sharded, None = all are here.

    `lineara.nn.sequence_parallel.shard_positions` sets it.
    """

    _held: "_Held | None" = None

    @property
    def group(self) -> "Group":
        return None if self._held is None else self._held.group

    @group.setter
    def group(self, group: "Group") -> None:
        self._held = None if group is None else _Held(group)


class _Held:
    """A group, which torch cannot copy: the copy of a layer talks to the ranks that the layer talks to."""

    def __init__(self, group: "Group") -> None:
        self.group = group

    def __deepcopy__(self, _: Any) -> "_Held":
        return self


def check_options(normalization: str, impl: str) -> None:
    """Raise unless both are names that the operations know."""
    check_choice("normalization", normalization, ("softmax", "scaling"))
    check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))


def check_widths(num_heads: int, **widths: int) -> None:
    """Raise unless all are positive and key and value channels split evenly into heads."""
    for name, width in {"num_heads": num_heads, **widths}.items():
        if isinstance(width, bool) or not isinstance(width, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{name} must be an integer, got {width!r}")
        if width < 1:
            raise ValueError(f"{name} must be at least 1, got {width}")
    for name in ("key_dim", "value_dim"):
        if widths[name] % num_heads:
            raise ValueError(f"{name} must be divisible by num_heads, got {widths[name]} and {num_heads}")
