"""What torch's FlopCounterMode is told of the operators: two operations per multiply-add of their products.

Its registry lies in a module that imports triton, so the formulas wait until somebody else imports that module.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


Shape = Sequence[int]


def products(positions: int, key: Shape, value: Shape) -> int:
    """Operations of products with a K x V matrix at so many positions, for every item and head of the key."""
    return 2 * key[0] * key[1] * positions * key[3] * value[3]


def count_flops(operator: str, formula: Callable[..., int]) -> None:
    """Register lineara::operator; the formula gets its arguments, shapes in place of tensors."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], operator, formula)
    else:
        if not _WAITING.formulas:
            sys.meta_path.insert(0, _WAITING)
        _WAITING.formulas[operator] = formula


def num_windows(key_shape: Shape, resolution: int) -> int:
    return prod(-(-size // resolution) for size in key_shape)


class _UntilTheCounterIsImported(MetaPathFinder):
    """Finds the counter's module as Python would, and registers the formulas as soon as it has run."""

    def __init__(self) -> None:
        self.formulas: dict[str, Callable[..., int]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                for operator, formula in self.formulas.items():
                    _register(module, operator, formula)

            spec.loader.exec_module = run_and_register
        return spec


_WAITING = _UntilTheCounterIsImported()


def _register(counter: Any, operator: str, formula: Callable[..., int]) -> None:
    def of_call(*arguments: Any, out_shape: object = None, **_: Any) -> int:
        return formula(*arguments)

    counter.register_flop_formula(getattr(torch.ops.lineara, operator))(of_call)
