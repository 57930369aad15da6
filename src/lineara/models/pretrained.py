"""Weights of a plain network into one with attention modules."""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# The modules that a plain network has not: behind a stage, on a level of the pyramid, and in a volume.
_ATTENTION = re.compile(r"(^|\.)(layer\d\.attention|extra_blocks\.fpn\d)\.|^attention\.")
# The last layers, whose size is the number of classes.
_PREDICTORS = re.compile(
    r"(^|\.)(fc|box_predictor\.(cls_score|bbox_pred)|mask_predictor\.mask_fcn_logits)\.(weight|bias)$"
)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_COUNTERS = "num_batches_tracked"  # frozen normalisation keeps none
# How the names of PSMNet's published weights begin, and the convolution whose branches they have in another order.
_PSMNET = ("module.feature_extraction.", "feature_extraction.")
_FUSION, _BEFORE_BRANCHES, _BRANCH = "features.fusion.0.weight", 192, 32


def load_plain_weights(network: nn.Module, path: Path | str, *, part: str | None = None) -> list[str]:
    """Load a file of weights of the plain network; modules of attention that it lacks stay as they are.

    Last layers of another number of classes also stay as they are, with a warning that names them. The classifier `fc`
    of a ResNet is left out where `network` has none.

    Args:
        network: made by `resnet` or `mask_rcnn`, or a `PSMNet`.
        path: a state dict of torchvision, saved by torch.save or as `.safetensors`; a checkpoint of `lineara fit`; or,
            for a `PSMNet`, one that its authors have published: its tensors stand in the order of ours, but for the
            branches of the pyramid.
        part: submodule of `network` to load into, such as `"backbone.body"` for weights of a ResNet; None is all of it.

    Returns:
        The names of the weights that the file did not give.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: for `.safetensors` without the package safetensors.
        ValueError: for a file that holds no weights or some that are not finite, lacks others than those of attention,
            or has some of other names or shapes.
    """
    weights = _read(Path(path))
    target = network if part is None else network.get_submodule(part)
    own = target.state_dict()
    if any(name.startswith(_PSMNET) for name in weights):
        weights = _from_published_psmnet(path, weights, own)
    without_classifier = not any(name.startswith("fc.") for name in own)
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if not (without_classifier and name.startswith("fc.")) and (name in own or not name.endswith(_COUNTERS))
    }
    resized = [name for name in weights if name in own and own[name].shape != weights[name].shape]
    _check_shapes(path, [name for name in resized if not _PREDICTORS.search(name)], own, weights)
    given = {name: tensor for name, tensor in weights.items() if name not in resized}
    missing = [name for name in own if name not in given and not name.endswith(_COUNTERS)]
    lacking = [name for name in missing if name not in resized and not _ATTENTION.search(name)]
    for wrong, what in ((lacking, "lacks"), ([name for name in given if name not in own], "also has")):
        if wrong:
            raise ValueError(
                f"{path} must hold the weights of this network, got a file that {what} {len(wrong)}, such as {wrong[0]}"
            )
    if resized:
        warnings.warn(f"{path} is of another number of classes: {', '.join(resized)} start anew", stacklevel=2)
    target.load_state_dict(given, strict=False)
    return missing


def _from_published_psmnet(
    path: Path | str, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors by our names: they stand in one order."""
    are_counted = any(name.endswith(_COUNTERS) for name in weights)
    names = [name for name in own if not _ATTENTION.search(name) and (are_counted or not name.endswith(_COUNTERS))]
    if len(names) != len(weights) or _FUSION not in names:
        raise ValueError(
            f"{path} must hold the weights of this network, got {len(weights)} of the published PSMNet for "
            f"{len(names)} of it; load them into a PSMNet"
        )
    named = dict(zip(names, weights.values()))
    _check_shapes(path, [name for name in names if own[name].shape != named[name].shape], own, named)
    first, *branches = named[_FUSION].split([_BEFORE_BRANCHES, *[_BRANCH] * 4], dim=1)
    return named | {_FUSION: torch.cat([first, *reversed(branches)], dim=1)}


def _check_shapes(path: Path | str, wrong: list[str], own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    if wrong:
        raise ValueError(
            f"{path} must hold weights of this network, got {wrong[0]} of shape {tuple(weights[wrong[0]].shape)} "
            f"instead of {tuple(own[wrong[0]].shape)}"
        )


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must be a file of weights, got no such file; download torchvision's and name it here"
        )
    load = _load_safetensors() if path.suffix == ".safetensors" else _load
    try:
        content = load(path)
    except Exception as error:  # what is raised on a damaged or foreign file is of many kinds
        reader = "safetensors" if path.suffix == ".safetensors" else "torch"
        raise ValueError(f"{path} must be a file of weights, got a file that {reader} cannot read") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        given = content["state_dict"]
        of_network = "network."
        content = {
            name.removeprefix(of_network): tensor
            for name, tensor in given.items()
            if isinstance(name, str) and name.startswith(of_network)
        }
        if any(isinstance(name, str) and name.startswith(_PSMNET) for name in given):
            content = given
    why = _reason(content)
    if why is not None:
        raise ValueError(
            f"{path} must hold a dict of weights by their names, got {why}; name a state dict, or a checkpoint of "
            "lineara fit"
        )
    return content


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_safetensors() -> Callable[[Path], Any]:
    try:
        from safetensors.torch import load_file  # pyright: ignore[reportMissingImports] - nothing depends on it
    except ImportError as error:
        raise ImportError(
            "a .safetensors file must be read by the package safetensors, got none installed; call `pip install "
            "safetensors`, or save the weights by torch.save"
        ) from error
    return load_file


def _reason(content: object) -> str | None:
    """What keeps this from being weights, or None."""
    if not isinstance(content, dict):
        return f"an object of type {type(content).__name__}"
    if not content:
        return "none"
    for name, value in content.items():
        if not isinstance(name, str):
            return f"{name!r} for a name"
        if not isinstance(value, Tensor):
            return f"{name} of type {type(value).__name__}"
        if not value.is_floating_point() and value.dtype not in _INTEGERS:
            return f"{name} of {value.dtype}"
        if not value.isfinite().all():
            return f"{name} with values that are not finite"
    return None
