"""The set of coins: which coins there are, where the photograph is cut, and that it is whole however it was written."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from skimage import data

from lineara.tasks.instance_segmentation.coco_entries import decode
from lineara.tasks.instance_segmentation.coco_files import read_annotations
from lineara.tasks.instance_segmentation.coins_files import coins, prepare_coins

SPLITS = ("train", "val", "test")
FILES = [
    f"{folder}/{split}.{suffix}" for folder, suffix in (("annotations", "json"), ("images", "png")) for split in SPLITS
]
# A row of pixels and a column that any eye sees to be in the coin, in the order of reading.
CENTRES = [
    *((55, 45), (56, 100), (52, 155), (52, 216), (53, 276), (44, 335)),
    *((124, 45), (126, 102), (128, 153), (125, 206), (119, 270), (125, 337)),
    *((198, 44), (196, 102), (198, 154), (193, 213), (195, 275), (187, 348)),
    *((260, 46), (266, 114), (262, 172), (264, 244), (264, 301), (268, 358)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coins")
    prepare_coins(folder)
    return folder


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_every_coin_has_one_mask_and_nothing_else_has():
    photograph, masks = coins()
    assert photograph.shape == (303, 384)
    assert [tuple(mask[row, column] for mask in masks).index(True) for row, column in CENTRES] == list(range(24))
    assert sum(mask.astype(int) for mask in masks).max() == 1  # no pixel of two coins
    for mask, (row, column) in zip(masks, CENTRES):
        rows, columns = mask.nonzero()
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 33 <= min(height, width) <= max(height, width) <= 66
        # Round: about pi / 4 of its box, and its middle is the box's.
        assert 0.72 < mask.sum() / (height * width) < 0.84
        assert abs(rows.mean() - row) < 4
        assert abs(columns.mean() - column) < 4
        assert mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].any(axis=0).all()


def test_a_coin_is_brighter_than_the_ground_around_it():
    photograph, masks = coins()
    any_coin = np.any(masks, axis=0)
    for mask in masks:
        rows, columns = mask.nonzero()
        around = np.s_[max(rows.min() - 5, 0) : rows.max() + 6, max(columns.min() - 5, 0) : columns.max() + 6]
        assert photograph[mask].mean() > photograph[around][~any_coin[around]].mean() + 25


def test_the_parts_are_the_photograph_and_cut_no_coin(folder):
    photograph, masks = coins()
    parts, found, top = [], 0, 0
    for split, number in zip(SPLITS, (12, 6, 6)):
        content = read_annotations(folder / "annotations" / f"{split}.json", image_folder=folder / "images")
        (image,) = content["images"]
        parts.append(np.array(Image.open(folder / "images" / image["file_name"])))
        assert parts[-1].shape == (image["height"], image["width"])
        assert len(content["annotations"]) == number
        for annotation, mask in zip(content["annotations"], masks[found : found + number]):
            part = decode(annotation["segmentation"], *parts[-1].shape)
            assert np.array_equal(part, mask[top : top + len(part)])
            assert part.sum() == mask.sum() == annotation["area"]  # whole
            assert not part[[0, -1]].any()
            left, upper, width, height = annotation["bbox"]
            assert part[upper : upper + height, left : left + width].sum() == part.sum()
            assert part[upper, :].any()
            assert part[upper + height - 1, :].any()
            assert part[:, left].any()
            assert part[:, left + width - 1].any()
        found, top = found + number, top + len(parts[-1])
    assert np.array_equal(np.concatenate(parts), photograph)
    assert np.array_equal(photograph, data.coins())


def test_a_set_that_is_there_is_left_alone(folder):
    before = {name: (folder / name).stat().st_mtime_ns for name in FILES}
    prepare_coins(folder)
    assert {name: (folder / name).stat().st_mtime_ns for name in FILES} == before


def test_the_set_is_the_same_wherever_it_is_written(folder, tmp_path):
    prepare_coins(tmp_path / "more" / "coins")
    assert contents(tmp_path / "more" / "coins") == contents(folder)
    assert [path.name for path in (tmp_path / "more" / "coins").rglob(".*")] == [".lock"]


@pytest.fixture
def copied(folder, tmp_path):
    for name, content in contents(folder).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".lock").touch()
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_written_again(folder, copied, name):
    (copied / name).unlink()
    prepare_coins(copied)
    assert contents(copied) == contents(folder)


@pytest.mark.parametrize("name", ["annotations/val.json", "images/train.png"])
def test_a_damaged_file_is_reported_and_written_again(folder, copied, name):
    (copied / name).write_bytes((copied / name).read_bytes()[:-200])
    with pytest.warns(RuntimeWarning, match=f"{name} must be .*; writing the set of coins again now"):
        prepare_coins(copied)
    assert contents(copied) == contents(folder)


def test_an_image_of_another_size_is_reported_and_written_again(folder, copied):
    Image.new("L", (384, 74)).save(copied / "images" / "val.png")
    with pytest.warns(RuntimeWarning, match=r"val\.png must have the size that .*val\.json says; writing"):
        prepare_coins(copied)
    assert contents(copied) == contents(folder)


def test_another_version_is_reported_and_written_again(folder, copied):
    path = copied / "annotations" / "test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"info": {"version": 0}}))
    with pytest.warns(RuntimeWarning, match=r"test\.json must be of version 1; writing"):
        prepare_coins(copied)
    assert contents(copied) == contents(folder)


@pytest.mark.parametrize("name", ["annotations/val.json", "images/train.png"])
def test_files_of_something_else_are_refused_and_kept(tmp_path, name):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"something else")
    for _ in range(2):  # the first refusal leaves nothing that lets the second one pass
        with pytest.raises(
            ValueError, match=rf"^data_root must be an empty folder or .*, got \S+ with {name} of something else; name"
        ):
            prepare_coins(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_bytes() == b"something else"


def test_other_files_and_folders_stay(folder, tmp_path):
    others = [
        "images/.train-a.png",
        "images/.other-abcdefgh.png",
        "annotations/.my-notes.json",
        "images/photograph.png",
    ]
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"theirs")
    (tmp_path / "images/.val-abcdefgh.png").mkdir()
    (tmp_path / "annotations/.test-abcdefgh.json").write_bytes(b"part")
    prepare_coins(tmp_path)
    assert contents(tmp_path) == contents(folder)
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert kept == {".lock", "images", "annotations", "images/.val-abcdefgh.png", *others, *FILES}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "coins").write_text("in the way")
    with pytest.raises(OSError, match=r"coins must be a folder that can be written, got .*; set another data_root$"):
        prepare_coins(tmp_path / "coins")


_START = "import sys; from lineara.tasks.instance_segmentation.coins_files import prepare_coins; "


def test_two_processes_that_prepare_the_same_folder_agree(folder, tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", f"{_START} prepare_coins(sys.argv[1])", tmp_path]) for _ in "12"
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert contents(tmp_path) == contents(folder)


def test_after_a_kill_in_the_middle_the_set_becomes_whole_and_nothing_is_left_over(folder, tmp_path):
    # It is killed while the image of the second part is being written.
    hang = "import time; from PIL import Image; save = Image.Image.save; "
    hang += "Image.Image.save = lambda self, path, **options: "
    hang += "(path.write_bytes(b'part'), print('now', flush=True), time.sleep(99)) if self.height == 75 "
    hang += "else save(self, path, **options); "
    process = subprocess.Popen(
        [sys.executable, "-c", f"{_START}{hang} prepare_coins(sys.argv[1])", tmp_path], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(list((tmp_path / "images").glob(".*"))) == 1
    prepare_coins(tmp_path)
    assert contents(tmp_path) == contents(folder)
    assert list((tmp_path / "images").glob(".*")) == []
