"""Adapters of other packages, against packages of the same names and signatures that the tests put in their place."""

import sys
from types import ModuleType

import pytest
import torch
from attention import peers
from attention.contenders import SAME, chosen
from attention.inputs import check, expected_results, prepare, random_inputs
from attention.shapes import Shape
from torch import nn

from lineara.measure.cost import plain

SHAPE = Shape(2, 3, 35, 5, 5)
BOTH = "forward + backward"


class FastAttention(nn.Module):
    def __init__(self, dim_heads, no_projection=False):
        super().__init__()
        assert dim_heads == SHAPE.key_dim
        self.factor = 1.0 if no_projection else 2.0

    def forward(self, q, k, v):
        return self.factor * plain(q, k, v)


class Tokens(nn.Module):
    """A layer over (batch, positions, channels), with a weight."""

    def __init__(self, dim, seq_len=None, *, heads, dim_head):
        super().__init__()
        assert (dim, heads, dim_head) == (15, 3, 5)
        assert seq_len in (None, 35)
        self.project = nn.Linear(dim, dim)

    def forward(self, x):
        assert x.shape == (2, 35, 15)
        return self.project(x)


class LiteMLA(nn.Module):
    def __init__(self, in_channels, out_channels, heads, dim):
        super().__init__()
        assert (in_channels, out_channels, heads, dim) == (15, 15, 3, 5)
        self.project = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        assert x.shape == (2, 15, 5, 7)
        return self.project(x)


PLACES = {
    "flash_bla.ops.simple_la.fused": {"simple_la": lambda q, k, v, scale=None: q @ (k.mT @ v)},
    "linear_attention_transformer.linear_attention_transformer": {
        "linear_attn": lambda q, k, v, kv_mask=None: plain(q, k, v) * q.shape[-1] ** -0.5
    },
    "performer_pytorch": {"FastAttention": FastAttention},
    "linformer": {"LinformerSelfAttention": Tokens},
    "nystrom_attention": {"NystromAttention": Tokens},
    "timm.models.efficientvit_mit": {"LiteMLA": LiteMLA},
}
NAMES = ("flash-bla", "linear-attention-transformer", "performer-efficient", "performer", "linformer", "nystrom")


def install(monkeypatch, name, contents):
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:length]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(sys.modules[name]).update(contents)


@pytest.mark.parametrize("name", [*NAMES, "timm-lite-mla"])
def test_adapters_call_what_the_packages_have(monkeypatch, name):
    for place, contents in PLACES.items():
        install(monkeypatch, place, contents)
    [contender] = chosen([name])
    inputs = random_inputs(SHAPE, torch.float64, "cpu")
    call = contender.make(SHAPE, torch.float64, "cpu")
    error = check(prepare(contender, call, SHAPE, [inputs], backward=True), expected_results(inputs, BOTH), BOTH)
    assert (error is None) == (contender.formula != SAME)
    assert name not in ("linear-attention-transformer", "performer-efficient") or error < 1e-12


def test_the_older_name_of_a_package_is_found_too(monkeypatch):
    older = object()
    monkeypatch.setitem(sys.modules, "flash_bla", None)
    install(monkeypatch, "fbi_la.ops.simple_la.attention", {"simple_la": older})
    assert peers.flash_bidirectional(SHAPE, torch.float32, "cpu") is older


def test_a_missing_package_is_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "linformer", None)
    with pytest.raises(ModuleNotFoundError, match=r"^linformer is not installed$"):
        peers.linformer(SHAPE, torch.float32, "cpu")


def test_what_a_package_lacks_is_named_as_it_says_it(tmp_path, monkeypatch):
    (tmp_path / "nystrom_attention.py").write_text("import no_such_einops\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nystrom_attention", raising=False)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_einops'"):
        peers.nystrom(SHAPE, torch.float32, "cpu")
