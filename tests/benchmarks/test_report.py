import pytest
from attention.report import attention_report, table
from attention.shapes import PAPER_COUNTS, shape_of

LARGE, SMALL = shape_of(32, 32768, 64), shape_of(32, 512, 64)


@pytest.fixture
def rows(row):
    return [
        row(shape=LARGE, seconds=1e-3, fraction_of_copy=0.9, peak_bytes=LARGE.elements * 6),
        row(shape=SMALL, seconds=1e-5),
        row("eager", LARGE, seconds=3e-3, fraction_of_copy=0.3),
        row("eager", SMALL, seconds=0.95e-5),
        row("compile", SMALL, seconds=0.5e-5, pass_name="backward"),
        row(shape=SMALL, pass_name="backward", seconds=1e-5),
        row("sdpa-flash", SMALL, seconds=2e-5),
        row("sdpa-flash", LARGE, seconds=0.25),
        row("linformer", LARGE, seconds=None),
        row("linformer", SMALL, seconds=None, status="not run: a | b"),
    ]


def sections(report):
    parts = report.split("\n### ")
    return {part.split("\n")[0]: part for part in parts}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_hardware_versions_commit_and_what_was_picked_are_said(rows):
    report = attention_report(rows)
    assert "## A GPU, 2 threads, bfloat16, sources c0de" in report
    assert "- 2026-01-31, commit 0123abc: 8 measurements; the copy: 4,000.0 GB/s." in report
    assert "- Python 3, torch 2." in report
    assert "impl='auto')`, which picked triton." in report


def test_targets_are_judged_on_a_gpu_only(row, rows):
    report = sections(attention_report(rows))
    assert "| forward reaches 85 % of the copy from 64 Mi elements on | 90.0% | met |" in report["Targets"]
    assert "Targets" not in sections(attention_report([row(device="cpu")]))


def test_fractions_are_of_large_shapes_or_of_the_largest(rows):
    report = sections(attention_report(rows))
    part = report["Fraction of the copy, shapes of at least 64 Mi elements"]
    assert part.splitlines()[2:] == [
        "| shape | pass | lineara | eager |",
        "| --- | --: | --: | --: |",
        "| 4 x 8 x 32,768 x 64 | forward | 90% | 30% |",
    ]
    assert "Fraction of the copy, the largest shape" in sections(attention_report(rows[1:2]))


def test_speed_against_dot_product_attention_and_where_it_begins(rows):
    part = sections(attention_report(rows))["Against dot-product attention"]
    assert "| 4 x 8 x 512 x 64 | forward | 0.0100 | 0.0200 | sdpa-flash | 2 x |" in part
    assert "| 4 x 8 x 32,768 x 64 | forward | 1.00 | 250 | sdpa-flash | 250 x |" in part
    assert "- 32 heads of 64, forward: faster than dot-product attention from 512 positions on." in part


def test_the_best_of_eager_and_compiled_and_the_spread_decide(rows):
    part = sections(attention_report(rows))["Against plain and compiled PyTorch"]
    verdicts = {tuple(cells(line)[:2]): cells(line)[4:] for line in part.splitlines()[4:] if line}
    assert verdicts["4 x 8 x 32,768 x 64", "forward"] == ["eager", "3.00 x", "not slower"]
    assert verdicts["4 x 8 x 512 x 64", "forward"] == ["eager", "0.95 x", "slower, within the spread"]
    assert verdicts["4 x 8 x 512 x 64", "backward"] == ["compile", "0.50 x", "slower"]


def test_peak_memory_is_held_against_what_nobody_can_do_without(rows):
    part = sections(attention_report(rows))["Peak memory"]
    least = LARGE.least_memory("forward", 2)
    ratio = (LARGE.elements * 6 + LARGE.inputs_bytes("forward", 2)) / least
    assert f"| 4 x 8 x 32,768 x 64 | forward | {least / 1e6:,.1f} | {ratio:.2f} |" in part


def test_the_papers_places_are_counted_and_measured_where_they_fit(row):
    image, volume = PAPER_COUNTS
    rows = [row(shape=image.shape, peak_bytes=2_100_000), row("sdpa-math", image.shape, seconds=1.0, peak_bytes=10**9)]
    part = sections(attention_report(rows))["The paper's two places"]
    assert f"| {image.place} | 16.8 MB against 1.09 GB | 1.07 GB | 2.10 MB, 1.00 ms | 1.00 GB, 1000 ms |" in part
    assert f"| {volume.place} | 796 MB against 9.68 TB | 9.67 TB | not measured | not measured |" in part


def test_all_times_have_their_spread(rows):
    part = sections(attention_report(rows))["All times"]
    assert "| 4 x 8 x 32,768 x 64 | lineara | 1.00 (0.900-1.10) | 7 | 0.500 | 90% | 1.0e-03 |" in part
    assert "| 4 x 8 x 512 x 64 | sdpa-flash | 0.0200 (0.0180-0.0220) | 7 | 0.0100 | another formula | 1.0e-03 |" in part


def test_every_reason_is_told_once(row, rows):
    part = sections(attention_report([*rows, row("linformer", seconds=None)]))["Not run"]
    assert part.splitlines()[4:] == ["| linformer | it is missing | 2 |", "| linformer | a / b | 1 |"]


def test_machines_dtypes_and_sources_have_sections_of_their_own(row):
    other_sources = row("eager", seconds=9.0, code="abcd")
    rows = [row(), row(dtype="float16"), row(device="cpu", machine="A CPU", dtype="float32"), other_sources]
    report = attention_report(rows)
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        "## A CPU, float32, sources c0de",
        "## A GPU, 2 threads, bfloat16, sources abcd",
        "## A GPU, 2 threads, bfloat16, sources c0de",
        "## A GPU, 2 threads, float16, sources c0de",
    ]
    assert "Against plain" not in report  # what other sources measured is not compared with


def test_nothing_measured_is_a_report_of_reasons_and_no_rows_are_refused(row):
    report = attention_report([row(seconds=None)])
    assert "it is missing" in report
    assert "All times" not in report
    with pytest.raises(ValueError, match="rows must hold at least one case, got none"):
        attention_report([])


def test_a_table_has_as_many_rules_as_columns():
    assert table(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "| --- | --: |", "| 1 | 2 |"]
