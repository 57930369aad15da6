"""What tests of several packages share: ranks, and a tiny recipe beside its data."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Where there is no GPU, Triton's kernels are tested in its interpreter; triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def interruptible():
    """As at a terminal: what a shell starts in the background ignores interruptions."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def started_ranks(tmp_path_factory):
    """Run a script once per rank, as `script RANK NUMBER_OF_RANKS FOLDER`, and load the RANK.pt that each leaves."""

    def start(script: str | Path, num_ranks: int) -> list:
        folder = tmp_path_factory.mktemp("ranks")
        words = [sys.executable, "-W", "error", str(script)]
        ranks = [
            subprocess.Popen([*words, str(rank), str(num_ranks), str(folder)], stderr=subprocess.PIPE, text=True)
            for rank in range(num_ranks)
        ]
        try:
            said = [rank.communicate(timeout=120)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)
        return [torch.load(folder / f"{rank}.pt") for rank in range(num_ranks)]

    return start


@pytest.fixture(autouse=True)
def _alone():
    """No test finds itself in a run that another one has started: Lightning leaves word in the environment."""
    _forget_runs()
    yield
    _forget_runs()


def _forget_runs():
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


TINY = """\
seed_everything: 0
model:
  class_path: lineara.tasks.long_range_arena.SequenceClassification
  init_args:
    peak_lr: 1.0e-2
    warmup_steps: 3
    network:
      class_path: lineara.models.SequenceClassifier
      init_args:
        vocab_size: 16
        num_classes: 10
        max_len: 30
        dim: 8
        mlp_dim: 8
        head_dim: 8
        dropout: 0.1
        attention:
          class_path: lineara.nn.EfficientAttention
          init_args:
            num_heads: 2
data:
  class_path: lineara.tasks.long_range_arena.ListOpsData
  init_args:
    data_root: {folder}
    num_train: 110
    num_val: 40
    num_test: 47
    min_len: 5
    max_len: 30
    batch_size: 11
    num_workers: 1
trainer:
  accelerator: cpu
  max_steps: 23
  val_check_interval: 5
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""

# Runs `lineara` once for each line of words. A process sends itself a signal where the fault says: in the run into the
# folder of that name, in the process of that rank, before that step.
SCRIPT = """
import json, os, sys
from pathlib import Path
from lineara.cli import main
from lineara.tasks.long_range_arena import SequenceClassification
from lineara.runs.training import TrainingCommand

fault, done = json.loads(os.environ["FAULT"]), []
step, together = SequenceClassification.training_step, TrainingCommand._together

def training_step(self, batch, index):
    here = [Path(self.trainer.default_root_dir).name, self.global_rank, self.global_step]
    if here in fault["where"] and here not in done:
        done.append(here)
        os.kill(os.getpid(), fault["number"])
    return step(self, batch, index)

def recorded(self, name, arguments):
    together(self, name, arguments)
    held = sum(getattr(weight, "_local_tensor", weight).numel() for weight in self.model.parameters())
    found = {"share": held / sum(weight.numel() for weight in self.model.parameters())}
    found |= {key: float(value) for key, value in self.trainer.callback_metrics.items()}
    if self.trainer.is_global_zero:
        Path(self.trainer.default_root_dir, f"{name}.json").write_text(json.dumps(found))

SequenceClassification.training_step, TrainingCommand._together = training_step, recorded
*lines, last = [line.split() for line in json.loads(Path(sys.argv[1]).read_text())]
statuses = []
for words in lines:
    try:
        statuses.append(main(words))
    except SystemExit as end:
        statuses.append(end.code)
    Path("statuses" + os.environ["LOCAL_RANK"]).write_text(json.dumps(statuses))
sys.exit(main(last))
"""


@pytest.fixture(scope="session")
def two_processes():
    """Run the lines' commands one after the other in the same two processes; all but the last may end early.

    The files statuses0 and statuses1 in the folder hold how each of the others ended in each process.
    """

    def run(folder, lines, *, where=(), number=signal.SIGTERM, torchrun=False):
        (folder / "script.py").write_text(SCRIPT)
        words = "--trainer.accelerator cpu --trainer.enable_progress_bar false"
        words += "" if torchrun else " --trainer.devices 2"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
        (folder / "lines.json").write_text(json.dumps([f"{line} {words}" for line in lines]))
        return subprocess.run(
            [sys.executable, *launcher, "script.py", "lines.json"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "FAULT": json.dumps({"where": where, "number": number})},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory):
    """10 batches make an epoch, 23 steps the run, and dropout: the order of batches is not all that is random."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(folder=folder))
    return path


@pytest.fixture
def one_thread():
    """Several threads round differently from process to process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
