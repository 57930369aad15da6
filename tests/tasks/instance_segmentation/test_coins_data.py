"""Crops of the coins: objects and pixels move together, and the seed determines them."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from lineara.tasks.instance_segmentation import CoinsData
from lineara.tasks.instance_segmentation.coins_data import RandomCrops


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "coins"
    CoinsData(str(root)).prepare_data()
    return str(root)


def epoch(root, number=0, **options):
    data = CoinsData(root, **{"samples_per_epoch": 30, "batch_size": 7} | options)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def examples(batches):
    return [pair for batch in batches for pair in zip(batch["images"], batch["targets"])]


def test_an_epoch_has_the_crops_asked_for(root):
    batches = epoch(root)
    assert [len(batch["images"]) for batch in batches].count(7) == 4
    crops = examples(batches)
    assert len(crops) == 30
    assert {tuple(image.shape) for image, _ in crops} == {(3, 80, 160), (3, 160, 80)}
    assert {tuple(image.shape[1:]) for image, _ in examples(epoch(root, crop_height=60, crop_width=70))} == {
        (60, 70),
        (70, 60),
    }


def test_a_crop_has_a_whole_coin_and_its_boxes_fit_its_masks(root):
    for image, target in examples(epoch(root)):
        assert (image.dtype, target["masks"].dtype, target["boxes"].dtype) == (
            torch.float32,
            torch.uint8,
            torch.float32,
        )
        assert 0 <= image.min() <= image.max() <= 1
        masks, boxes = target["masks"], target["boxes"]
        assert masks.shape == (len(boxes), *image.shape[1:])
        assert len(boxes) == len(target["labels"]) >= 1
        assert target["labels"].unique().tolist() == [1]
        corners = masks_to_boxes(masks)
        corners[:, 2:] += 1
        assert torch.equal(boxes, corners)
        height, width = image.shape[1:]
        inside = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2] <= width) & (boxes[:, 3] <= height)
        assert inside.all()
        sides = boxes[:, 2:] - boxes[:, :2]
        # A coin in full is about as wide as it is tall.
        assert ((sides.amax(1) / sides.amin(1)) < 1.35).any()


def test_masks_lie_on_the_coins(root):
    """A coin is brighter than the ground around it, wherever it has been moved and however it has been turned."""
    for image, target in examples(epoch(root, brightness=0.0, contrast=0.0)):
        anywhere = target["masks"].bool().any(0)
        grown = torch.nn.functional.max_pool2d(anywhere[None].float(), 9, 1, 4)[0].bool()
        assert image[0][anywhere].mean() > image[0][grown & ~anywhere].mean() + 0.1


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) and torch.equal(s["boxes"], t["boxes"]) for (a, s), (b, t) in zip(one, other)
    )


def test_crops_depend_on_seed_and_epoch_alone_and_not_on_the_workers(root):
    first = examples(epoch(root, 3))
    torch.manual_seed(5)
    assert same(first, examples(epoch(root, 3)))
    assert same(first, examples(epoch(root, 3, num_workers=2)))
    assert not same(first, examples(epoch(root, 4)))
    assert not same(first, examples(epoch(root, 3, shuffle_seed=1)))


def test_brightness_and_contrast_change_if_asked_for(root):
    plain, changed = ([image.mean() for image, _ in examples(epoch(root, **options))] for options in (still(), {}))
    assert torch.stack(changed).std() > 1.3 * torch.stack(plain).std()


def still():
    return {"brightness": 0.0, "contrast": 0.0}


def test_validation_and_test_see_their_parts_whole_and_unchanged(root):
    data = CoinsData(root)
    for stage, loader, height in (("validate", data.val_dataloader, 75), ("test", data.test_dataloader, 78)):
        data.setup(stage)
        (once,), (again,) = list(loader()), list(loader())
        (image,), (target,) = once["images"], once["targets"]
        assert (tuple(image.shape), len(target["boxes"])) == ((3, height, 384), 6)
        assert torch.equal(image, again["images"][0])
    assert data.categories == {1: "coin"}
    assert [len(data.annotations(split)["annotations"]) for split in ("val", "test")] == [6, 6]


def test_the_summary_writes_the_set_and_counts_its_coins(tmp_path):
    lines = list(CoinsData(str(tmp_path / "coins")).summary())
    assert lines == [
        str(tmp_path / "coins"),
        "train: 1 images, 12 instances, 0 crowds, 0 images without instances",
        "val: 1 images, 6 instances, 0 crowds, 0 images without instances",
        "test: 1 images, 6 instances, 0 crowds, 0 images without instances",
        "categories: 1: 1 coin",
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"samples_per_epoch": 0}, "samples_per_epoch must be at least 1, got 0"),
        ({"crop_height": 0}, "crop_height and crop_width must be at least 1, got 0 and 160"),
        ({"min_scale": 0.0}, "min_scale must be above 0 and at most max_scale, got 0.0 and 1.25"),
        ({"min_scale": 2.0}, "min_scale must be above 0 and at most max_scale, got 2.0 and 1.25"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        CoinsData(**options)


# The crops by themselves, of images in which every pixel tells where it was.


HEIGHT, WIDTH = 53, 97


def scene(*rectangles):
    """An image of rows and columns as colours, and objects given by top, left, bottom and right."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    masks = torch.zeros(len(rectangles), HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (top, left, bottom, right) in zip(masks, rectangles):
        mask[top:bottom, left:right] = 1
    boxes = torch.tensor([[left, top, right, bottom] for top, left, bottom, right in rectangles]).reshape(-1, 4)
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=(HEIGHT, WIDTH)),
        "labels": torch.arange(1, 1 + len(rectangles)),
        "masks": tv_tensors.Mask(masks),
        "image_id": 5,
    }
    return tv_tensors.Image(torch.stack([rows, columns, rows * 0]).to(torch.uint8)), target


