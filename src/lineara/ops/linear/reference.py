"""Linear attention in plain PyTorch: the definition of what is right, for every feature map, on any device.

Standard operators alone, differentiable in either mode and to any order, that torch.func transforms and torch.export
trace for any number of positions.

Letters in comments: B batch, H heads, N query positions, M key positions, K key channels, V value channels.
"""

import torch
from torch import Tensor

from lineara.ops.linear.feature_maps import Summary, feature_map
from lineara.ops.linear.layout import product, softmax
from lineara.ops.packed import Positions, Row, by_sequence, stacked
from lineara.ops.precision import accumulation_dtype, as_factor, times_scale, widened
from lineara.ops.tracing import transform_of

# Whether `summarize` takes a `window`, and compresses by means itself.
FUSES_MEANS = False


def summarize(
    key: Tensor, value: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, name: str, scale: float
) -> Summary:
    """Over positions: the maximum of a map that has one (else 0), the sum of the weights, and that of weights * value.

    The total of a map that counts positions is their number. Packed sequences have B = number of sequences.
    """
    if cu_seqlens is not None:
        tensors = Positions(key), Positions(value), Positions(key_mask)
        return stacked(by_sequence(summarize, cu_seqlens, *tensors, None, name, scale))
    phi = feature_map(name)
    num_valid = count_positions(key, key_mask) if phi.counts_positions else None  # (B, H, K)
    key, value = _prepare(key, value, scale, key_mask, -torch.inf if phi.has_maximum else 0.0)
    if phi.has_maximum:
        maximum = position_maximum(key)  # (B, H, K)
        # (Not exp_: selective activation checkpointing refuses that a tensor it may keep is written to.)
        weights = (key - finite_shift(maximum)[:, :, None, :]).exp()  # (B, H, M, K)
    else:
        weights = phi.of(key)
        maximum = weights.new_zeros((key.shape[0], key.shape[1], key.shape[3]))
        if key_mask is not None:
            weights = weights.masked_fill(~key_mask[:, None, :, None], 0.0)
    total = weights.sum(dim=2) if num_valid is None else num_valid
    return maximum, total, weights.mT @ value


def context_of(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    name: str,
    scale: float,
    *,
    exact: bool,
) -> Tensor:
    """The weighted sum divided by the total, (B, H, K, V), of a map that divides so.

    For softmax that is torch's softmax over positions, which is faster on short sequences than the summary (forward,
    8 heads of 64: by 1.15 at 64 to 256 positions, 1.6 at 16 positions of 16 channels). Unless `exact`, the result is
    NaN where a channel is -inf at all positions or a masked value is not finite; both count as nothing.
    """
    if cu_seqlens is not None or not feature_map(name).has_maximum:
        _, total, weighted_sum = summarize(key, value, key_mask, cu_seqlens, name, scale)
        return quotient(weighted_sum, total)
    key, value = as_factor(key, scale), as_factor(value)
    hidden = None if key_mask is None else ~key_mask[:, None, :, None]  # (B, 1, M, 1)
    if hidden is not None:
        key = key.masked_fill(hidden, -torch.inf)
        # (A gradient may meet 0 times what overflows, and a tangent may be anything.)
        if exact or value.requires_grad or key.requires_grad or transform_of(key, value):
            value = value.masked_fill(hidden, 0.0)
    if not exact:
        return softmax(key, 2).to(value.dtype).mT @ value
    # The gradient of a NaN is NaN, so that the softmax of such a channel must not be one in the first place.
    silent = (position_maximum(key) == -torch.inf)[:, :, None, :]
    return softmax(key.masked_fill(silent, 0.0), 2).masked_fill(silent, 0.0).to(value.dtype).mT @ value


def efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """`attend(query, None, context_of(key, value))` under softmax, with nothing asked; None where it must be exact."""
    context = softmax(key, 2).mT @ value
    seen = (context.detach() if context.requires_grad else context).sum().item()
    return product(softmax(query, 3), context) if seen == seen else None


def attend(
    query: Tensor,
    total: Tensor | None,
    weighted_sum: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
    name: str,
    scale: float,
) -> Tensor:
    """gate * phi(query) (weighted sum / total), or gate * phi(query) weighted sum / (phi(query) . total): (B, H, N, V).

    Where there is no total, the weighted sum has been divided by it. The gate is (B, H, N) or None.
    """
    if cu_seqlens is not None:
        tensors = Positions(query), Row(total), Row(weighted_sum), Positions(gate)
        return torch.cat(by_sequence(attend, cu_seqlens, *tensors, None, name, scale), dim=2)
    phi = feature_map(name)
    if phi.divides_context:
        context = weighted_sum if total is None else quotient(weighted_sum, total)
        weights = phi.of(as_factor(query, scale)).to(context.dtype)  # (B, H, N, K)
        output = product(weights, context)  # (B, H, N, V)
    else:
        assert total is not None, "only divided contexts have none"
        weights = phi.of(times_scale(query, scale))  # (B, H, N, K)
        denominator = weights @ total[..., None]  # (B, H, N, 1)
        # (A division, because the gradient of a reciprocal squares it, which overflows early.)
        undefined = denominator < torch.finfo(denominator.dtype).tiny
        output = product(weights, weighted_sum) / denominator.masked_fill(undefined, torch.inf)
    output = output if output.dtype == query.dtype else output.to(query.dtype)
    return output if gate is None else output * gate[..., None]


def quotient(weighted_sum: Tensor, total: Tensor) -> Tensor:
    """The context matrix, (B, H, K, V); 0 where nothing was summed."""
    return weighted_sum / torch.where(total > 0, total, 1.0)[..., None]


def finite_shift(maximum: Tensor) -> Tensor:
    """0 in place of the -inf that marks a channel without positions, so that -inf - (-inf) never arises."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def merge(first: Summary, second: Summary) -> Summary:
    """The summary of the positions of both; a maximum of 0 in both leaves plain sums."""
    maximum = torch.maximum(first[0], second[0])
    shift = finite_shift(maximum)
    first_factor, second_factor = (first[0] - shift).exp(), (second[0] - shift).exp()
    return (
        maximum,
        first[1] * first_factor + second[1] * second_factor,
        first[2] * first_factor[..., None] + second[2] * second_factor[..., None],
    )


def count_positions(key: Tensor, key_mask: Tensor | None) -> Tensor:
    """The number of valid positions, once for every key channel: (B, H, K)."""
    shape = (key.shape[0], key.shape[1], key.shape[3])
    wide = accumulation_dtype(key.dtype)
    if key_mask is None:
        return key.new_ones(shape, dtype=wide) * key.shape[2]
    return key_mask.sum(dim=1).to(wide)[:, None, None].repeat(1, *shape[1:])


def position_maximum(key: Tensor) -> Tensor:
    """The maximum over positions, -inf where there are none: (B, H, K). A shift that cancels: no gradient."""
    if key.shape[2] == 0:
        return key.new_full((key.shape[0], key.shape[1], key.shape[3]), -torch.inf)
    return key.detach().amax(dim=2)


def _prepare(key: Tensor, value: Tensor, scale: float, key_mask: Tensor | None, fill: float) -> tuple[Tensor, Tensor]:
    """Key (scaled) and value in the dtype of sums; `fill` and 0 in place of what masked positions hold."""
    key, value = times_scale(key, scale), widened(value)
    if key_mask is None:
        return key, value
    hidden = ~key_mask[:, None, :, None]  # (B, 1, M, 1)
    # A weight of 0 is not enough: a masked position may hold NaN, and 0 * NaN is NaN.
    return key.masked_fill(hidden, fill), value.masked_fill(hidden, 0.0)
