"""Annotated images as batches, compared with torchvision's own reader of COCO's files; and the images of a folder."""

import contextlib
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from lineara.tasks.instance_segmentation.batches import BrokenImage
from lineara.tasks.instance_segmentation.coco_files import read_annotations
from lineara.tasks.instance_segmentation.image_sets import AnnotatedImages, FolderImages, collate

FILE = "annotations/instances_val2017.json"
TARGET = ["boxes", "labels", "masks", "image_id"]


def annotated(root, transform=None, **options):
    return AnnotatedImages(root / "val2017", read_annotations(root / FILE), transform, **options)


def only(images, index, seed=0):
    batch = images[[(index, seed)]]
    assert list(batch) == ["images", "targets"]
    (image,), (target,) = batch["images"], batch["targets"]
    return image, target


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # the oracle's own
def test_images_and_targets_are_those_of_torchvision_but_for_crowds(tiny_set):
    with contextlib.redirect_stdout(io.StringIO()):
        oracle = CocoDetection(tiny_set / "val2017", str(tiny_set / FILE), transforms=v2.ToImage())
    crowds = [not any(annotation["iscrowd"] for annotation in oracle._load_target(number)) for number in oracle.ids]
    oracle = wrap_dataset_for_transforms_v2(oracle, target_keys=TARGET)
    found = {target["image_id"]: (image, target) for image, target in (only(annotated(tiny_set), i) for i in range(5))}
    assert sorted(found) == [2, 3, 5, 7, 11]
    for (image, target), without_crowd in zip(oracle, crowds):
        ours, our_target = found[target["image_id"]]
        assert torch.equal(v2.functional.to_dtype(ours, torch.uint8, scale=True), image)
        if "boxes" in target and without_crowd:
            assert all(torch.equal(our_target[name], target[name]) for name in ("boxes", "labels", "masks"))
        else:
            assert len(our_target["boxes"]) == 0


def test_a_target_is_plain_tensors_of_the_documented_kinds(tiny_set):
    image, target = only(annotated(tiny_set), 0)
    assert (type(image), image.dtype, image.shape) == (torch.Tensor, torch.float32, (3, 31, 47))
    assert 0 <= image.min() < 0.1
    assert 0.9 < image.max() <= 1
    assert list(target) == TARGET
    for name, dtype, shape in (
        ("boxes", torch.float32, (2, 4)),
        ("labels", torch.int64, (2,)),
        ("masks", torch.uint8, (2, 31, 47)),
    ):
        assert (type(target[name]), target[name].dtype, target[name].shape) == (torch.Tensor, dtype, shape)
    assert target["boxes"].tolist() == [[5, 7, 25, 20], [30, 2, 40, 22]]
    assert target["labels"].tolist() == [3, 1]
    assert (target["image_id"], type(target["image_id"])) == (7, int)


def test_an_image_without_an_object_has_an_empty_target(tiny_set):
    for index, number, size in ((3, 5, (23, 41)), (4, 2, (61, 19))):  # nothing at all, and a crowd alone
        image, target = only(annotated(tiny_set), index)
        assert (target["image_id"], image.shape) == (number, (3, *size))
        assert [target[name].shape for name in TARGET[:3]] == [(0, 4), (0,), (0, *size)]
        assert [target[name].dtype for name in TARGET[:3]] == [torch.float32, torch.int64, torch.uint8]


def test_boxes_end_where_the_image_does(tiny_set, annotations, write):
    annotations["annotations"][0]["bbox"] = [-3, 7.5, 100, 13]
    write(tiny_set, annotations)
    _, target = only(annotated(tiny_set), 0)
    assert target["boxes"].tolist() == [[0, 7.5, 47, 20.5], [30, 2, 40, 22]]


def test_a_box_too_thin_for_the_numbers_of_the_network_is_left_out(tiny_set, annotations, write):
    annotations["annotations"][0]["bbox"] = [25.0, 7, 1e-9, 13]
    write(tiny_set, annotations)
    assert only(annotated(tiny_set), 0)[1]["labels"].tolist() == [1]


def test_a_flip_moves_image_boxes_and_masks_together(tiny_set):
    image, target = only(annotated(tiny_set), 0)
    flipped, turned = only(annotated(tiny_set, v2.RandomHorizontalFlip(1.0)), 0)
    assert torch.equal(flipped, image.flip(-1))
    assert torch.equal(turned["masks"], target["masks"].flip(-1))
    assert turned["boxes"].tolist() == [[47 - 25, 7, 47 - 5, 20], [47 - 40, 2, 47 - 30, 22]]
    assert turned["labels"].tolist() == target["labels"].tolist()


def test_a_flip_of_an_image_without_an_object_works(tiny_set):
    assert only(annotated(tiny_set, v2.RandomHorizontalFlip(1.0)), 3)[1]["boxes"].shape == (0, 4)


