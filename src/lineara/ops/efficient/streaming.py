"""Efficient attention block by block: the reference's mathematics with nothing as long as the sequence kept beside it.

A block of positions is converted, exponentiated and multiplied while it is in the processor's cache, in buffers that
are allocated once; a running maximum per key channel makes the position softmax exact over any number of blocks. The
backward passes recompute both softmaxes from the inputs instead of saving them.

Letters in comments: B batch, H heads, R rows of a block (some of the B * H), n positions of a block, N query positions,
M key positions, K key channels, V value channels.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lineara.ops.efficient.reference import accumulation_dtype, count_positions, finite_shift

# A block holds at most this many elements (2 MiB of float32); it takes as many rows as fit at this length.
_BLOCK_ELEMENTS = 512 * 1024
_BLOCK_LEN = 512
# A product adds the positions of a block one by one, so longer blocks would lose digits.
_LONGEST_BLOCK = 8192
# Up to this many elements (8 MiB of float32) in query, key and value each, all positions are one block, and that block
# is the reference's business: torch's own operations on whole tensors are as fast there, and keep no more than this.
_ONE_BLOCK_ELEMENTS = 2 * 1024 * 1024


def fits_one_block(*tensors: Tensor) -> bool:
    """Whether (B, H, positions, channels) tensors are so small that walking them in blocks costs more than it saves."""
    return all(tensor.numel() <= _ONE_BLOCK_ELEMENTS for tensor in tensors)


def summarize(
    key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum (B, H, K), total (B, H, K) and weighted sum (B, H, K, V) of `reference.ContextSummary`."""
    softmax = normalization == "softmax"
    wide = accumulation_dtype(key.dtype)
    batch, heads, _, key_dim = key.shape
    maximum = key.new_full((batch, heads, key_dim), -torch.inf if softmax else 0.0, dtype=wide)
    total = torch.zeros_like(maximum) if softmax else count_positions(key, key_mask)
    weighted_sum = key.new_zeros((batch, heads, key_dim, value.shape[3]), dtype=wide)
    hidden = _hidden_positions(key_mask, key)
    key_buffer, value_buffer = _Buffer(key), _Buffer(value)

    for (k, v, hide), (m, s, S) in _blocks((key, value, hidden), (maximum, total, weighted_sum)):
        k = key_buffer.load(k, scale, hide, -torch.inf if softmax else 0.0)  # (R, n, K)
        v = value_buffer.load(v, 1.0, hide, 0.0)  # (R, n, V)
        if softmax:
            new_maximum = torch.maximum(m, k.amax(dim=1))  # (R, K)
            shift = finite_shift(new_maximum)
            k = torch.sub(k, shift[:, None], out=key_buffer.fit(k)).exp_()
            kept = (m - shift).exp_()
            s.mul_(kept).add_(k.sum(dim=1))
            S.mul_(kept[:, :, None])
            m.copy_(new_maximum)
        S.baddbmm_(k.mT, v)
    return maximum, total, weighted_sum


