import pytest
from attention.shapes import shape_of
from attention.targets import Measurements, crossover, large, verdicts

LARGE = shape_of(32, 32768, 64)


def judged(*rows):
    """The verdicts by the first words of their targets."""
    return {one.target.split(",")[0]: (one.verdict, one.found) for one in verdicts(Measurements(rows))}


def test_without_measurements_nothing_is_judged(row):
    assert {verdict for verdict, _ in judged().values()} == {"not measured"}
    assert {verdict for verdict, _ in judged(row(seconds=None)).values()} == {"not measured"}
    assert len(judged()) == 7


@pytest.mark.parametrize(("pass_name", "least"), [("forward", 0.85), ("backward", 0.75)])
def test_the_lowest_fraction_of_all_large_shapes_counts(row, pass_name, least):
    target = f"{pass_name} reaches {least:.0%} of the copy from 64 Mi elements on".replace("%", " %")
    good = row(shape=LARGE, pass_name=pass_name, fraction_of_copy=0.99)
    enough = row(shape=shape_of(8, 65536, 128), pass_name=pass_name, fraction_of_copy=least)
    too_low = row(shape=shape_of(1, 262144, 256), pass_name=pass_name, fraction_of_copy=least - 0.001)
    small = row(shape=shape_of(1, 262143, 256), pass_name=pass_name, fraction_of_copy=0.1)
    assert judged(good, enough, small)[target][0] == "met"
    verdict, found = judged(good, enough, too_low)[target]
    assert verdict == "missed"
    assert found == f"{least - 0.001:.1%}, the lowest of 3 shapes (1 x 1 x 262,144 x 256)"


@pytest.mark.parametrize(("fraction", "verdict"), [(0.6, "met"), (0.59, "missed")])
def test_one_wide_head_is_judged_forward(row, fraction, verdict):
    shape = shape_of(1, 65536, 256)
    target = "one wide head (1 x 1 x 65"
    assert judged(row(shape=shape, fraction_of_copy=fraction))[target][0] == verdict
    assert judged(row(shape=shape, pass_name="backward", fraction_of_copy=fraction))[target][0] == "not measured"


@pytest.mark.parametrize(("positions", "least"), [(512, 1), (4096, 15), (16384, 60)])
def test_the_best_dot_product_attention_is_what_ours_is_held_against(row, positions, least):
    shape = shape_of(32, positions, 64)
    target = f"{least} x the best dot-product attention"
    ours, slow = row(shape=shape, seconds=1e-3), row("sdpa-math", shape, seconds=1.0)
    found = verdicts(Measurements([ours, slow, row("sdpa-flash", shape, seconds=least * 1e-3)]))
    [one] = [one for one in found if one.target.startswith(target)]
    assert (one.verdict, one.found) == ("met", f"{least} x sdpa-flash")
    found = verdicts(Measurements([ours, slow, row("sdpa-cudnn", shape, seconds=least * 0.98e-3)]))
    [one] = [one for one in found if one.target.startswith(target)]
    assert (one.verdict, one.found) == ("missed", f"{least * 0.98:.3g} x sdpa-cudnn")


def test_ours_must_not_be_slower_than_any_of_eager_and_compiled_from_1024_positions_on(row):
    target = "never slower than the best of eager and compiled from 1"
    long, longer, short = (shape_of(8, positions, 64) for positions in (1024, 2048, 1023))
    rows = [row(shape=long), row("eager", long, seconds=2e-3), row("compile-map", long, seconds=1.5e-3)]
    rows += [row(shape=short), row("eager", short, seconds=1e-6)]
    assert judged(*rows)[target] == (
        "met",
        "at worst 1.50 x compile-map (1 x 8 x 1,024 x 64, forward); slower in 0 of 1",
    )
    rows += [row(shape=longer, pass_name="backward"), row("eager-map", longer, "backward", seconds=0.5e-3)]
    assert judged(*rows)[target] == (
        "missed",
        "at worst 0.50 x eager-map (1 x 8 x 2,048 x 64, backward); slower in 1 of 2",
    )


def test_large_is_at_least_64_mi_elements(row):
    assert large([row(shape=LARGE), row(shape=shape_of(32, 32767, 64))]) == [row(shape=LARGE)]


def test_the_crossover_is_the_length_from_which_on_all_are_faster(row):
    shapes = [shape_of(8, positions, 64) for positions in (256, 512, 1024, 2048)]

    def at(*ratios):
        rows = [row(shape=shape) for shape in shapes]
        rows += [row("sdpa-flash", shape, seconds=1e-3 * ratio) for shape, ratio in zip(shapes, ratios) if ratio]
        return crossover(Measurements(rows), shapes[::-1], "forward")

    assert at(0.5, 2, 3, 4) == 512
    assert at(2, 0.5, 3, 4) == 1024
    assert at(0.5, 2, 3, 0.9) is None
    assert at(0.5, None, 3, None) == 1024
