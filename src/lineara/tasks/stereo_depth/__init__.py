"""Depth from two views: disparities of photographs taken side by side, on Scene Flow, KITTI, Middlebury and ETH3D."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

for _library, _name in (("torchvision", "torchvision"), ("PIL", "pillow")):
    if find_spec(_library) is None:
        raise ImportError(
            f"stereo depth needs {_name}, which is not installed; install it with: pip install 'lineara[train,vision]'"
        )

_MODULES = {
    "ETH3DData": "middlebury_data",
    "KittiData": "kitti_data",
    "MiddleburyData": "middlebury_data",
    "MotorcycleData": "motorcycle_data",
    "SceneFlowData": "scene_flow_data",
    "StereoDepth": "task",
}
__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import the classes when they are first used: a look at the package needs neither torch nor Lightning."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