def summarize_backward(
    grad_total: Tensor,
    grad_weighted_sum: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    maximum: Tensor,
    normalization: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value: with E = exp(K - m), dV = E dS and dK = E * (V dS^T + ds).

    For scaling dV = K dS and dK = V dS^T.
    """
    softmax = normalization == "softmax"
    grad_key = torch.empty_like(key, memory_format=torch.contiguous_format)
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    hidden = _hidden_positions(key_mask, key)
    shift = finite_shift(maximum)
    key_buffer, value_buffer = _Buffer(key), _Buffer(value)
    grad_key_buffer, grad_value_buffer = _Buffer(key), _Buffer(value)

    for (k, v, dk, dv, hide), (m, ds, dS) in _blocks(
        (key, value, grad_key, grad_value, hidden), (shift, grad_total, grad_weighted_sum)
    ):
        k = key_buffer.load(k, scale, hide, -torch.inf if softmax else 0.0)  # (R, n, K)
        v = value_buffer.load(v, 1.0, hide, 0.0)  # (R, n, V)
        if softmax:
            k = torch.sub(k, m[:, None], out=key_buffer.fit(k)).exp_()
        with grad_value_buffer.storing(dv) as product:
            torch.bmm(k, dS, out=product)
        with grad_key_buffer.storing(dk) as product:
            torch.bmm(v, dS.mT, out=product)
            if softmax:
                product.add_(ds[:, None]).mul_(k)
            elif hide.shape[2]:
                product.masked_fill_(hide, 0.0)
            if scale != 1.0:
                product.mul_(scale)
    return grad_key, grad_value


def attend(query: Tensor, context: Tensor, normalization: str, scale: float) -> Tensor:
    """The query weights of every position, times the context matrix: (B, H, N, V)."""
    output = query.new_empty((*query.shape[:3], context.shape[3]))
    query_buffer, output_buffer = _Buffer(query), _Buffer(output)
    for (q, o), (C,) in _blocks((query, output), (context,)):
        with output_buffer.storing(o) as product:
            torch.bmm(_query_weights(q, query_buffer, normalization, scale), C, out=product)
    return output


def attend_backward(
    grad_output: Tensor, query: Tensor, context: Tensor, normalization: str, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of query and context: with weights W and G = dO C^T, dC = W^T dO and dQ = W * (G - rowsum(W * G)).

    For scaling dQ = G.
    """
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_context = torch.zeros_like(context)
    query_buffer, output_buffer, grad_query_buffer = _Buffer(query), _Buffer(grad_output), _Buffer(query)
    for (q, do, dq), (C, dC) in _blocks((query, grad_output, grad_query), (context, grad_context)):
        weights = _query_weights(q, query_buffer, normalization, scale)  # (R, n, K)
        do = output_buffer.load(do, 1.0)  # (R, n, V)
        dC.baddbmm_(weights.mT, do)
        with grad_query_buffer.storing(dq) as product:
            torch.bmm(do, C.mT, out=product)  # (R, n, K)
            if normalization == "softmax":
                row_sum = product.mul_(weights).sum(dim=2, keepdim=True)  # (R, n, 1)
                product.addcmul_(weights, row_sum, value=-1.0)
            if scale != 1.0:
                product.mul_(scale)
    return grad_query, grad_context


def _query_weights(query: Tensor, buffer: "_Buffer", normalization: str, scale: float) -> Tensor:
    query = buffer.load(query, scale)
    return torch.softmax(query, dim=2, out=buffer.fit(query)) if normalization == "softmax" else query


class _Buffer:
    """Room for one block of a tensor in the dtype that sums are kept in, taken when first needed."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = accumulation_dtype(tensor.dtype)
        self._size = min(tensor.numel(), max(_BLOCK_ELEMENTS, tensor.shape[3]))
        self._memory: Tensor | None = None

    def fit(self, block: Tensor) -> Tensor:
        """Uninitialised, of the shape of the block."""
        if self._memory is None:
            self._memory = block.new_empty(self._size, dtype=self.dtype)
        return self._memory[: block.numel()].view(block.shape)

    def load(self, block: Tensor, scale: float, hidden: Tensor | None = None, fill: float = 0.0) -> Tensor:
        """scale * block in the buffer's dtype, `fill` where hidden; the block itself where that changes nothing."""
        anything_hidden = hidden is not None and hidden.shape[2] > 0
        if block.dtype == self.dtype and scale == 1.0 and not anything_hidden:
            return block
        loaded = self.fit(block).copy_(block)
        if scale != 1.0:
            loaded.mul_(scale)
        return loaded.masked_fill_(hidden, fill) if hidden is not None and anything_hidden else loaded

    @contextmanager
    def storing(self, target: Tensor) -> Generator[Tensor]:
        """A tensor to compute in, which ends up in the target: the target itself where its dtype allows it."""
        if target.dtype == self.dtype:
            yield target
        else:
            result = self.fit(target)
            yield result
            target.copy_(result)


def _blocks(long: Sequence[Tensor], short: Sequence[Tensor]) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Cut (B, H, positions, ...) and (B, H, ...) tensors into (R, n, ...) and (R, ...) views, block by block.

    No layout is copied: where batch and heads do not lie evenly spaced in memory, the batch is walked item by item.
    """
    batch, heads, num_positions = long[0].shape[:3]
    tensors = (*long, *short)
    if all(_rows_are_evenly_spaced(tensor) for tensor in tensors):
        groups, num_rows = [[tensor.flatten(0, 1) for tensor in tensors]], batch * heads
    else:
        groups, num_rows = [[tensor[item] for tensor in tensors] for item in range(batch)], heads
    channels = max(tensor.shape[3] for tensor in long)
    rows = min(num_rows, _BLOCK_ELEMENTS // (channels * min(num_positions, _BLOCK_LEN) or 1)) or 1
    length = min(_BLOCK_ELEMENTS // (channels * rows) or 1, _LONGEST_BLOCK)
    for group in groups:
        for row in range(0, num_rows, rows):
            views = [tensor[row : row + rows] for tensor in group]
            for start in range(0, num_positions, length):
                yield [view[:, start : start + length] for view in views[: len(long)]], views[len(long) :]


def _rows_are_evenly_spaced(tensor: Tensor) -> bool:
    batch, heads = tensor.shape[:2]
    return batch == 1 or heads == 1 or tensor.stride(0) == heads * tensor.stride(1)


def _hidden_positions(key_mask: Tensor | None, key: Tensor) -> Tensor:
    """True where a position takes no part: (B, H, M, 1), or (B, H, M, 0) when every position takes part."""
    if key_mask is None:
        return key.new_empty((*key.shape[:3], 0), dtype=torch.bool)
    return (~key_mask)[:, None, :, None].expand(-1, key.shape[1], -1, -1).contiguous()
