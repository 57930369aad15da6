import numpy as np
import pytest

from lineara.viz import cost_curves

LENGTHS = (256, 1024, 4096, 16384)


def rows(attention, seconds, peak_bytes, passes=(False, True), lengths=LENGTHS):
    """Made-up costs: functions of the number of positions; twice of both for forward and backward."""
    return [
        {
            "attention": attention,
            "positions": positions,
            "backward": backward,
            "seconds": seconds(positions) * (1 + backward),
            "peak_bytes": peak_bytes(positions) * (1 + backward),
            "heads": 8,
        }
        for backward in passes
        for positions in lengths
    ]


EFFICIENT = rows("efficient", lambda n: 1e-6 * n, lambda n: 2000 * n)
SOFTMAX = rows("softmax", lambda n: 2e-8 * n**2, lambda n: 3000 * n)


def labels(axes):
    return [line.get_label() for line in axes.lines]


def slopes(axes):
    return [(text.get_text(), text.get_color()) for text in axes.texts]


def test_four_panels_show_time_and_memory_of_both_passes(tmp_path):
    figure = cost_curves(SOFTMAX + EFFICIENT[::-1])
    assert len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes] == ["forward", "forward + backward", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "time (ms)",
        "",
        "peak memory beyond the inputs (MB)",
        "",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "positions N", "positions N"]
    for index, axes in enumerate(figure.axes):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert labels(axes) == ["efficient", "dot-product"]
        factor = 1 + index % 2
        n = np.array(LENGTHS, dtype=float)
        expected = [1e-3 * n, 2e-5 * n**2] if index < 2 else [2e-3 * n, 3e-3 * n]
        for line, values in zip(axes.lines, expected):
            np.testing.assert_array_equal(line.get_xdata(), n)
            np.testing.assert_allclose(line.get_ydata(), factor * values)
    figure.savefig(tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size < 300_000


def test_legend_names_every_attention_once_in_a_fixed_order():
    others = [
        row
        for name in ("einsum", "another", "plain", "efficient-reference")
        for row in rows(name, lambda n: n, lambda n: n)
    ]
    figure = cost_curves(others + SOFTMAX + EFFICIENT)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "efficient",
        "efficient, reference",
        "efficient, plain composition",
        "efficient, einsum form",
        "dot-product",
        "another",
    ]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 6
    assert len({line.get_marker() for line in figure.axes[0].lines}) == 6


def test_an_attention_keeps_its_colour_whatever_is_drawn_beside_it():
    alone, together = cost_curves(SOFTMAX).axes[0].lines[0], cost_curves(SOFTMAX + EFFICIENT).axes[0].lines[1]
    assert alone.get_color() == together.get_color()


def test_fitted_powers_stand_beside_the_lines_in_their_colour():
    axes = cost_curves(EFFICIENT + SOFTMAX).axes
    blue, red = (line.get_color() for line in axes[0].lines)
    assert slopes(axes[0]) == slopes(axes[1]) == [("$N^{1.00}$", blue), ("$N^{2.00}$", red)]
    assert [slope for slope, _ in slopes(axes[2])] == ["$N^{1.00}$", "$N^{1.00}$"]


def test_powers_are_fitted_to_the_last_three_lengths():
    bent = rows("softmax", lambda n: max(n, 1024) ** 1.5, lambda n: n, passes=(False,))
    assert slopes(cost_curves(bent).axes[0])[0][0] == "$N^{1.50}$"


def test_powers_of_lines_that_end_together_do_not_overlap():
    close = [row for i in range(5) for row in rows(f"a{i}", lambda n: n, lambda n: n)]
    figure = cost_curves(close + SOFTMAX)
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        assert len(boxes) == 6
        for i, low in enumerate(boxes):
            assert not any(low.overlaps(high) for high in boxes[i + 1 :])


def test_a_pass_that_was_not_measured_has_no_column():
    figure = cost_curves([row for row in SOFTMAX + EFFICIENT if row["backward"]])
    assert [axes.get_title() for axes in figure.axes] == ["forward + backward", ""]


def test_lengths_left_out_end_a_line_early_and_missing_values_leave_a_gap():
    short = [row for row in SOFTMAX if row["positions"] < 4096]
    gap = [dict(row, peak_bytes=None if row["positions"] == 1024 else row["peak_bytes"]) for row in EFFICIENT]
    gap[0]["peak_bytes"] = 0
    figure = cost_curves(short + gap)
    time, memory = figure.axes[0], figure.axes[2]
    assert list(time.lines[1].get_xdata()) == [256, 1024]
    assert [text.xy[0] for text in time.texts] == pytest.approx([16384, 1024])
    assert np.isnan(memory.lines[0].get_ydata()).tolist() == [True, True, False, False]
    figure.canvas.draw()


def test_a_single_length_has_no_slope():
    figure = cost_curves(rows("efficient", lambda n: n, lambda n: n, lengths=(100,)))
    figure.canvas.draw()
    assert not figure.axes[0].texts


def test_ticks_are_the_measured_lengths_and_at_most_seven_of_them():
    figure = cost_curves(EFFICIENT)
    figure.canvas.draw()
    bottom = figure.axes[2]
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["256", "1,024", "4,096", "16,384"]
    many = cost_curves(rows("efficient", lambda n: n, lambda n: n, lengths=tuple(2**i for i in range(4, 20))))
    assert list(many.axes[2].get_xticks()) == [2**i for i in range(4, 20, 3)]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ([], "rows must hold at least one measured case, got none"),
        ([{"attention": "efficient", "positions": 5, "seconds": 1}], "got one without backward, peak_bytes"),
        (EFFICIENT[:1] * 2, r"got two of \('efficient', 256, False\); draw one setting at a time"),
    ],
)
def test_wrong_rows_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        cost_curves(wrong)
