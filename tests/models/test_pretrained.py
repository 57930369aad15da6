"""Files of plain weights into networks with attention."""

import json
import pickle
import sys
import warnings
from types import ModuleType

import pytest
import torch
import torchvision
from torch import nn

from lineara.models import PSMNet, mask_rcnn, resnet
from lineara.models.pretrained import load_plain_weights
from lineara.nn import EfficientAttention2d, EfficientAttention3d


def attention(dim):
    return EfficientAttention2d(dim, key_dim=8, zero_init=True)


@pytest.fixture
def plain_file(tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None, num_classes=7).state_dict(), path)
    return path


def changed(path, change):
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)
    return path


def test_all_but_the_modules_comes_from_the_file(plain_file):
    network = resnet("resnet18", num_classes=7, attention=attention)
    own = network.layer2.attention.keys.weight.clone()
    missing = load_plain_weights(network, plain_file)
    assert len(missing) == 2 * 8
    assert all(".attention." in name for name in missing)
    for name, tensor in torch.load(plain_file, weights_only=True).items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert torch.equal(network.layer2.attention.keys.weight, own)


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_weights_of_a_resnet_fit_the_body_of_a_detector(plain_file, batch_norm):
    network = mask_rcnn("resnet18", attention=attention, batch_norm=batch_norm)
    missing = load_plain_weights(network, plain_file, part="backbone.body")
    assert {name.partition(".attention.")[0] for name in missing} == {"layer2", "layer3"}
    expected = torch.load(plain_file, weights_only=True)["layer4.1.bn2.running_var"]
    assert torch.equal(network.backbone.body.layer4[1].bn2.running_var, expected)


def test_a_frozen_detector_fits_one_that_trains_its_normalisation(tmp_path):
    path = tmp_path / "detector.pth"
    torch.save(mask_rcnn("resnet18", batch_norm="frozen").state_dict(), path)
    missing = load_plain_weights(mask_rcnn("resnet18", attention=attention), path)
    assert {name.rpartition(".")[0].rpartition(".")[0].rpartition(".")[2] for name in missing} >= {"fpn1", "attention"}


def test_predictors_of_another_number_of_classes_start_anew_and_are_named(tmp_path, plain_file):
    network = resnet("resnet18", num_classes=5)
    own = network.fc.weight.clone()
    with pytest.warns(UserWarning, match=r"is of another number of classes: fc.weight, fc.bias start anew"):
        assert load_plain_weights(network, plain_file) == ["fc.weight", "fc.bias"]
    assert torch.equal(network.fc.weight, own)
    detector = tmp_path / "detector.pth"
    torch.save(mask_rcnn("resnet18", num_classes=91).state_dict(), detector)
    with pytest.warns(UserWarning, match="mask_fcn_logits.weight"):
        load_plain_weights(mask_rcnn("resnet18", num_classes=2), detector)


