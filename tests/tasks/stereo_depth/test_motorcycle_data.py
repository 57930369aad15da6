"""The motorcycle's parts: none is trained on and scored, and each scored pixel can be found."""

import sys

import pytest
import torch

from lineara.tasks.stereo_depth import MotorcycleData
from lineara.tasks.stereo_depth.metrics import StereoScores
from lineara.tasks.stereo_depth.motorcycle_files import read_motorcycle
from lineara.tasks.stereo_depth.transforms import Augmentation, colours

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "motorcycle"
    MotorcycleData(str(root)).prepare_data()
    return str(root)


@pytest.fixture(scope="module")
def whole(root):
    return read_motorcycle(root)


def loaders(root, **options):
    data = MotorcycleData(root, **options)
    data.setup("fit")
    data.setup("test")
    return {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}


def first_column(part, whole):
    """Where a part of the left view begins in the whole one."""
    width = part.shape[-1]
    starts = [x for x in range(whole.shape[-1] - width + 1) if torch.equal(whole[..., x : x + width], part)]
    assert len(starts) == 1
    return starts[0]


@pytest.fixture(scope="module")
def scored(root, whole):
    """Of each split, the columns with pixels that count, and those that the left and the right view show."""
    data, found = MotorcycleData(root), {}
    for split in SPLITS:
        frame = data.frames(split).read(0)
        start = first_column(frame.left, whole.left)
        assert first_column(frame.right, whole.right) == start  # both views are cut at the same columns
        columns = start + frame.valid.any(0).nonzero()[:, 0]
        found[split] = (int(columns[0]), int(columns[-1]), start, start + frame.left.shape[-1])
        # What counts is what the whole set has there.
        rows = slice(int(columns[0]) - start, None)
        there = whole.valid[:, int(columns[0]) : found[split][3]]
        assert torch.equal(frame.valid[:, rows], there)
        assert torch.equal(frame.disparity, whole.disparity[:, start : found[split][3]])
    return found


def test_no_scored_pixel_is_in_a_left_view_of_training(scored):
    assert scored["train"][1] < scored["train"][3] <= scored["val"][0]
    assert scored["val"][1] < scored["test"][0]
    assert scored["test"][3] == 741
    assert scored["train"][:3:2] == (0, 0)


def test_all_columns_belong_to_a_part(scored):
    assert (scored["train"][1] + 1, scored["val"][1] + 1) == (scored["val"][0], scored["test"][0])


def test_the_partner_of_each_scored_pixel_is_within_the_right_view(scored, root):
    for split in ("val", "test"):
        frame = MotorcycleData(root).frames(split).read(0)
        rows, columns = frame.valid.nonzero(as_tuple=True)
        assert (columns - frame.disparity[rows, columns] >= 0).all()
        assert (frame.disparity[frame.valid] < 64).all()


def test_the_right_view_of_training_shows_nothing_of_the_test(scored, whole):
    """Its last column shows what is further right in the left view by the disparity there."""
    furthest = scored["train"][3] - 1 + whole.disparity[whole.valid].max()
    assert furthest < scored["test"][0]


def test_an_epoch_has_the_crops_asked_for(root):
    batches = list(loaders(root, samples_per_epoch=10, batch_size=3)["train"])
    assert [batch["left"].shape for batch in batches] == [(3, 3, 128, 256)] * 3
    assert batches[0]["name"] == ["motorcycle_train"] * 3
    other = list(loaders(root, samples_per_epoch=2, augmentation=Augmentation(50, 70))["train"])
    assert [batch["right"].shape for batch in other] == [(2, 3, 50, 70)]
    assert not torch.equal(batches[0]["left"][0], batches[0]["left"][1])


