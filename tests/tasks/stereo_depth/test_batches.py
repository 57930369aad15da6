"""Which frames make a batch, what a batch holds, and what becomes of a frame that cannot be read."""

from itertools import chain
from typing import ClassVar

import pytest
import torch

from lineara.tasks.stereo_depth.batches import EpochBatches, FrameBatches, FrameLoader, PairsToPredict
from lineara.tasks.stereo_depth.frames import Frame
from lineara.tasks.stereo_depth.transforms import normalised

# Epochs.


def epoch(number=0, *, frames=101, batch=7, **options):
    batches = EpochBatches(frames, batch, **{"shuffle": True} | options)
    batches.set_epoch(number)
    found = list(batches)
    assert len(found) == len(batches) - options.get("start", 0)
    return found


def indices(batches):
    return [index for index, _ in chain(*batches)]


def test_an_epoch_has_whole_batches_of_different_frames():
    batches = epoch()
    assert [len(batch) for batch in batches] == [7] * 14
    assert len(set(indices(batches))) == 98
    assert set(indices(batches)) <= set(range(101))
    assert len({seed for _, seed in chain(*batches)}) == 98
    assert indices(batches) != sorted(indices(batches))


def test_order_and_seeds_follow_from_seed_and_epoch_alone():
    assert epoch(3) == epoch(3)
    torch.manual_seed(1)
    assert epoch(3, seed=5) == epoch(3, seed=5)
    assert epoch(3) != epoch(4)
    assert epoch(3) != epoch(3, seed=1)
    # The same frame is changed in another way in the next epoch.
    assert dict(chain(*epoch(0, frames=7))).keys() == dict(chain(*epoch(1, frames=7))).keys()
    assert dict(chain(*epoch(0, frames=7))) != dict(chain(*epoch(1, frames=7)))


def test_a_resumed_epoch_goes_on_and_the_next_one_is_whole():
    batches = EpochBatches(101, 7, shuffle=True, start=5)
    assert list(batches) == epoch()[5:]
    batches.set_epoch(1)
    assert list(batches) == epoch(1)
    assert epoch(start=14) == []


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_epoch(processes):
    shares = [epoch(num_processes=processes, rank=rank) for rank in range(processes)]
    assert {len(share) for share in shares} == {101 // (7 * processes)}
    together = [indices(share) for share in shares]
    assert len(set(chain(*together))) == sum(map(len, together))


def test_frames_to_score_come_one_by_one_in_their_order_and_once():
    assert epoch(3, shuffle=False, frames=11) == [[(index, 0)] for index in range(11)]
    shares = [indices(epoch(shuffle=False, frames=11, num_processes=3, rank=rank)) for rank in range(3)]
    assert shares == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]


# Frames.


class Few:
    """Frames whose numbers are their colours and disparities; some are broken."""

    def __init__(self, number=5, broken=()):
        self.names = [f"street/{index}" for index in range(number)]
        self.broken = broken

    def __len__(self):
        return len(self.names)

    def read(self, index, *, both_truths=False):
        if index in self.broken:
            raise FileNotFoundError(f"{index}.png must be an image, got none")
        view = torch.full((3, 5, 7), index, dtype=torch.uint8)
        truth = torch.full((5, 7), 10.0 * index)
        truths = {"right_disparity": truth + 1, "right_valid": truth > 3} if both_truths else {}
        return Frame(view, view + 1, truth, truth > 0, **truths)


def shaken(frame):
    frame.disparity = frame.disparity + torch.rand(5, 7)
    return frame


def test_a_batch_is_as_documented():
    batch = FrameBatches(Few())[[(3, 0), (0, 0)]]
    assert list(batch) == ["left", "right", "disparity", "valid", "name"]
    assert torch.equal(batch["left"][0], normalised(torch.full((3, 5, 7), 3, dtype=torch.uint8)))
    assert torch.equal(batch["right"][1], normalised(torch.ones(3, 5, 7, dtype=torch.uint8)))
    assert batch["disparity"].dtype == torch.float32
    assert batch["disparity"].unique().tolist() == [0, 30]
    assert batch["valid"].flatten(1).float().mean(1).tolist() == [1, 0]
    assert batch["name"] == ["street/3", "street/0"]


