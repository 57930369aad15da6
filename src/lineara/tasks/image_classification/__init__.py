"""Image classification: the paper's comparison on ImageNet, and a small set that ships."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

if find_spec("torchvision") is None:
    raise ImportError(
        "lineara.tasks.image_classification needs torchvision, which is not installed; install it with: "
        "pip install 'lineara[vision]'"
    )

_MODULES = {"DigitsData": "digits_data", "ImageClassification": "task", "ImageFolderData": "image_folder_data"}
__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import the classes when they are first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
