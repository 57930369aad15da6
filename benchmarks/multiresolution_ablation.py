"""Which compression, feature map, routing and resolutions serve multiresolution attention best: ListOps, equal budget.

Every variant trains the same encoder on the same expressions with the same schedule and is tested after its last step.
A finished run is kept in the results file and not run again.

    python benchmarks/multiresolution_ablation.py [--seeds 0 1 2] [--steps 600] [--output runs/ablation/results.jsonl]
"""

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from lineara.models import SequenceClassifier
from lineara.nn import EfficientAttention, MultiresolutionAttention, SoftmaxAttention
from lineara.tasks.long_range_arena import ListOpsData, SequenceClassification

_HEADS = 4
_ROUTING: dict[str, dict[str, Any]] = {
    "top-1": {"routing": "query", "top_k": 1},
    "soft": {"routing": "query", "top_k": _HEADS},
    "none": {"routing": None},
}
_RESOLUTIONS = {"8 4 2 1": (8, 4, 2, 1), "1 1 1 1": (1, 1, 1, 1), "4 4 1 1": (4, 4, 1, 1), "27 9 3 1": (27, 9, 3, 1)}
_DEFAULT_RESOLUTIONS = "8 4 2 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("runs/ablation/results.jsonl"))
    parser.add_argument("--only", nargs="+", help="names of variants; default all")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found = _read(options.output)
    for seed, (name, attention) in product(options.seeds, variants()):
        if (name, seed, options.steps) in found or (options.only and name not in options.only):
            continue
        row = {"variant": name, "seed": seed, "steps": options.steps, **_train(attention, seed, options.steps)}
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        found[name, seed, options.steps] = row
        print(row, file=sys.stderr, flush=True)
    rows = [row for (_, seed, steps), row in found.items() if steps == options.steps and seed in options.seeds]
    print(table(rows))


def variants() -> Iterator[tuple[str, Callable[[int], torch.nn.Module]]]:
    """Name and attention layer of every variant: the baselines, the full grid, and other resolutions."""
    yield "softmax attention", lambda dim: SoftmaxAttention(dim, _HEADS)
    yield "efficient attention", lambda dim: EfficientAttention(dim, _HEADS)
    for compression, feature_map, routing in product(("mean", "max", "conv"), ("softmax", "relu", "elu"), _ROUTING):
        yield _variant(compression, feature_map, routing, _DEFAULT_RESOLUTIONS)
    for resolutions in _RESOLUTIONS:
        if resolutions != _DEFAULT_RESOLUTIONS:
            yield _variant("mean", "softmax", "top-1", resolutions)


def _variant(
    compression: str, feature_map: str, routing: str, resolutions: str
) -> tuple[str, Callable[[int], torch.nn.Module]]:
    def attention(dim: int) -> torch.nn.Module:
        return MultiresolutionAttention(
            dim,
            _HEADS,
            resolutions=_RESOLUTIONS[resolutions],
            compression=compression,
            feature_map=feature_map,
            **_ROUTING[routing],
        )

    return f"{compression}, {feature_map}, {routing}, {resolutions}", attention


def _train(attention: Callable[[int], torch.nn.Module], seed: int, steps: int) -> dict[str, float]:
    seed_everything(seed, verbose=False)
    network = SequenceClassifier(16, 10, 60, attention=attention)
    task = SequenceClassification(network, peak_lr=2e-3, warmup_steps=max(steps // 10, 2))
    data = ListOpsData(num_train=20_000, num_val=1_000, num_test=2_000, min_len=10, max_len=60, batch_size=64)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    start = time.perf_counter()
    trainer.fit(task, datamodule=data)
    seconds = time.perf_counter() - start
    (result,) = trainer.test(task, datamodule=data, verbose=False)
    return {"seconds": seconds, **{name.removeprefix("test/"): value for name, value in result.items()}}


def table(rows: list[dict[str, Any]]) -> str:
    """Every variant, by its loss; then every option of the full grid, averaged over all others."""
    by_variant: dict[str, list[dict[str, Any]]] = {}
    by_option: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
        parts = row["variant"].split(", ")
        if parts[-1] == _DEFAULT_RESOLUTIONS:
            for factor, option in zip(("compression", "feature map", "routing"), parts):
                by_option.setdefault((factor, option), []).append(row)
    lines = ["| variant | test loss | test accuracy | seeds |", "|---|---|---|---|"]
    ranked = sorted(by_variant.items(), key=lambda item: statistics.fmean(row["loss"] for row in item[1]))
    lines += [
        f"| {name} | {_cell(found, 'loss')} | {_cell(found, 'accuracy')} | {len(found)} |" for name, found in ranked
    ]
    lines += ["", "| option | over | test loss | test accuracy | runs |", "|---|---|---|---|---|"]
    lines += [
        f"| {factor} {option} | all others | {_cell(found, 'loss')} | {_cell(found, 'accuracy')} | {len(found)} |"
        for (factor, option), found in by_option.items()
    ]
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows]
    spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _read(path: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["variant"], row["seed"], row["steps"]): row for row in rows}


if __name__ == "__main__":
    main()