def test_unmagnified_crops_are_parts_of_the_image_and_its_masks():
    image, target = scene((3, 5, 20, 30), (30, 50, 47, 90), (10, 60, 14, 64))
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        crop, cropped = RandomCrops((31, 41), (1.0, 1.0))(image, target)
        rows, columns = crop[0].long(), crop[1].long()
        assert tuple(crop.shape) in {(3, 31, 41), (3, 41, 31)}
        area = (1 + rows.max() - rows.min()) * (1 + columns.max() - columns.min())
        assert len({*zip(rows.flatten().tolist(), columns.flatten().tolist())}) == area == 31 * 41
        for label, mask in zip(cropped["labels"].tolist(), cropped["masks"]):
            assert torch.equal(mask, target["masks"][label - 1][rows, columns])
        whole = [
            label
            for label, mask in zip(cropped["labels"].tolist(), cropped["masks"])
            if mask.sum() == target["masks"][label - 1].sum()
        ]
        assert whole
        seen |= {(whole[0], rows[0, 0] < rows[-1, 0], columns[0, 0] < columns[0, -1], rows[0, 0] == rows[0, 1])}
    assert len(seen) > 12  # all objects, turned and flipped in many ways


def test_less_than_a_quarter_of_an_object_is_left_out():
    image, target = scene((20, 10, 30, 20), (20, 40, 30, 80))
    shares = set()
    for seed in range(100):
        torch.manual_seed(seed)
        _, cropped = RandomCrops((31, 41), (1.0, 1.0))(image, target)
        shares |= {int(mask.sum()) for label, mask in zip(cropped["labels"], cropped["masks"]) if label == 2}
    assert min(shares) >= 100
    assert min(shares) < 200
    assert max(shares) == 400


def test_magnified_crops_show_less_of_the_image():
    image, target = scene((10, 30, 20, 40))
    for scale in (0.8, 2.0):
        torch.manual_seed(0)
        crop, cropped = RandomCrops((31, 41), (scale, scale))(image, target)
        assert crop.shape[1] * crop.shape[2] == 31 * 41
        assert cropped["masks"].sum().item() == pytest.approx(100 * scale**2, rel=0.2)


def test_an_object_larger_than_the_crop_fills_it_and_no_object_leaves_any_part():
    crop, cropped = RandomCrops((11, 13), (1.0, 1.0))(*scene((0, 10, HEIGHT, 90)))
    assert cropped["masks"].shape[0] in (0, 1)  # of an object of 53 x 80 such a crop is less than a quarter
    image, target = scene()
    crop, cropped = RandomCrops((11, 13), (1.0, 1.0))(image, target)
    assert crop.shape[1] * crop.shape[2] == 11 * 13
    assert (cropped["boxes"].shape, cropped["masks"].shape) == ((0, 4), (0, *crop.shape[1:]))


def test_a_crop_larger_than_the_image_shows_all_of_it():
    image, target = scene((3, 5, 20, 30))
    crop, cropped = RandomCrops((2 * HEIGHT, 2 * WIDTH), (1.0, 1.0))(image, target)
    assert crop.shape[1] * crop.shape[2] == 4 * HEIGHT * WIDTH
    assert cropped["masks"].sum().item() == 4 * target["masks"].sum().item()
