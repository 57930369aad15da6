"""Instance segmentation: boxes, classes and masks of the objects in photographs, in COCO's format and by its scores."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

for _library, _name in (("torchvision", "torchvision"), ("PIL", "pillow"), ("faster_coco_eval", "faster-coco-eval")):
    if find_spec(_library) is None:
        raise ImportError(
            f"instance segmentation needs {_name}, which is not installed; install it with: "
            "pip install 'lineara[train,vision]'"
        )

_MODULES = {
    "CocoData": "data",
    "CoinsData": "coins_data",
    "InstanceSegmentation": "task",
}
__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import the classes when they are first used: a look at the package needs neither torch nor Lightning."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
