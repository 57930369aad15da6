"""Checks of arguments and inputs that the layers share: one sentence each, before any work."""

import types
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from lineara.ops.checks import (
    FLOATING_DTYPES,
    IMPLEMENTATIONS,
    NORMALIZATIONS,
    check_choice,
    check_integer,
    check_number,
)

Layer = TypeVar("Layer", bound=type)
Entry = TypeVar("Entry")


def probability(name: str, value: Any) -> float:
    """The value as a float; raise unless it lies between 0 and 1."""
    converted = check_number(name, value)
    if not 0 <= converted <= 1:
        raise ValueError(f"{name} must be a probability, from 0 to 1, got {converted}")
    return converted


def sequence_of(
    name: str, values: Any, check: Callable[[str, Any], Entry], *, otherwise: str = ""
) -> tuple[Entry, ...]:
    """Every entry as the check returns it; raise unless this is a sequence of what the check lets pass.

    `otherwise` says what else the caller takes, such as " or None".
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers{otherwise}, got {values!r}")
    return tuple(check(f"each of {name}", value) for value in values)  # pyright: ignore[reportUnknownVariableType]


def check_weights(dtype: torch.dtype | None, **flags: bool) -> None:
    """Raise unless layers can have weights of this dtype, and the flags are booleans."""
    if dtype is not None and dtype not in FLOATING_DTYPES:
        raise TypeError(f"dtype must be None, torch.float64, float32, bfloat16 or float16, got {dtype!r}")
    for name, flag in flags.items():
        if type(flag).__name__ not in ("bool", "bool_"):  # the latter is numpy's
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def check_same_batch(x: Tensor, context: Tensor) -> None:
    """Raise unless both hold as many items."""
    if x.shape[0] != context.shape[0]:
        raise ValueError(
            f"x and context must have the same batch size, got {x.shape[0]} and {context.shape[0]}; "
            "give every item of x a context of its own"
        )


def projected(projection: nn.Module, name: str | None, tensor: Tensor) -> Tensor:
    """projection(tensor); where it fails for dtype or device, say so; no name: a tensor that the layer itself made."""
    try:
        return projection(tensor)
    except RuntimeError as error:  # afterwards, since wrappers and hooks may convert what they are given
        weight: Any = getattr(projection, "weight", tensor)
        if name is not None and weight.device.type != tensor.device.type:
            raise ValueError(
                f"{name} must be on the device of the layer's weights, {weight.device}, got {tensor.device}; move one "
                "of them"
            ) from error
        dtype: Any = getattr(weight, "dtype", tensor.dtype)
        if dtype == tensor.dtype or torch.is_autocast_enabled(tensor.device.type):
            raise
        if name is None:
            raise TypeError(
                f"all weights of the layer must have one dtype, got {tensor.dtype} and {dtype}; convert it with "
                f"layer.to({tensor.dtype})"
            ) from error
        raise TypeError(
            f"{name} must have the dtype of the layer's weights, {dtype}, got {tensor.dtype}; convert it with "
            f"{name}.to({dtype}), or the layer"
        ) from error


def check_options(normalization: str, impl: str) -> None:
    """Raise unless both are names that the operations know."""
    check_choice("normalization", normalization, NORMALIZATIONS)
    check_choice("impl", impl, IMPLEMENTATIONS)


def num_key_heads_of(num_heads: int, num_key_heads: SupportsIndex | None) -> int:
    """The number of key heads; raise unless each serves equally many query heads."""
    if num_key_heads is None:
        return num_heads
    number = check_integer("num_key_heads", num_key_heads)
    if num_heads % number:
        raise ValueError(f"num_heads must be divisible by num_key_heads, got {num_heads} and {number}")
    return number


def width_of(
    name: str, given: SupportsIndex | None, default: int, *, num_heads: int, dim: int, formula: str = "dim"
) -> int:
    """The channels of all heads together; raise unless they split evenly, blaming what was given."""
    width = default if given is None else check_integer(name, given)
    if width % num_heads == 0:
        return width
    fitting = max(width // num_heads, 1) * num_heads
    if given is None:
        raise ValueError(
            f"{name}, by default {formula}, must be divisible by num_heads, got dim={dim} and num_heads={num_heads}; "
            f"give a {name} such as {fitting}, or another num_heads"
        )
    raise ValueError(
        f"{name} must be divisible by num_heads, got {width} and {num_heads}; give {fitting}, or another num_heads"
    )


def check_input(name: str, tensor: Tensor, axes: tuple[str | int, ...], *, instead_of_nesting: str) -> None:
    """Raise unless this is a dense floating-point tensor with these axes: sizes, or names of what may have any."""
    if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are untyped
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{name} must not be a nested tensor; {instead_of_nesting}")
    fits = tensor.dim() == len(axes) and all(
        isinstance(axis, str) or size == axis for axis, size in zip(axes, tensor.shape)
    )
    if not fits:
        raise ValueError(f"{name} must have the shape ({', '.join(map(str, axes))}), got {tuple(tensor.shape)}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}; convert it with {name}.to_dense()")
    if tensor.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}; "
            + ("pass .real and .imag as channels" if tensor.is_complex() else f"convert it with {name}.float()")
        )


def check_boolean(name: str, mask: Tensor, meaning: str, beside: tuple[str, Tensor]) -> None:
    """Raise unless this is a boolean tensor on the device of the named one."""
    if not isinstance(mask, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are untyped
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name} must be boolean ({meaning}), got {mask.dtype}; write {name} == 0 for a mask that is added to "
            f"scores (0 and -inf), and {name} != 0 for one of ones and zeros"
        )
    other, tensor = beside
    if mask.device != tensor.device:
        raise ValueError(
            f"{other} and {name} must be on the same device, got {tensor.device} and {mask.device}; move one of them"
        )


def check_layer(name: str, layer: nn.Module) -> None:
    """Raise unless this is a layer rather than what makes one."""
    if not isinstance(layer, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are untyped
        given = layer.__name__ if isinstance(layer, type) else type(layer).__name__
        raise TypeError(
            f"{name} must be a layer, got {'the class ' if isinstance(layer, type) else ''}{given}; "
            "make one, such as EfficientAttention(dim)"
        )


def check_attention_maker(attention: Callable[[int], nn.Module] | None, *, optional: bool = True) -> None:
    """Raise unless this can be called as attention(dim) to make a layer."""
    if attention is None and optional:
        return
    if isinstance(attention, nn.Module):
        raise TypeError(
            f"attention must be a class or a function that makes layers, got a layer, {type(attention).__name__}; "
            f"pass the class, or lambda dim: {type(attention).__name__}(dim, ...)"
        )
    if not callable(attention):
        raise TypeError(
            f"attention must be a class or a function that makes layers, got {attention!r}; "
            "pass a class such as EfficientAttention, or a function of dim"
        )


def made_by(attention: Callable[[int], nn.Module], dim: int) -> nn.Module:
    """attention(dim); raise unless that is a layer."""
    layer = attention(dim)
    if not isinstance(layer, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are untyped
        raise TypeError(f"attention must make a torch.nn.Module, got {type(layer).__name__} from attention({dim})")
    return layer


def with_own_name(*methods: str) -> Callable[[Layer], Layer]:
    """Give a class methods of its own that are the inherited ones, so that Python's errors name the class.

    (A wrong argument is refused by Python under the name of the class that has the code. What others derive from the
    class inherits as ever.)
    """

    def decorate(layer: Layer) -> Layer:
        for method in methods:
            found: types.FunctionType = getattr(layer, method)
            own = types.FunctionType(found.__code__, found.__globals__, method, found.__defaults__, found.__closure__)
            own.__dict__.update(found.__dict__)
            own.__kwdefaults__, own.__annotations__ = found.__kwdefaults__, found.__annotations__
            own.__doc__, own.__module__ = found.__doc__, layer.__module__
            own.__qualname__ = f"{layer.__qualname__}.{method}"
            setattr(layer, method, own)
        return layer

    return decorate
