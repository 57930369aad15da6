"""Scene Flow: which frames are trained on and scored, and what is said of an incomplete set."""

import re
import shutil

import numpy as np
import pytest
import torch
from torchvision.datasets import SceneFlowStereo

from lineara.tasks.stereo_depth import SceneFlowData
from lineara.tasks.stereo_depth.transforms import Augmentation

CROPS = Augmentation(7, 11)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, make):
    return make.write_scene_flow(tmp_path_factory.mktemp("sets") / "SceneFlow")


@pytest.fixture
def copied(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "SceneFlow")


def data(root, **options):
    return SceneFlowData(
        str(root), **{"augmentation": CROPS, "batch_size": 4, "num_workers": 0, "val_every": 3} | options
    )


def names(root, split, **options):
    return list(data(root, **options).frames(split).names)


TEST = [
    f"FlyingThings3D/TEST/{letter}/{scene}/{frame}"
    for letter in "AB"
    for scene in ("0000", "0001")
    for frame in ("0006", "0007")
]
TRAIN = [name.replace("TEST", "TRAIN") for name in TEST]
MONKAA = [f"Monkaa/{scene}/{frame}" for scene in ("eating_x2", "flower") for frame in ("0006", "0007")]
DRIVING = [f"Driving/15mm_focallength/scene_backwards/fast/{frame}" for frame in ("0006", "0007")]


def test_a_test_frame_never_trains(shared):
    assert names(shared, "train") == TRAIN + MONKAA + DRIVING
    assert names(shared, "test") == TEST
    assert names(shared, "val") == TEST[::3]
    for options in ({}, {"val_part": "TRAIN", "val_every": 2}, {"sets": ["FlyingThings3D"]}):
        trained, validated, tested = (set(names(shared, split, **options)) for split in ("train", "val", "test"))
        assert not trained & (validated | tested)
        assert not any("TEST" in name for name in trained)
        assert tested == set(TEST)


def test_a_test_frames_pixels_are_in_no_batch_of_training(shared):
    module = data(shared, augmentation=Augmentation(23, 31), batch_size=1)
    module.setup("fit")
    module.setup("test")
    trained = {tuple(batch["disparity"].flatten().tolist()) for batch in module.train_dataloader()}
    tested = {tuple(batch["disparity"].flatten().tolist()) for batch in module.test_dataloader()}
    assert (len(trained), len(tested)) == (14, 8)
    assert not trained & tested


def test_the_sets_to_train_on_are_chosen(shared):
    assert names(shared, "train", sets=["Driving", "FlyingThings3D"]) == TRAIN + DRIVING
    assert names(shared, "train", sets=["FlyingThings3D"]) == TRAIN


def test_whole_scenes_of_the_training_part_are_held_out(shared):
    options = {"val_part": "TRAIN", "val_every": 3, "sets": ["FlyingThings3D"]}
    assert names(shared, "val", **options) == TRAIN[:2] + TRAIN[6:8]  # the first scene and the fourth one
    assert names(shared, "train", **options) == TRAIN[2:6]
    # Whichever is asked for first.
    module = data(shared, **options)
    assert [module.frames(split).names for split in ("train", "val")] == [TRAIN[2:6], TRAIN[:2] + TRAIN[6:8]]


@pytest.mark.parametrize(("name", "number"), [("FlyingThings3D", 16), ("Monkaa", 4), ("Driving", 2)])
def test_torchvision_reads_the_same(shared, make, name, number):
    theirs = SceneFlowStereo(str(shared.parent), variant=name)
    assert len(theirs) == number
    module = data(shared)
    ours = {}
    for split in ("train", "test"):
        frames = module.frames(split)
        ours |= {frames.names[i]: frames.read(i, both_truths=True) for i in range(len(frames))}
    for index, (path, _) in enumerate(theirs._images):
        left, right, truth = theirs[index]
        frame = ours[
            path.removeprefix(f"{shared}/").replace("frames_cleanpass/", "").replace("left/", "").removesuffix(".png")
        ]
        assert np.array_equal(make.plain(frame.left), np.array(left))
        assert np.array_equal(make.plain(frame.right), np.array(right))
        assert np.array_equal(frame.disparity.numpy(), truth[0])
        assert np.array_equal(
            frame.right_disparity.numpy(), theirs._read_disparity(theirs._disparities[index][1])[0][0]
        )


def test_webp_and_the_final_pass(tmp_path, make):
    root = make.write_scene_flow(tmp_path, suffix=".webp", image_pass="frames_finalpass")
    frames = data(root, image_pass="final").frames("test")
    assert frames.names == TEST
    assert np.array_equal(make.plain(frames.read(0).left), make.random_image([46, 0]))
    # Where a frame is there in both, the PNG is taken.
    folder = root / "FlyingThings3D" / "frames_finalpass" / "TEST/A/0000/left"
    make.write_image(folder / "0006.png", make.random_image(5))
    assert np.array_equal(make.plain(data(root, image_pass="final").frames("test").read(0).left), make.random_image(5))
    with pytest.raises(
        FileNotFoundError, match=r"frames_cleanpass/TEST must be the folder of FlyingThings3D's frames, got no"
    ):
        data(root).frames("test")


def test_folders_of_webp_have_names_of_their_own(copied):
    for name in ("FlyingThings3D", "Monkaa"):
        (copied / name / "frames_cleanpass").rename(copied / name / "frames_cleanpass_webp")
    assert names(copied, "train") == TRAIN + MONKAA + DRIVING
    assert names(copied, "test") == TEST


