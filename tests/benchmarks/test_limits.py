import pytest
from attention.limits import free_bytes, predicted_seconds
from attention.shapes import shape_of


def test_the_longest_shorter_length_predicts_with_its_square_and_in_proportion_to_the_width(row):
    rows = [
        row("sdpa-flash", shape_of(8, positions, 64), seconds=seconds)
        for positions, seconds in ((256, 9.0), (512, 1.0))
    ]
    rows += [row("sdpa-flash", shape_of(8, 1024, 64), seconds=None), row("sdpa-flash", shape_of(8, 4096, 64))]
    assert predicted_seconds(row("sdpa-flash", shape_of(8, 1024, 64)), rows) == pytest.approx(4.0)
    assert predicted_seconds(row("sdpa-flash", shape_of(32, 1024, 128)), rows) == pytest.approx(4.0 * 4 * 2)


@pytest.mark.parametrize("change", [{"contender": "sdpa-math"}, {"pass_name": "backward"}, {"dtype": "float16"}])
def test_nothing_is_predicted_from_other_contenders_passes_or_dtypes(row, change):
    shorter = row("sdpa-flash", shape_of(8, 512, 64))
    longer = {"contender": "sdpa-flash", "shape": shape_of(8, 1024, 64)}
    assert predicted_seconds(row(**longer), [shorter]) is not None
    assert predicted_seconds(row(**longer | change), [shorter]) is None


def test_some_memory_is_free():
    assert free_bytes("cpu") > 2**20
