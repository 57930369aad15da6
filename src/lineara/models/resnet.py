"""ResNets of torchvision with attention behind their stages."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from torch import nn

from lineara.nn.checks import check_attention_maker, made_by
from lineara.ops.checks import check_integer

if TYPE_CHECKING:
    from torchvision.models import ResNet

# The paper's names of the stages, and torchvision's.
STAGES = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}
# Modules by number, as in the paper's table on ImageNet; which places they are is inferred from its detectors.
_PLACES: dict[int, tuple[str, ...]] = {0: (), 1: ("res3",), 2: ("res3", "res4")}


def resnet(
    name: str = "resnet50",
    *,
    num_classes: int = 1000,
    attention: Callable[[int], nn.Module] | None = None,
    places: int | Sequence[str] = 2,
) -> nn.Module:
    """A ResNet of torchvision, with attention modules behind some of its stages.

        features = stage(features),   features = attention(features)      for the stages in `places`

    Names of weights are torchvision's; those of the module behind `layer2` begin with `layer2.attention.`, so that a
    plain state dict fits all but the modules (`lineara.models.pretrained.load_plain_weights`).

    Args:
        name: a function of `torchvision.models` that makes one: resnet18, resnet34, resnet50, resnet101, resnet152,
            resnext50_32x4d, resnext101_32x8d, resnext101_64x4d, wide_resnet50_2 or wide_resnet101_2.
        num_classes: number of classes.
        attention: makes one module: called as attention(dim) for a place with `dim` channels. A class, a function, or
            in a recipe a class path with its further arguments; None is the plain network. With `zero_init` the
            extended network starts as the plain one.
        places: stages that a module follows, some of res2, res3, res4 and res5; or the number of modules: 1 is res3,
            2 are res3 and res4.

    Returns:
        The network: images (batch, 3, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: for a name or places that do not exist.
        ImportError: without torchvision.

    Source: He et al., CVPR 2016, arXiv 1512.03385, as in torchvision; Shen et al., WACV 2021, arXiv 1812.01243, which
    gives the numbers of modules on ImageNet; their places are inferred from its detectors.

    Example:
        >>> network = resnet("resnet50", attention=lambda dim: EfficientAttention2d(dim, key_dim=64, zero_init=True))
    """
    check_attention_maker(attention)
    chosen = choose_places(places, _PLACES, tuple(STAGES))
    network = plain_resnet(name, num_classes=check_integer("num_classes", num_classes))
    insert_into_stages(network, attention, chosen)
    return network


def plain_resnet(name: str, **options: Any) -> "ResNet":
    """torchvision's own, without weights; `options` are those of its function."""
    models = torchvision_models()
    names = [known for known in models.list_models(module=models) if "resne" in known]
    if name not in names:
        raise ValueError(f"a ResNet must be one of {', '.join(sorted(names))}, got {name!r}")
    return models.get_model(name, weights=None, **options)


def torchvision_models() -> Any:
    try:
        import torchvision.models
    except ImportError as error:
        raise ImportError(
            "this network needs torchvision, which is not installed; install it with: pip install 'lineara[vision]'"
        ) from error
    return torchvision.models


def insert_into_stages(network: "ResNet", attention: Callable[[int], nn.Module] | None, places: Sequence[str]) -> None:
    """Append to each stage of `places` the module `attention` of its channels."""
    if attention is None:
        return
    for place in places:
        depth = list(STAGES).index(place)
        channels = network.fc.in_features // 2 ** (3 - depth)  # they double from stage to stage
        network.get_submodule(STAGES[place]).add_module("attention", made_by(attention, channels))


def choose_places(
    places: int | Sequence[str], numbered: dict[int, tuple[str, ...]], known: Sequence[str]
) -> tuple[str, ...]:
    """The places by name, each once; in the order of the network."""
    if numbered and isinstance(places, SupportsIndex):
        places = check_integer("places", places, least=0)
        if places not in numbered:
            raise ValueError(
                f"places must be a list of some of {', '.join(known)}, or one of the numbers "
                f"{', '.join(map(str, numbered))}, got {places}"
            )
        return numbered[places]
    names = tuple(places) if isinstance(places, Iterable) and not isinstance(places, str) else ("",)
    if any(name not in known for name in names) or len(set(names)) < len(names):
        raise ValueError(f"places must be a list of some of {', '.join(known)}, each once, got {places!r}")
    return tuple(name for name in known if name in names)
