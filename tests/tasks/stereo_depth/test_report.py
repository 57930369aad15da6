"""What a test leaves behind: a table, statistics and a picture."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from lineara.tasks.stereo_depth.metrics import PROTOCOLS, StereoScores
from lineara.tasks.stereo_depth.report import TestReport, scores_table, write_statistics

HEIGHT, WIDTH = 7, 11
SCORES = {
    **{"epe": 1.23456, "over_1px": 0.25, "over_3px": 0.125, "d1": 0.0625},
    **{"epe_per_image": 2.34567, "over_1px_per_image": 0.5, "over_3px_per_image": 0.25, "d1_per_image": 0.03125},
    **{"frames": 1203.0, "frames_without_valid_pixels": 3.0},
}


def frames(number, *, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {
        "disparity": torch.rand(number, HEIGHT, WIDTH, generator=random) * 60,
        "valid": torch.rand(number, HEIGHT, WIDTH, generator=random) < 0.5,
        "name": [f"frame {seed}.{index}" for index in range(number)],
    }


def expected(prediction, batch, protocol="default"):
    scores = StereoScores(protocol, 64)
    scores.update(prediction, batch["disparity"], batch["valid"], batch["name"])
    return scores.compute()


def report(tmp_path, answers=None, protocol="default"):
    return TestReport(tmp_path, PROTOCOLS[protocol], 64, answers or {})


IMAGE = torch.zeros(3, HEIGHT, WIDTH)


def test_the_table_has_a_line_for_pixels_and_one_for_frames():
    median = {"epe": 10.0, "over_1px": 1.0, "over_3px": 0.5, "d1": 0.5}
    table = scores_table({"network": SCORES, "constant_median": median}, protocol="default")
    assert table.splitlines() == [
        "1,203 frames, protocol default, 3 without valid pixels left out",
        "                           EPE px    > 1 px    > 3 px        D1",
        "network                     1.235   25.00 %   12.50 %    6.25 %",
        "network, mean of frames     2.346   50.00 %   25.00 %    3.12 %",
        "constant_median            10.000  100.00 %   50.00 %   50.00 %",
    ]


def test_a_protocol_of_one_mean_has_one_line():
    scores = {"epe": math.nan, "over_1px": math.nan, "over_3px": math.nan, "d1": math.nan}
    table = scores_table({"network": {**scores, "frames": 1.0, "frames_without_valid_pixels": 0.0}}, protocol="psmnet")
    assert table.splitlines() == [
        "1 frame, protocol psmnet",
        "           EPE px    > 1 px    > 3 px        D1",
        "network         -         -         -         -",
    ]


def test_statistics_name_the_protocol_and_are_null_where_there_is_none(tmp_path):
    path = write_statistics(
        tmp_path, {**SCORES, "d1": math.nan}, {"constant_median": SCORES}, protocol="default", max_disparity=64
    )
    content = json.loads(path.read_text())
    assert path == tmp_path / "statistics.json"
    assert content.pop("trivial_answers") == {"constant_median": SCORES}
    assert content == {"protocol": "default", "max_disparity": 64, **SCORES, "d1": None}
    assert type(content["frames"]) is int
    write_statistics(tmp_path, SCORES, {}, protocol="default", max_disparity=64)
    assert "trivial_answers" not in json.loads(path.read_text())


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (3,)], ids=str)
def test_trivial_answers_are_measured_as_the_network_is(tmp_path, sizes):
    """They belong to the frames in their order, however these come in batches."""
    whole = frames(3)
    answers = {"low": torch.full((3, HEIGHT, WIDTH), 7.0), "other": torch.rand(3, HEIGHT, WIDTH) * 60}
    made, start = report(tmp_path, answers), 0
    for size in sizes:
        part = {name: values[start : start + size] for name, values in whole.items()}
        made.add(part, torch.zeros(size, HEIGHT, WIDTH), image=IMAGE)
        start += size
    said = made.finish(SCORES)
    content = json.loads((tmp_path / "statistics.json").read_text())["trivial_answers"]
    assert content == {name: pytest.approx(expected(answer, whole)) for name, answer in answers.items()}
    assert abs(content["low"]["epe"] - content["other"]["epe"]) > 1e-3
    assert [line.split("  ")[0] for line in said.splitlines()[2:8:2]] == ["network", "low", "other"]
    assert said.splitlines()[-2:] == [
        f"statistics: {tmp_path / 'statistics.json'}",
        f"picture: {tmp_path / 'comparison.png'}",
    ]


def test_trivial_answers_are_cut_as_the_frames_are(tmp_path):
    """The protocol takes the lower right 512 x 960 pixels; frames come cut, answers whole."""
    answer = torch.zeros(1, 519, 971)
    answer[:, 7:, 11:] = 5.0
    truth = torch.full((1, 512, 960), 9.0)
    made = report(tmp_path, {"fives": answer}, "gwcnet")
    made.add(
        {"disparity": truth, "valid": truth > 0, "name": ["a"]}, torch.zeros_like(truth), image=torch.zeros(3, 512, 960)
    )
    made.finish(SCORES)
    assert json.loads((tmp_path / "statistics.json").read_text())["trivial_answers"]["fives"]["epe"] == 4.0


def test_the_picture_is_of_the_first_frame_and_of_the_pixels_that_count(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "lineara.tasks.stereo_depth.report.disparity_comparison", lambda *words: drawn.append(words) or Figure()
    )

    class Figure:
        def savefig(self, path):
            path.write_text("a picture")

    made, first, second = report(tmp_path), frames(2), frames(1, seed=1)
    first["disparity"][0, 0] = 64.0
    first["valid"][0, 0] = True
    for batch in (first, second):
        made.add(batch, torch.full_like(batch["disparity"], 3.0).bfloat16(), image=IMAGE + len(drawn))
    [(image, truth, counted, prediction)] = drawn
    assert torch.equal(image, IMAGE)
    assert torch.equal(truth, first["disparity"][0])
    assert torch.equal(counted[1:], first["valid"][0, 1:])
    assert not counted[0].any()
    assert torch.equal(prediction, torch.full((HEIGHT, WIDTH), 3.0))
    assert (tmp_path / "comparison.png").read_text() == "a picture"


def test_the_picture_is_drawn(tmp_path):
    made = report(tmp_path)
    made.add(frames(1), torch.zeros(1, HEIGHT, WIDTH), image=IMAGE)
    with Image.open(tmp_path / "comparison.png") as picture:
        assert np.asarray(picture).std() > 0


def test_a_test_without_frames_has_no_picture(tmp_path):
    said = report(tmp_path).finish({**SCORES, "frames": 0.0})
    assert said.splitlines()[-1] == f"statistics: {tmp_path / 'statistics.json'}"
