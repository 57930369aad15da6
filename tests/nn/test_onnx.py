"""Layers exported to ONNX once run in onnxruntime at every length and size."""

import pytest
import torch
from torch.export import Dim

from lineara.nn import EfficientAttention, EfficientAttention2d, MultiresolutionAttention, MultiresolutionAttention2d

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

N = Dim("n", min=2, max=1 << 20)
HEIGHT, WIDTH = Dim("height", min=2, max=1 << 10), Dim("width", min=2, max=1 << 10)
SEQUENCES = ((12, 16), {1: N}, [(5, 16), (64, 16), (40_000, 16)])
MAPS = ((16, 9, 12), {2: HEIGHT, 3: WIDTH}, [(16, 5, 2), (16, 8, 8), (16, 200, 200)])
LAYERS = {
    EfficientAttention: SEQUENCES,
    MultiresolutionAttention: SEQUENCES,
    EfficientAttention2d: MAPS,
    MultiresolutionAttention2d: MAPS,
}


# What the exporter calls and torch has deprecated.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_one_graph_of_standard_operators_serves_every_size(kind, tmp_path):
    torch.manual_seed(0)
    example, dynamic, shapes = LAYERS[kind]
    layer = kind(16, 4, key_dim=8).eval()
    program = torch.onnx.export(
        layer, (torch.randn(1, *example),), dynamic_shapes=(dynamic,), dynamo=True, verbose=False
    )
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    program.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    for shape in shapes:
        x = torch.randn(1, *shape)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(output), layer(x), rtol=1e-5, atol=1e-5)
