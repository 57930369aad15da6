"""ResNets with attention, against torchvision's own."""

import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

from lineara.models import resnet
from lineara.nn import EfficientAttention2d, MultiresolutionAttention2d
from lineara.nn.non_local_attention import NonLocalAttention2d


def starting_as_identity(kind, **options):
    return lambda dim: kind(dim, key_dim=8, zero_init=True, **options)


def modules_of(network, kind):
    return [name for name, module in network.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("kind", [EfficientAttention2d, NonLocalAttention2d, MultiresolutionAttention2d])
def test_starts_as_the_plain_network_with_the_plain_weights(name, kind):
    plain = getattr(torchvision.models, name)(weights=None, num_classes=7).eval()
    network = resnet(name, num_classes=7, attention=starting_as_identity(kind)).eval()
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert {key.rpartition(".attention.")[0] for key in missing} == {"layer2", "layer3"}
    x = torch.randn(2, 3, 61, 67)
    with torch.no_grad():
        assert torch.equal(network(x), plain(x))
        network.layer3.attention.reprojection.weight.fill_(0.1)
        assert not torch.equal(network(x), plain(x))


def test_without_attention_it_is_torchvisions():
    ours, theirs = resnet(), torchvision.models.resnet50(weights=None)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.fc.out_features == 1000


@pytest.mark.parametrize(
    ("places", "channels"),
    [
        (0, {}),
        ([], {}),
        (1, {"layer2": 512}),
        (2, {"layer2": 512, "layer3": 1024}),
        (["res5", "res2"], {"layer1": 256, "layer4": 2048}),
    ],
)
def test_modules_stand_where_they_are_wanted_with_the_channels_there(places, channels):
    network = resnet("resnet50", attention=EfficientAttention2d, places=places)
    found = {name: network.get_submodule(name).dim for name in modules_of(network, EfficientAttention2d)}
    assert found == {f"{stage}.attention": dim for stage, dim in channels.items()}


def test_a_module_acts_on_what_its_stage_gives():
    class Doubling(nn.Module):
        def forward(self, x):
            return 2 * x

    network = resnet("resnet18", attention=lambda dim: Doubling(), places=["res5"]).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = network.fc.bias + (network(x) - network.fc.bias) / 2
        network.layer4.attention = nn.Identity()
        torch.testing.assert_close(network(x), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet20"}, "^a ResNet must be one of resnet101, .*, got 'resnet20'$"),
        ({"name": "alexnet"}, "got 'alexnet'$"),
        ({"places": 3}, r"^places must be a list of some of res2, .* or one of the numbers 0, 1, 2, got 3$"),
        ({"places": ["res6"]}, r"^places must be a list .* each once, got \['res6'\]$"),
        ({"places": ["res3", "res3"]}, "each once"),
        ({"places": "res3"}, "got 'res3'$"),
        ({"places": ["fpn1"]}, "some of res2, res3, res4, res5, each once"),
    ],
)
def test_what_does_not_exist_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resnet(**options)


def test_without_torchvision_the_call_says_what_to_install():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from lineara.models import SequenceClassifier, mask_rcnn, resnet\n"
        "for make in (resnet, mask_rcnn):\n"
        "    try: make()\n"
        "    except ImportError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (
        said.splitlines()
        == ["this network needs torchvision, which is not installed; install it with: pip install 'lineara[vision]'"]
        * 2
    )