def test_a_change_follows_from_the_seed_alone_and_draws_on_no_other_numbers():
    frames = FrameBatches(Few(), shaken, repeats=4)
    assert len(frames) == 20
    state = torch.get_rng_state()
    first = frames[[(13, 5)]]
    assert torch.equal(torch.get_rng_state(), state)
    assert first["name"] == ["street/3"]  # of 4 each
    torch.rand(3)
    assert torch.equal(frames[[(13, 5)]]["disparity"], first["disparity"])
    assert not torch.equal(frames[[(13, 6)]]["disparity"], first["disparity"])


def test_a_change_is_given_both_truths_where_it_needs_them():
    given = []

    def keep(frame):
        given.append(frame)
        return frame

    FrameBatches(Few(), keep)[[(1, 0)]]
    FrameBatches(Few(), keep, both_truths=True)[[(1, 0)]]
    assert given[0].right_disparity is None
    assert given[1].right_disparity.unique().tolist() == [11]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_broken_frame_ends_the_run_with_one_sentence(workers):
    loader = FrameLoader(
        FrameBatches(Few(broken=[1])), sampler=EpochBatches(5, shuffle=False), batch_size=None, num_workers=workers
    )
    read = []
    with pytest.raises(ValueError, match=r"^frame street/1: 1\.png must be an image, got none$"):
        read.extend(batch["name"] for batch in loader)
    assert read == [["street/0"]]


def test_a_change_that_cannot_be_made_names_the_frame():
    def refuse(frame):
        raise ValueError("must be large")

    loader = FrameLoader(FrameBatches(Few(), refuse), sampler=[[(2, 0)]], batch_size=None)
    with pytest.raises(ValueError, match=r"^frame street/2 must be large$"):
        list(loader)


# Pairs to predict.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_broken_pairs_are_reported_and_the_others_come(tmp_path, make, workers):
    for name, size in (("a", (23, 31)), ("b", (19, 37)), ("c", (23, 31)), ("d", (23, 31))):
        for place in "lr":
            make.write_image(tmp_path / place / f"{name}.png", make.random_image(ord(name), size))
    make.write_image(tmp_path / "r" / "a.png", make.random_image(0, (23, 29)))
    (tmp_path / "l" / "c.png").write_bytes(b"text")
    pairs = [(name, tmp_path / "l" / f"{name}.png", tmp_path / "r" / f"{name}.png") for name in "abcd"]
    camera = {"focal_length": 2.0, "baseline": 3.0, "doffs": 4.0}
    frames = PairsToPredict(pairs, [camera] * len(pairs))
    loader = FrameLoader(frames, sampler=EpochBatches(len(frames), shuffle=False), batch_size=None, num_workers=workers)
    with pytest.warns(RuntimeWarning) as caught:
        batches = list(loader)
    said = [str(warning.message) for warning in caught]
    assert len(said) == 2
    assert said[0].startswith(
        f"left out: {tmp_path / 'l' / 'a.png'} and {tmp_path / 'r' / 'a.png'} must be of the same"
    )
    assert said[1].startswith(f"left out: {tmp_path / 'l' / 'c.png'} must be an image that can be read")
    assert [batch["name"] for batch in batches] == [["b"], ["d"]]
    assert batches[0]["left"].shape == batches[0]["right"].shape == (1, 3, 19, 37)
    assert torch.equal(
        batches[0]["left"][0], normalised(torch.from_numpy(make.random_image(98, (19, 37))).permute(2, 0, 1))
    )
    assert batches[0]["calibration"] == [camera]
    assert "calibration" not in PairsToPredict(pairs)[[(1, 0)]]
    another = PairsToPredict(pairs, [camera | {"height": 31, "width": 23}] * len(pairs))[[(1, 0)]]
    assert another.sentence.startswith("the calibration must be of images of 37 x 19 pixels (width x height), as b has")
    assert not another.left_out


def test_a_process_without_a_frame_of_its_own_evaluates_anothers_which_counts_there_alone():
    class One:
        names: ClassVar[list[str]] = ["only"]

        def __len__(self):
            return 1

        def read(self, index, *, both_truths=False):
            views = torch.zeros(3, 5, 7)
            return Frame(views, views, torch.ones(5, 7), torch.ones(5, 7, dtype=torch.bool))

    frames = FrameBatches(One())
    batches = []
    for rank in range(3):
        order = EpochBatches(1, shuffle=False, num_processes=3, rank=rank)
        items = list(order)
        assert len(order) == len(items) == 1
        batches.append(frames[items[0]])
    assert ["again" in batch for batch in batches] == [False, True, True]
    assert [batch["name"] for batch in batches] == [["only"]] * 3
