"""What a test of a stereo network leaves in its run's folder, and what it prints:

statistics.json    the scores by name, of the network and of the trivial answers; null where there is none
comparison.png     the first frame: left image, truth, prediction and error
"""

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from lineara.runs.files import save_figure, write_text
from lineara.tasks.stereo_depth.metrics import Protocol, StereoScores
from lineara.viz import disparity_comparison

NETWORK = "network"
_SHARES = {"over_1px": "> 1 px", "over_3px": "> 3 px", "d1": "D1"}
_OF_FRAMES = "_per_image"


class TestReport:
    """Collects, frame by frame, what is beside the network's own scores: a picture, and the scores of trivial answers.

    Args:
        run_dir: folder of the run.
        protocol: by which the frames are cut and measured.
        max_disparity: in pixels.
        trivial_answers: by their names, each (frames, height, width) in the order of the frames: what could be said
            without any network.
    """

    __test__ = False  # no test of pytest's

    def __init__(
        self, run_dir: Path | str, protocol: Protocol, max_disparity: int, trivial_answers: Mapping[str, Tensor]
    ) -> None:
        self.run_dir = Path(run_dir)
        self.protocol = protocol
        self.max_disparity = max_disparity
        self.trivial_answers = trivial_answers
        self._scores = {name: StereoScores(protocol.name, max_disparity) for name in trivial_answers}
        self._frames = 0
        self._picture: Path | None = None

    def add(self, batch: Mapping[str, Any], prediction: Tensor, *, image: Tensor) -> None:
        """Take a batch of frames.

        Args:
            batch: disparity, valid and name, cut as the protocol demands.
            prediction: (batch, height, width), for the same part.
            image: (3, height, width), the first left image in colours from 0 to 1.
        """
        if self._picture is None:
            self._picture = self._draw(batch["disparity"][0], batch["valid"][0], prediction[0], image)
        names = batch["name"]
        for name, scores in self._scores.items():
            disparity = batch["disparity"].cpu()
            answer = self.trivial_answers[name][self._frames : self._frames + len(names)].cpu()
            scores.update(self.protocol.cut(answer).to(disparity), disparity, batch["valid"].cpu(), names)
        self._frames += len(names)

    def finish(self, scores: Mapping[str, float]) -> str:
        """Write the statistics; returns the table to print, and where the files are.

        Args:
            scores: of the network, as `StereoScores.compute` gives them.
        """
        trivial = {name: scored.compute() for name, scored in self._scores.items()}
        path = write_statistics(
            self.run_dir, scores, trivial, protocol=self.protocol.name, max_disparity=self.max_disparity
        )
        table = scores_table({NETWORK: scores, **trivial}, protocol=self.protocol.name)
        files = [f"statistics: {path}", *([f"picture: {self._picture}"] if self._picture else [])]
        return "\n".join([table, *files])

    def _draw(self, disparity: Tensor, valid: Tensor, prediction: Tensor, image: Tensor) -> Path:
        counted = self.protocol.counted(disparity, valid, max_disparity=self.max_disparity)
        path = self.run_dir / "comparison.png"
        save_figure(disparity_comparison(image, disparity, counted, prediction.float()), path)
        return path


def scores_table(scores: Mapping[str, Mapping[str, float]], *, protocol: str) -> str:
    """The scores of several answers to the same frames, a line each.

    Args:
        scores: by what gave the answers; each with the names of `StereoScores.compute`, of which any may be missing.
        protocol: by which they were measured.
    """
    lines = {
        title: values
        for name, scored in scores.items()
        for title, values in ((name, scored), (f"{name}, mean of frames", _of_frames(scored)))
        if "epe" in values
    }
    first = next(iter(scores.values()))
    frames, without = int(first["frames"]), int(first["frames_without_valid_pixels"])
    measured = f"{frames:,} frame{'' if frames == 1 else 's'}, protocol {protocol}"
    measured += f", {without:,} without valid pixels left out" if without else ""
    beyond = first.get("beyond_max_disparity", 0.0)
    measured += f", {beyond:.1%} of the truths left out, which max_disparity does not reach" if beyond > 0 else ""
    width = max(map(len, lines))
    rows = [f"{'':{width}}    EPE px  " + "  ".join(f"{title:>8}" for title in _SHARES.values())]
    for title, values in lines.items():
        shares = "  ".join(_percent(values.get(name)) for name in _SHARES)
        rows.append(f"{title:{width}}  {_pixels(values['epe'])}  {shares}")
    return "\n".join([measured, *rows])


def write_statistics(
    run_dir: Path | str,
    scores: Mapping[str, float],
    trivial: Mapping[str, Mapping[str, float]],
    *,
    protocol: str,
    max_disparity: int,
) -> Path:
    """Write statistics.json, whole or not at all.

    Args:
        run_dir: folder of the run.
        scores: of the network.
        trivial: of the trivial answers, by their names.
        protocol, max_disparity: by which they were measured.

    Returns:
        The file's path.
    """
    content: dict[str, object] = {"protocol": protocol, "max_disparity": max_disparity, **_written(scores)}
    if trivial:
        content["trivial_answers"] = {name: _written(values) for name, values in trivial.items()}
    path = Path(run_dir) / "statistics.json"
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def _of_frames(scores: Mapping[str, float]) -> dict[str, float]:
    return {name.removesuffix(_OF_FRAMES): value for name, value in scores.items() if name.endswith(_OF_FRAMES)}


def _written(scores: Mapping[str, float]) -> dict[str, float | int | None]:
    """As JSON has it: counts whole, and null for what is not a number."""
    return {
        name: None if not isfinite(value) else int(value) if name.startswith("frames") else value
        for name, value in scores.items()
    }


def _pixels(value: float) -> str:
    return f"{value:>8.3f}" if isfinite(value) else f"{'-':>8}"


def _percent(value: float | None) -> str:
    return f"{'-':>8}" if value is None or not isfinite(value) else f"{100 * value:>6.2f} %"
