"""Attention whose time and memory grow linearly with the number of positions."""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"
__all__ = ["models", "nn", "ops"]


def __getattr__(name: str) -> ModuleType:
    """Import `lineara.ops`, `lineara.nn` and `lineara.models` when they are first used."""
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