def test_random_changes_depend_on_the_seed_alone_and_leave_other_random_numbers_be(tiny_set):
    images = annotated(tiny_set, v2.RandomHorizontalFlip(0.5))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = [only(images, 0, seed)[1]["boxes"].tolist() for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert [only(images, 0, seed)[1]["boxes"].tolist() for seed in range(20)] == first
    assert first.count(first[0]) < 20


def test_an_image_may_be_in_a_set_several_times(tiny_set):
    images = annotated(tiny_set, repeats=3)
    assert len(images) == 15
    assert [only(images, index)[1]["image_id"] for index in (0, 1, 2, 3, 14)] == [7, 7, 7, 3, 2]
    assert images.is_wide.tolist() == [value for value in (True, False, True, True, False) for _ in range(3)]


def test_a_set_can_be_handed_to_a_process_that_is_started_anew(tiny_set):
    images = pickle.loads(pickle.dumps(annotated(tiny_set)))
    assert only(images, 0)[1]["boxes"].tolist() == [[5, 7, 25, 20], [30, 2, 40, 22]]


def spoil(root, name="a.jpg"):
    path = root / "val2017" / name
    path.write_bytes(path.read_bytes()[:300])
    return path


def test_a_broken_image_is_refused_by_its_name_and_number(tiny_set):
    path = spoil(tiny_set)
    broken = annotated(tiny_set)[[(1, 0), (0, 0)]]
    assert isinstance(broken, BrokenImage)
    assert broken.sentence.startswith(f"image 7: {path} must be an image that can be read, got ")
    assert broken.sentence.endswith("; replace the file or set skip_broken")


def test_an_image_that_vanished_is_refused(tiny_set):
    images = annotated(tiny_set)
    (tiny_set / "val2017" / "a.jpg").unlink()
    assert "image 7: " in images[[(0, 0)]].sentence
    assert "got No such file or directory; replace" in images[[(0, 0)]].sentence


def test_an_image_of_another_size_than_annotated_is_refused(tiny_set):
    Image.new("RGB", (31, 47)).save(tiny_set / "val2017" / "a.jpg")
    sentence = annotated(tiny_set)[[(0, 0)]].sentence
    assert "val2017/a.jpg must have 31 x 47 pixels, as annotated, got 47 x 31; replace the file" in sentence


def test_a_broken_image_is_left_out_if_asked_for(tiny_set):
    spoil(tiny_set)
    images = annotated(tiny_set, skip_broken=True)
    with pytest.warns(RuntimeWarning, match=r"^left out: image 7: .*a\.jpg must be an image that can be read"):
        batch = images[[(0, 0), (1, 0), (3, 0)]]
    assert [target["image_id"] for target in batch["targets"]] == [3, 5]
    assert len(batch["images"]) == 2
    with pytest.warns(RuntimeWarning, match="image 7"):
        assert images[[(0, 0)]] == {"images": [], "targets": []}


def test_the_next_image_takes_the_place_of_a_broken_one(tiny_set):
    for name in ("d.jpg", "e.jpg"):
        spoil(tiny_set, name)
    images = annotated(tiny_set, skip_broken=True, replace_broken=True)
    with pytest.warns(RuntimeWarning):
        batch = images[[(3, 0), (1, 0)]]
    assert [target["image_id"] for target in batch["targets"]] == [7, 3]


@pytest.mark.filterwarnings("ignore:left out")
def test_a_set_without_a_whole_image_is_refused(tiny_set):
    for path in (tiny_set / "val2017").iterdir():
        path.write_bytes(b"")
    broken = annotated(tiny_set, skip_broken=True, replace_broken=True)[[(0, 0)]]
    assert (
        broken.sentence == f"{tiny_set / 'val2017'} must hold an image that can be read, got none; get the images again"
    )


def test_only_ten_broken_images_are_named(tiny_set):
    spoil(tiny_set)
    images = annotated(tiny_set, skip_broken=True)
    with pytest.warns(RuntimeWarning) as reported:
        images[[(0, 0)] * 13]
    messages = [str(warning.message) for warning in reported]
    assert len(messages) == 10
    assert [message.endswith("; further ones are left out without a word") for message in messages] == [False] * 9 + [
        True
    ]


# The images of a folder.


def test_files_of_a_folder_come_with_their_names(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.new("L", (7, 5), 255).save(tmp_path / "b.png")
    images = FolderImages([tmp_path / "a.png", tmp_path / "b.png"])
    assert (len(images), images.is_wide.tolist()) == (2, [True, True])
    batch = images[[(0, 0), (1, 0)]]
    assert batch["targets"] == [{"file_name": "a.png", "image_id": 1}, {"file_name": "b.png", "image_id": 2}]
    torch.testing.assert_close(batch["images"][0], torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert torch.equal(batch["images"][1], torch.ones(3, 5, 7))


def test_every_broken_file_of_a_folder_is_named_and_the_others_remain(tmp_path):
    for i in range(14):
        (tmp_path / f"{i:02}.png").write_bytes(b"x")
    Image.new("L", (7, 5)).save(tmp_path / "05.png")
    images = FolderImages(sorted(tmp_path.iterdir()))
    with pytest.warns(RuntimeWarning, match="left out: .*must be an image that can be read, got no image") as reported:
        batch = images[[(i, 0) for i in range(14)]]
    assert [target["file_name"] for target in batch["targets"]] == ["05.png"]
    assert [f"{i:02}.png" in str(reported[j].message) for j, i in enumerate(set(range(14)) - {5})] == [True] * 13
    with pytest.warns(RuntimeWarning, match=r"00\.png"):
        assert images[[(0, 0)]] == {"images": [], "targets": []}


def test_a_batch_of_nothing_is_two_empty_lists():
    assert collate([]) == {"images": [], "targets": []}
