import pytest
from attention.shapes import PAPER_COUNTS, PASSES, Shape, preset_shapes, shape_of


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        Shape(2, 0, 5, 7, 7)


def test_least_traffic_is_4_7_and_11_tensors_where_keys_and_values_are_as_wide():
    shape = Shape(2, 3, 5, 7, 7)
    assert [shape.least_traffic(name, 2) for name in PASSES] == [2 * 3 * 5 * 7 * 2 * tensors for tensors in (4, 7, 11)]


def test_least_traffic_counts_every_tensor_by_its_own_width():
    shape = Shape(1, 1, 5, 7, 11)
    query_key, value = 5 * 7, 5 * 11
    assert shape.least_traffic("forward", 4) == 4 * (2 * query_key + 2 * value)
    # Read: query, key, value and the gradient of the output; written: three gradients.
    assert shape.least_traffic("backward", 4) == 4 * (4 * query_key + 3 * value)


def test_least_memory_is_inputs_outputs_gradients_and_contexts():
    shape = Shape(2, 3, 5, 7, 11)
    queries, values, contexts = 2 * 3 * 5 * 7 * 2, 2 * 3 * 5 * 11 * 2, 2 * 3 * 7 * (11 + 2) * 4
    assert shape.least_memory("forward", 2) == 2 * queries + 2 * values + contexts
    assert shape.least_memory("forward + backward", 2) == 4 * queries + 4 * values + 2 * contexts
    assert shape.inputs_bytes("forward", 2) == 2 * queries + values


def test_the_papers_places_are_counted_as_the_paper_counts_them():
    image, volume = PAPER_COUNTS
    assert (image.positions, image.channels) == (128 * 128, 64)
    assert image.efficient_bytes == pytest.approx(16.8e6, rel=0.01)
    assert image.map_bytes == pytest.approx(1.07e9, rel=0.01)
    assert volume.efficient_bytes == pytest.approx(796e6, rel=0.001)
    assert volume.non_local_bytes == pytest.approx(9.68e12, rel=0.001)
    assert (volume.shape.key_dim, volume.shape.value_dim) == (16, 32)


@pytest.mark.parametrize("all_heads", [1, 8, 32, 256])
def test_heads_are_spread_over_items(all_heads):
    assert shape_of(all_heads, 5, 7).all_heads == all_heads


@pytest.mark.parametrize("preset", ["quick", "full", "targets"])
def test_presets_name_every_shape_once_and_shorter_lengths_first(preset):
    shapes = preset_shapes(preset, "cuda")
    assert len(set(shapes)) == len(shapes)
    named = [shape.positions for shape in shapes if shape.all_heads == 32 and shape.key_dim == 64]
    start = named[: named.index(max(named[:5])) + 1]
    assert start == sorted(start)


def test_the_full_preset_covers_what_the_targets_and_the_studies_name():
    full = preset_shapes("full", "cuda")
    assert full[: len(preset_shapes("targets", "cuda"))] == preset_shapes("targets", "cuda")
    assert {shape.all_heads for shape in full} >= {1, 8, 32, 256}
    assert {shape.key_dim for shape in full} >= {32, 64, 128, 256}
    assert {256, 1048576} <= {shape.positions for shape in full}
    assert {shape_of(1, 65536, 256), shape_of(32, 512, 64), shape_of(32, 16384, 64)} <= set(full)
    assert sum(shape.elements >= 64 * 2**20 for shape in full) >= 6


def test_a_preset_that_the_device_does_not_have_is_refused():
    with pytest.raises(ValueError, match="preset must be one of quick, full on cpu, got 'targets'"):
        preset_shapes("targets", "cpu")
