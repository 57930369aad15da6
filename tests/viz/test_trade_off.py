from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lineara.viz.trade_off import _spread, trade_off


def row(recipe, score, seconds, peak_bytes, spread: float | None = 0.01):
    return {"recipe": recipe, "score": score, "spread": spread, "seconds": seconds, "peak_bytes": peak_bytes, "n": 3}


ROWS = [
    row("listops_softmax", 0.371, 0.090, 2.1e9),
    row("listops_efficient", 0.369, 0.021, 0.4e9, spread=None),
    row("listops_multiresolution", 0.43, 0.027, 0.5e9),
]


def drawn(figure) -> Any:
    """The panels after the layout."""
    FigureCanvasAgg(figure).draw()
    return figure.axes


def test_scores_stand_against_time_and_memory_with_error_bars(tmp_path):
    figure = trade_off(ROWS, score_label="test/accuracy (higher is better)")
    time, memory = drawn(figure)
    assert time.get_ylabel() == "test/accuracy (higher is better)"
    assert [axes.get_xlabel() for axes in (time, memory)] == [
        "time per training step (ms)",
        "peak memory of the training (MB)",
    ]
    for axes, costs in ((time, [90, 21, 27]), (memory, [2100, 400, 500])):
        points = [container.lines[0] for container in axes.containers]
        assert [float(point.get_xdata()[0]) for point in points] == pytest.approx(costs)
        assert [float(point.get_ydata()[0]) for point in points] == [entry["score"] for entry in ROWS]
        bars = [container.lines[2] for container in axes.containers]
        assert [len(bar) for bar in bars] == [1, 0, 1]
        [segment] = bars[0][0].get_segments()
        assert [height for _, height in segment] == pytest.approx([0.361, 0.381])
        left, right = axes.get_xlim()
        assert left == 0
        assert right > max(costs)
    figure.savefig(tmp_path / "trade_off.png")
    assert (tmp_path / "trade_off.png").stat().st_size < 300_000


@pytest.mark.parametrize(
    "scores", [[0.371] * 12, [0.1] + [0.9] * 6, [0.1] * 6 + [0.9], [i / 10 for i in range(5)], [0.0] * 2, [0.5]]
)
def test_names_overlap_neither_each_other_nor_the_edge(scores):
    figure = trade_off([row(f"listops_{i}", score, 0.1, 1e9) for i, score in enumerate(scores)], score_label="score")
    _, memory = drawn(figure)
    boxes = [text.get_window_extent() for text in memory.texts]
    assert len(boxes) == len(scores)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
        assert box.x0 > memory.bbox.x1


def test_names_stand_in_the_order_of_the_scores_beside_the_mark_of_their_row():
    time, memory = drawn(trade_off(ROWS, score_label="score"))
    heights = {text.get_text(): text.xy[1] for text in memory.texts}
    assert sorted(heights, key=heights.__getitem__) == [
        "listops_efficient",
        "listops_softmax",
        "listops_multiresolution",
    ]
    marks = {
        float(line.get_ydata()[0]): (line.get_marker(), line.get_color())
        for line in memory.lines
        if line.get_transform() == memory.transAxes
    }
    for axes in (time, memory):
        for entry, container in zip(ROWS, axes.containers):
            point = container.lines[0]
            assert marks[heights[entry["recipe"]]] == (point.get_marker(), point.get_color())
    assert len({marker for marker, _ in marks.values()}) == 3  # told apart in grey


def test_names_are_moved_as_little_as_the_gap_asks():
    assert _spread([0.2, 0.5, 0.9], 0.1) == pytest.approx([0.2, 0.5, 0.9])
    assert _spread([0.2, 0.25, 0.9], 0.1) == pytest.approx([0.175, 0.275, 0.9])
    assert _spread([0.02, 0.03, 0.9], 0.1) == pytest.approx([0.0, 0.1, 0.9])
    assert _spread([0.2, 0.95, 0.96], 0.1) == pytest.approx([0.2, 0.9, 1.0])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ([], "rows must hold at least one network, got none"),
        ([{"recipe": "a", "score": 1, "spread": None}], "got one without seconds, peak_bytes"),
        (ROWS[:1] * 2, "got two of listops_softmax"),
    ],
)
def test_wrong_rows_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        trade_off(wrong, score_label="score")