def test_crops_are_parts_of_the_training_part_with_their_truths(root, whole):
    (batch,) = loaders(root, samples_per_epoch=5, batch_size=5, augmentation=Augmentation(90, 110))["train"]
    for view, truth, valid in zip(batch["left"], batch["disparity"], batch["valid"]):
        truths = whole.disparity.unfold(0, 90, 1).unfold(1, 110, 1)  # (row, column, 90, 110)
        # A row of truths is like no other.
        inner = int(valid.sum(1).argmax())
        found = (truths[:, :, inner] == truth[inner]).all(-1).nonzero()
        assert len(found) == 1
        row, column = found[0].tolist()
        assert column + 110 <= 448
        assert torch.equal(truths[row, column], truth)
        shown = whole.left[:, row : row + 90, column : column + 110]
        assert torch.equal((colours(view) * 255).round().to(torch.uint8), shown)


def test_validation_and_test_are_the_same_each_time(root):
    for split, width in (("val", 192), ("test", 229)):
        loader = loaders(root)[split]
        (once,), (again,) = list(loader), list(loader)
        assert once["left"].shape == (1, 3, 500, width)
        assert once["name"] == [f"motorcycle_{split}"]
        assert torch.equal(once["left"], again["left"])
        assert torch.equal(once["valid"], again["valid"])


def test_without_other_images_the_pair_itself_is_predicted(root, tmp_path, make):
    data = MotorcycleData(root)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["left"].shape == (1, 3, 500, 741)
    assert batch["name"] == ["motorcycle"]
    camera = {"focal_length": 994.978, "center_x": 311.193, "center_y": 254.877, "baseline": 0.193001, "doffs": 31.086}
    assert batch["calibration"] == [camera | {"width": 741, "height": 500}]
    for name in ("one.png", "two.png"):
        make.write_image(tmp_path / name, make.random_image(0))
    data = MotorcycleData(root, predict_left=str(tmp_path / "one.png"), predict_right=str(tmp_path / "two.png"))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert (batch["name"], "calibration" in batch) == ([f"{tmp_path.name}/one"], False)
    with pytest.raises(ValueError, match=r"^predict_left and predict_right must be two images or two folders"):
        MotorcycleData(root, predict_left=str(tmp_path / "one.png")).setup("predict")
    # A calibration alone is not ignored: the pair itself has its own.
    with pytest.raises(ValueError, match=r"^predict_left and predict_right must be two images or two folders"):
        MotorcycleData(root, predict_calibration=str(tmp_path / "calib.txt")).setup("predict")


def test_trivial_answers_know_the_training_part_alone(root, whole, monkeypatch):
    pytest.importorskip("cv2")
    data = MotorcycleData(root)
    trained = whole.disparity[:, :448]
    median = trained[torch.isfinite(trained)].median()
    scores = {}
    for split in ("val", "test"):
        answers, frame = data.trivial_answers(split), data.frames(split).read(0)
        assert set(answers) == {"constant_median", "block_matching"}
        assert answers["constant_median"].unique().tolist() == [median]
        for name, answer in answers.items():
            assert answer.shape == (1, *frame.disparity.shape)
            assert answer.dtype == torch.float32
            metric = StereoScores("default", 64)
            metric.update(answer, frame.disparity[None], frame.valid[None], [split])
            scores[split, name] = metric.compute()["epe"]
        assert scores[split, "block_matching"] < scores[split, "constant_median"] / 3
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"pip install 'lineara\[train,vision\]'$"):
        data.trivial_answers("test")


def test_a_summary_writes_the_set(tmp_path):
    folder = tmp_path / "motorcycle"
    lines = list(MotorcycleData(str(folder)).summary())
    assert lines[0] == str(folder)
    assert lines[1].startswith("train: 1 frame; the first: 500 x 448 pixels, 93.")
    assert (folder / "disparity.pfm").is_file()


def test_options_that_cannot_be_are_refused(root):
    with pytest.raises(ValueError, match=r"^samples_per_epoch must be at least 1, got 0$"):
        MotorcycleData(root, samples_per_epoch=0)
    with pytest.raises(ValueError, match=r"^swap_views must be 0 without disparities of the right view"):
        MotorcycleData(root, augmentation=Augmentation(50, 70, swap_views=0.5)).setup("fit")