def test_the_subset_of_another_layout_is_named(copied):
    (copied / "FlyingThings3D").rename(copied / "FlyingThings3D_subset")
    with pytest.raises(FileNotFoundError, match=r"got .*FlyingThings3D_subset, which has another layout"):
        names(copied, "test")


def test_other_files_are_left_alone(copied):
    folder = copied / "FlyingThings3D" / "frames_cleanpass" / "TEST/A/0000/left"
    (folder / "._0006.png").write_bytes(b"of another system")
    (folder / "thumbs.db").write_bytes(b"")
    (copied / "FlyingThings3D" / "disparity" / "TEST/A/0000/left" / "9999.pfm").write_bytes(b"of no frame")
    assert names(copied, "test") == TEST


def test_folders_may_be_links(shared, tmp_path):
    (tmp_path / "FlyingThings3D").symlink_to(shared / "FlyingThings3D")
    deep = tmp_path / "Monkaa"
    for folder in ("frames_cleanpass", "disparity"):
        (deep / folder).mkdir(parents=True)
        for scene in ("flower", "eating_x2"):
            (deep / folder / scene).symlink_to(shared / "Monkaa" / folder / scene)
    assert names(tmp_path, "train", sets=["FlyingThings3D", "Monkaa"]) == TRAIN + MONKAA


def missing(copied, name):
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        data(copied).frames("train")
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "title", "frame"),
    [
        ("Monkaa/frames_cleanpass/flower/left/0007.png", "left view", "flower/0007"),
        ("FlyingThings3D/frames_cleanpass/TRAIN/B/0001/right/0006.png", "right view", "B/0001/0006"),
        ("FlyingThings3D/disparity/TRAIN/A/0000/left/0007.pfm", "disparity", "A/0000/0007"),
    ],
)
def test_a_missing_partner_is_named(copied, path, title, frame):
    sentence = f"{copied / path} must be the {title} of frame {frame}, got no such file (1 missing in all); get the set"
    assert missing(copied, path).startswith(sentence)


def test_a_missing_set_is_named(copied, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere/FlyingThings3D/frames_cleanpass/TRAIN must be the folder of Fly"
    ):
        data(tmp_path / "nowhere").setup("fit")
    shutil.rmtree(copied / "Driving" / "disparity")
    with pytest.raises(
        FileNotFoundError, match=rf"^{re.escape(str(copied))}/Driving/disparity must be the folder of Driving's dis"
    ):
        data(copied).setup("fit")
    shutil.rmtree(copied / "Monkaa" / "frames_cleanpass")
    (copied / "Monkaa" / "frames_cleanpass").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"Monkaa/frames_cleanpass must hold images in folders left and right, got none"
    ):
        data(copied).setup("fit")


def test_views_change_places_only_with_the_right_views_truths(shared, tmp_path, make):
    mirror = Augmentation(23, 31, swap_views=1.0)
    module = data(shared, augmentation=mirror, batch_size=1)
    module.setup("fit")
    for batch in module.train_dataloader():
        files = next(files for files in module.frames("train").files if files.name == batch["name"][0])
        index = module.frames("train").names.index(files.name)
        frame = module.frames("train").read(index, both_truths=True)
        assert torch.equal(batch["disparity"][0], frame.right_disparity.flip(-1))
    root = make.write_scene_flow(tmp_path, right_truths=False)
    assert data(root).has_right_truths() is False
    with pytest.raises(ValueError, match=r"^swap_views must be 0 without disparities of the right view"):
        data(root, augmentation=mirror).setup("fit")
    data(root).setup("fit")


def test_negative_disparities_are_refused_or_flipped_by_an_argument(copied, make):
    path = copied / "FlyingThings3D/disparity/TEST/A/0000/left/0006.pfm"
    truth = make.random_truth([46, 0])
    path.write_bytes(make.pfm_bytes(-truth))
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))} must hold disparities that are not mostly negative"
    ):
        data(copied).frames("test").read(0)
    frame = data(copied, left_sign="negative").frames("test").read(0)
    assert np.array_equal(frame.disparity.numpy(), truth)
    with pytest.raises(ValueError, match="must hold disparities that are not mostly positive"):
        data(copied, left_sign="negative").frames("test").read(1)


def test_a_summary_counts_the_frames(shared):
    lines = list(data(shared).summary())
    assert lines[0] == str(shared)
    assert [line.split(";")[0] for line in lines[1:]] == ["train: 14 frames", "val: 3 frames", "test: 8 frames"]
    assert "23 x 31 pixels, 100.0% with disparities of 0.5 to 19.0" in lines[1]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            {"sets": ["Monkaa"]},
            "sets must be FlyingThings3D, whose TEST is tested on, and any of Monkaa, Driving, got Monkaa",
        ),
        ({"sets": []}, "sets must be FlyingThings3D, whose TEST is tested on, and any of Monkaa, Driving, got none"),
        (
            {"sets": ["FlyingThings3D", "Sintel"]},
            "sets must be FlyingThings3D, whose TEST is tested on, and any of .*, got FlyingThings3D, Sintel",
        ),
        ({"image_pass": "albedo"}, "image_pass must be clean or final, got albedo"),
        ({"val_part": "A"}, "val_part must be TEST or TRAIN, got A"),
        ({"left_sign": "-"}, "left_sign must be positive or negative, got -"),
        ({"val_every": 0}, "val_every must be at least 1 for val_part='TEST', got 0"),
        ({"val_every": 1, "val_part": "TRAIN"}, "val_every must be at least 2 for val_part='TRAIN', got 1"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        data("nowhere", **wrong)
