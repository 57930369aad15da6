"""Checkpoints of several processes, and what reads them; `test_training.py` has those of whole runs."""

from types import SimpleNamespace

import pytest
import torch

from lineara.runs.checkpoints import AtomicCheckpointIO, SaveRunState


class Harmless:
    """What would make a folder when it is unpickled without care."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.folder),)


def test_what_a_checkpoint_holds_is_never_run_whoever_reads_it(tmp_path):
    torch.save({"state_dict": Harmless(tmp_path / "made")}, tmp_path / "bad.ckpt")
    for asked in (None, False, True):
        with pytest.raises(Exception, match="Weights only load failed"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / "bad.ckpt", weights_only=asked)
    assert not (tmp_path / "made").exists()


def test_each_process_goes_on_with_its_own_random_numbers():
    states = []
    for seed in (3, 5):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    drawn = []
    for rank in (0, 1, 2):
        keep = SaveRunState("")
        trainer = SimpleNamespace(global_rank=rank, state=SimpleNamespace(fn="fit"))
        keep.on_load_checkpoint(trainer, None, {"lineara_random_state": torch.stack(states)})
        keep.on_train_start(None, None)
        drawn.append(torch.rand(1).item())
    torch.manual_seed(3)
    assert drawn[0] == drawn[2] == torch.rand(1).item()  # a process that was not there takes another's
    torch.manual_seed(5)
    assert drawn[1] == torch.rand(1).item()
