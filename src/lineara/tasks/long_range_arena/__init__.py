"""Long Range Arena: long-sequence classification, as in Tay et al., ICLR 2021, arXiv 2011.04006."""

from importlib import import_module
from typing import Any

_MODULES = {
    "DigitsData": "digits_data",
    "ImageData": "image_data",
    "ListOpsData": "listops_data",
    "PathfinderData": "pathfinder_data",
    "RetrievalData": "retrieval_data",
    "SequenceClassification": "task",
    "TextData": "text_data",
    "TextFileData": "text_file_data",
}
__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import the classes when they are first used: the generators need neither torch nor Lightning."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
