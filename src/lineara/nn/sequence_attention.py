"""What the layers for (batch, positions, dim) sequences share: projections to heads and back."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lineara.nn.checks import check_input, check_same_batch, check_weights, num_key_heads_of, projected, width_of
from lineara.ops.checks import check_cu_seqlens, check_integer, check_key_mask

if TYPE_CHECKING:
    from lineara.ops.sequence_parallel import Group


class SequenceAttention(nn.Module):
    """Project to queries, keys and values, `attend` per head, project back; a layer says how to attend.

    Args:
        dim: channels of the input and of the output.
        num_heads: heads; they split key and value channels contiguously.
        key_dim: channels of all queries together; default `dim`.
        value_dim: channels of all values together, those that heads share counted for each; default `dim`.
        context_dim: channels of the `context` input of cross-attention; default `dim`.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        num_key_heads: heads of keys and values; each serves num_heads / num_key_heads heads of queries that follow one
            another. Default `num_heads`.
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
        num_key_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_weights(dtype, qkv_bias=qkv_bias)
        self.dim = check_integer("dim", dim)
        self.num_heads = check_integer("num_heads", num_heads)
        self.num_key_heads = num_key_heads_of(self.num_heads, num_key_heads)
        names = "key_dim and value_dim" if key_dim is None and value_dim is None else "key_dim"
        self.key_dim = width_of(names, key_dim, self.dim, num_heads=self.num_heads, dim=self.dim)
        self.value_dim = width_of("value_dim", value_dim, self.dim, num_heads=self.num_heads, dim=self.dim)
        self.context_dim = self.dim if context_dim is None else check_integer("context_dim", context_dim)
        keys, values = (width // self.num_heads * self.num_key_heads for width in (self.key_dim, self.value_dim))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(self.dim, self.key_dim, bias=qkv_bias, **factory)
        self.key = nn.Linear(self.context_dim, keys, bias=qkv_bias, **factory)
        self.value = nn.Linear(self.context_dim, values, bias=qkv_bias, **factory)
        self.output = nn.Linear(self.value_dim, self.dim, **factory)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context_cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend from every position of `x` to the positions of `context`, or of `x` itself.

        Args:
            x: (batch, positions, dim).
            context: (batch, context positions, context_dim); None attends to `x`.
            key_mask: boolean (batch, positions of what is attended to), True = takes part. It guards keys and values
                alone: what a masked position of `x` holds reaches no other position, but a NaN or an infinity there
                reaches that position's own output and the gradients of all projections' weights, as 0 times NaN is NaN:
                fill padded positions with finite numbers first; leaving them out of the loss is not enough.
            cu_seqlens: for sequences of several lengths, packed one after the other into a batch of one: where each
                begins, and last where the last one ends, (number of sequences + 1,) of int32 or int64, rising from 0 to
                the number of positions. Each sequence attends to itself, or to its own part of the context.
            context_cu_seqlens: the same for the context; both or neither are given with one.

        Returns:
            (batch, positions, dim).

        Raises:
            ValueError: for inputs or masks of another shape, or projections that were cut inside a head.
            TypeError: for a mask that is not boolean, or inputs that are not floating point.
        """
        self._check_input("x", x, self.dim)
        if context is not None:
            self._check_input("context", context, self.context_dim)
            check_same_batch(x, context)
        elif self.context_dim != self.dim:
            raise ValueError(
                f"context must be given when context_dim differs from dim, got context_dim={self.context_dim}, "
                f"dim={self.dim} and no context"
            )
        self._check_packing(x, context, cu_seqlens, context_cu_seqlens)
        query_mask, name = None, "context"
        if context is None:
            context, context_cu_seqlens, query_mask, name = x, cu_seqlens, key_mask, "x"
        key_width, value_width = self.key_dim // self.num_heads, self.value_dim // self.num_heads
        query = self._split_heads("query", projected(self.query, "x", x), self.num_heads, key_width)  # (B, H, N, K)
        key = self._split_heads(
            "key", projected(self.key, name, context), self.num_key_heads, key_width
        )  # (B, H, M, K)
        value = self._split_heads(
            "value", projected(self.value, name, context), self.num_key_heads, value_width
        )  # (B, H, M, V)
        self._check_heads(query.shape[1], key.shape[1], value.shape[1])
        check_key_mask(key_mask, key)  # here, because a router counts queries by it before the operation sees it
        attended = self.attend(
            query,
            key,
            value,
            key_mask=key_mask,
            query_mask=query_mask,
            cu_seqlens_query=cu_seqlens,
            cu_seqlens_key=context_cu_seqlens,
        )  # (B, H, N, V)
        joined = attended.transpose(1, 2).flatten(2)  # (B, N, H * V)
        try:
            return projected(self.output, None, joined)  # (B, N, dim)
        except RuntimeError as error:
            self._check_output(joined.shape[2], error)
            raise

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None,
        query_mask: Tensor | None,
        cu_seqlens_query: Tensor | None,
        cu_seqlens_key: Tensor | None,
    ) -> Tensor:
        """The operation, on (batch, heads, positions, channels per head).

        The query mask, (batch, query positions), says which queries mean something; None where that is not known.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        widths = "".join(
            f", {name}={width}"
            for name, width, default in (
                ("key_dim", self.key_dim, self.dim),
                ("value_dim", self.value_dim, self.dim),
                ("context_dim", self.context_dim, self.dim),
                ("num_key_heads", self.num_key_heads, self.num_heads),
            )
            if width != default
        )
        return f"dim={self.dim}, num_heads={self.num_heads}{widths}"

    @staticmethod
    def _split_heads(name: str, projected: Tensor, num_heads: int, width: int) -> Tensor:
        # Their number is the data's: of a projection whose rows are split over processes, some of the heads are here.
        batch, positions, channels = projected.shape
        if channels % width:
            number = "num_heads" if name == "query" else "num_key_heads"
            raise ValueError(
                f"{name} must be split between heads of {width} channels each, got {channels} channels here, from a "
                "projection of another width or one split over processes inside a head; let it give "
                f"{num_heads * width} channels, and split query, key and value over a number of processes that divides "
                f"{number}={num_heads}, or none of the three"
            )
        return projected.view(batch, positions, channels // width, width).transpose(1, 2)  # (B, H, N, D)

    def _check_heads(self, query: int, key: int, value: int) -> None:
        # A key head that stays whole beside split queries would be right, but not the gradients that it gets.
        if key != value or query * self.num_key_heads != key * self.num_heads:
            raise ValueError(
                "query, key and value must have num_heads, num_key_heads and num_key_heads heads, or the same share of "
                f"them, got {query}, {key} and {value} heads here, of {self.num_heads}, {self.num_key_heads} and "
                f"{self.num_key_heads}, from a projection of another width or ones split over processes unlike each "
                "other; split all three by columns, and output by rows, or none of them"
            )

    def _check_output(self, channels: int, error: RuntimeError) -> None:
        # Afterwards, since a plan may also redistribute what output is given.
        weight: Any = getattr(self.output, "weight", None)
        if type(self.output) is not nn.Linear:
            return
        inputs: int = (weight.to_local() if hasattr(weight, "to_local") else weight).shape[1]
        if inputs != channels:
            raise ValueError(
                f"output must take the channels of the heads that are here, {channels}, got {inputs}, from a "
                "projection of another width or ones split over processes unlike each other; split query, key and "
                "value by columns, and output by rows, or none of them"
            ) from error

    @staticmethod
    def _check_input(name: str, tensor: Tensor, dim: int) -> None:
        check_input(
            name,
            tensor,
            ("batch", "positions", dim),
            instead_of_nesting=f"pack its sequences into a batch of one, torch.cat({name}.unbind())[None], and say "
            f"where each begins with {'' if name == 'x' else 'context_'}cu_seqlens",
        )

    @staticmethod
    def _check_packing(
        x: Tensor, context: Tensor | None, cu_seqlens: Tensor | None, context_cu_seqlens: Tensor | None
    ) -> None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, "x", x)
        if context is None:
            if context_cu_seqlens is not None:
                raise ValueError("context_cu_seqlens must be None without a context; pass cu_seqlens alone")
            return
        check_cu_seqlens("context_cu_seqlens", context_cu_seqlens, "context", context)
        sizes = [None if packing is None else packing.shape[0] for packing in (cu_seqlens, context_cu_seqlens)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                "cu_seqlens and context_cu_seqlens must both be None or have the same number of entries, got "
                f"{' and '.join('None' if size is None else str(size) for size in sizes)}; "
                "pack as many sequences into the context as into x"
            )


class ShardedPositions(nn.Module):
    """A module that calls an operation with `group`: the ranks over which positions are sharded, None = all are here.

    `lineara.nn.sequence_parallel.shard_positions` sets it. A copy has it too; a pickle has all positions again, since
    the process that reads it may know no ranks.
    """

    _held: "_Held | None" = None

    @property
    def group(self) -> "Group":
        return None if self._held is None else self._held.group

    @group.setter
    def group(self, group: "Group") -> None:
        self._held = None if group is None else _Held(group)


class _Held:
    """A group, which torch can neither copy nor pickle: the copy of a layer talks to the ranks that the layer talks to.

    A pickle of it is None.
    """

    def __init__(self, group: "Group") -> None:
        self.group = group

    def __deepcopy__(self, _: Any) -> "_Held":
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