def test_a_checkpoint_of_fit_gives_its_network(tmp_path):
    network = resnet("resnet18", num_classes=7, attention=attention)
    path = tmp_path / "best.ckpt"
    content = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": content | {"accuracy.total": torch.tensor(3)}, "epoch": 2}, path)
    other = resnet("resnet18", num_classes=7, attention=attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_plain_weights(other, path) == []
    assert torch.equal(other.layer2.attention.keys.weight, network.layer2.attention.keys.weight)


def test_files_that_do_not_fit_are_refused(plain_file):
    network = resnet("resnet18", num_classes=7, attention=attention)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    changed(plain_file, lambda weights: weights.pop("layer1.0.conv1.weight"))
    with pytest.raises(ValueError, match=r"resnet18.pth must hold .* lacks 1, such as layer1.0.conv1.weight$"):
        load_plain_weights(network, plain_file)
    changed(plain_file, lambda weights: weights.update({"layer1.0.conv1.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"got layer1.0.conv1.weight of shape \(3,\) instead of \(64, 64, 3, 3\)$"):
        load_plain_weights(network, plain_file)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def test_weights_of_other_names_are_refused_before_any_is_loaded(plain_file):
    network = resnet("resnet18", num_classes=7)
    before = network.conv1.weight.clone()
    changed(plain_file, lambda weights: weights.update({"layer9.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"also has 1, such as layer9.weight$"):
        load_plain_weights(network, plain_file)
    assert torch.equal(network.conv1.weight, before)


class Harmful:
    def __reduce__(self):
        return (print, ("the pickle was run",))


def test_no_file_a_broken_one_and_one_that_would_run_code_are_refused(tmp_path, capsys):
    network = nn.Linear(2, 3)
    with pytest.raises(FileNotFoundError, match=r"none.pth must be a file of weights, got no such file"):
        load_plain_weights(network, tmp_path / "none.pth")
    for name, content in (("text", b"weights"), ("harmful", pickle.dumps(Harmful()))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} must be a file of weights, got a file that torch cannot read"):
            load_plain_weights(network, tmp_path / name)
    assert "the pickle was run" not in capsys.readouterr().out


WEIGHT, BIAS = torch.ones(3, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("content", "given"),
    [
        ([1, 2], "an object of type list"),
        ({}, "none"),
        ({"state_dict": {"other": torch.ones(2)}}, "none"),
        ({"state_dict": {1: 2}}, "none"),
        ({"state_dict": {"network.weight": 2}}, "weight of type int"),
        ({"epoch": 3}, "epoch of type int"),
        ({"weight": WEIGHT, 1: BIAS}, "1 for a name"),
        ({"weight": WEIGHT, "bias": BIAS > 0}, "bias of torch.bool"),
        ({"weight": WEIGHT, "bias": BIAS * 1j}, "bias of torch.complex64"),
        ({"weight": WEIGHT, "bias": BIAS * float("nan")}, "bias with values that are not finite"),
        ({"weight": WEIGHT.half() * float("inf"), "bias": BIAS}, "weight with values that are not finite"),
    ],
    ids=str,
)
def test_a_file_of_something_else_is_refused(tmp_path, content, given):
    torch.save(content, tmp_path / "other.pth")
    sentence = (
        rf"other\.pth must hold a dict of weights by their names, got {given}; name a state dict, or a checkpoint"
    )
    with pytest.raises(ValueError, match=sentence):
        load_plain_weights(nn.Linear(2, 3), tmp_path / "other.pth")


def test_whole_numbers_are_weights_too(tmp_path):
    network = nn.Linear(2, 3)
    torch.save({"weight": WEIGHT.long(), "bias": BIAS.to(torch.uint8)}, tmp_path / "whole.pth")
    load_plain_weights(network, tmp_path / "whole.pth")
    assert torch.equal(network.weight, WEIGHT)


# Files of safetensors.


def read_safetensors(path):
    """The format as published: the length of a header in JSON, the header, the numbers."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return {
        name: torch.frombuffer(bytearray(content[start + first : start + end]), dtype=torch.float32).reshape(shape)
        for name, (shape, (first, end)) in ((n, (e["shape"], e["data_offsets"])) for n, e in header.items())
    }


def write_safetensors(path, weights):
    header, numbers = {}, b""
    for name, weight in weights.items():
        part = weight.numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(weight.shape),
            "data_offsets": [len(numbers), len(numbers) + len(part)],
        }
        numbers += part
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def test_a_file_of_safetensors_is_read_by_their_package(plain_file, tmp_path, monkeypatch):
    weights = {n: w for n, w in torch.load(plain_file, weights_only=True).items() if w.is_floating_point()}
    write_safetensors(tmp_path / "plain.safetensors", weights)
    package, module = ModuleType("safetensors"), ModuleType("safetensors.torch")
    module.load_file = read_safetensors
    monkeypatch.setitem(sys.modules, "safetensors", package)
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    network = resnet("resnet18", num_classes=7)
    load_plain_weights(network, tmp_path / "plain.safetensors")
    for name, weight in weights.items():
        assert torch.equal(network.state_dict()[name], weight), name
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"must be a file of weights, got a file that safetensors cannot read$"):
        load_plain_weights(network, tmp_path / "broken.safetensors")


def test_without_the_package_a_file_of_safetensors_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "plain.safetensors").touch()
    with pytest.raises(
        ImportError, match=r"^a \.safetensors file must be read by the package safetensors, got none .*; call"
    ):
        load_plain_weights(resnet("resnet18", num_classes=7), tmp_path / "plain.safetensors")


def published_psmnet(*, prefix="module.", counters=True):
    """Random tensors by the names and in the order of the authors' network."""
    found = {}

    def tensor(name, *shape):
        found[f"{prefix}{name}"] = torch.randn(shape) if shape else torch.tensor(7)

    def norm(name, width):
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensor(f"{name}.{part}", width)
        if counters:
            tensor(f"{name}.num_batches_tracked")

    def block(name, narrow, wide, kernel=3, dims=2, *, transposed=False):
        tensor(f"{name}.0.weight", *((narrow, wide) if transposed else (wide, narrow)), *[kernel] * dims)
        norm(f"{name}.1", wide)

    features = "feature_extraction"
    for number, narrow in ((0, 3), (2, 32), (4, 32)):
        block(f"{features}.firstconv.{number}", narrow, 32)
    width = 32
    for layer, blocks, wide in ((1, 3, 32), (2, 16, 64), (3, 3, 128), (4, 3, 128)):
        for number in range(blocks):
            name = f"{features}.layer{layer}.{number}"
            block(f"{name}.conv1.0", width, wide)
            block(f"{name}.conv2", wide, wide)
            if number == 0 and layer in (2, 3):
                block(f"{name}.downsample", width, wide, 1)
            width = wide
    for number in range(1, 5):
        block(f"{features}.branch{number}.1", 128, 32, 1)
    block(f"{features}.lastconv.0", 320, 128)
    tensor(f"{features}.lastconv.2.weight", 32, 128, 1, 1)
    for name, narrow in (("dres0.0", 64), ("dres0.2", 32), ("dres1.0", 32), ("dres1.2", 32)):
        block(name, narrow, 32, dims=3)
    for name in ("dres2", "dres3", "dres4"):
        for part, narrow in (("conv1.0", 32), ("conv2", 64), ("conv3.0", 64), ("conv4.0", 64)):
            block(f"{name}.{part}", narrow, 64, dims=3)
        block(f"{name}.conv5", 64, 64, dims=3, transposed=True)
        block(f"{name}.conv6", 64, 32, dims=3, transposed=True)
    for name in ("classif1", "classif2", "classif3"):
        block(f"{name}.0", 32, 32, dims=3)
        tensor(f"{name}.2.weight", 1, 32, 3, 3, 3)
    return found


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("attention", [None, EfficientAttention3d])
def test_psmnets_published_weights_are_loaded(tmp_path, counters, attention):
    published = published_psmnet(counters=counters)
    assert not counters or len(published) == 514
    torch.save({"epoch": 300, "state_dict": published, "train_loss": 0.5}, tmp_path / "pretrained.tar")
    network = PSMNet(attention=attention)
    missing = load_plain_weights(network, tmp_path / "pretrained.tar")
    assert all(name.startswith("attention.") or name.endswith("num_batches_tracked") for name in missing)
    own = network.state_dict()
    for ours, theirs in (
        ("features.stem.0.weight", "feature_extraction.firstconv.0.0.weight"),
        ("features.group2.15.body.4.running_var", "feature_extraction.layer2.15.conv2.1.running_var"),
        ("features.branches.0.0.weight", "feature_extraction.branch1.1.0.weight"),
        ("entry.0.weight", "dres0.0.0.weight"),
        ("residual.0.weight", "dres1.0.0.weight"),
        ("hourglasses.1.down1.0.weight", "dres3.conv1.0.0.weight"),
        ("hourglasses.2.up1.0.weight", "dres4.conv6.0.weight"),
        ("heads.2.3.weight", "classif3.2.weight"),
    ):
        assert torch.equal(own[ours], published[f"module.{theirs}"]), ours
    fusion, theirs = own["features.fusion.0.weight"], published["module.feature_extraction.lastconv.0.0.weight"]
    assert torch.equal(fusion[:, :192], theirs[:, :192])
    for branch in range(4):
        there = 192 + 32 * (3 - branch)
        assert torch.equal(fusion[:, 192 + 32 * branch :][:, :32], theirs[:, there : there + 32])


def test_published_weights_of_another_form_are_refused(tmp_path):
    published = published_psmnet(prefix="")
    published.popitem()
    torch.save(published, tmp_path / "short.tar")
    with pytest.raises(ValueError, match=r"got 513 of the published PSMNet for 514 of it; load them into a PSMNet"):
        load_plain_weights(PSMNet(), tmp_path / "short.tar")
    published = published_psmnet() | {"module.dres0.0.0.weight": torch.zeros(32, 64, 3, 3, 1)}
    torch.save(published, tmp_path / "other.tar")
    with pytest.raises(ValueError, match=r"got entry\.0\.weight of shape \(32, 64, 3, 3, 1\) instead of"):
        load_plain_weights(PSMNet(), tmp_path / "other.tar")
