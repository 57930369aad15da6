"""The input of detectors: torchvision's numbers for its images, and a pixel of the side that it would lose."""

import copy
import pickle

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lineara.models.thin_images import TransformOfAnyShape

SETTINGS = ((37, 41), 83, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def example(height, width):
    masks = torch.zeros(1, height, width, dtype=torch.uint8)
    masks[0, : height // 2 + 1, : width // 2 + 1] = 1
    boxes = torch.tensor([[0.0, 0.0, width // 2 + 1, height // 2 + 1]])
    return torch.rand(3, height, width), {"boxes": boxes, "masks": masks}


def prepared(transform, *examples, training=False):
    torch.manual_seed(0)  # of the size that is drawn
    images, targets = zip(*copy.deepcopy(examples))
    return transform.train(training)(list(images), list(targets))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(31, 47), (47, 31), (97, 13), (2, 166), (5, 415), (7, 7), (1, 83), (1, 1)], ids=str)
def test_other_images_are_resized_as_by_torchvision(size, training):
    given = example(*size)
    found, [target] = prepared(TransformOfAnyShape(*SETTINGS), given, training=training)
    expected, [expected_target] = prepared(GeneralizedRCNNTransform(*SETTINGS), given, training=training)
    assert found.image_sizes == expected.image_sizes
    assert torch.equal(found.tensors, expected.tensors)
    for name, value in expected_target.items():
        assert torch.equal(target[name], value), name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("size", "expected"), [((1, 166), (1, 83)), ((166, 1), (83, 1)), ((3, 1000), (1, 83))])
def test_a_thin_image_keeps_one_pixel(size, expected, training):
    with pytest.raises(RuntimeError, match="should be greater than 0"):
        prepared(GeneralizedRCNNTransform(*SETTINGS), example(*size))
    transform = TransformOfAnyShape(*SETTINGS)
    ordinary = example(31, 47)
    image, target = example(*size)
    found, [_, changed, _] = prepared(transform, ordinary, (image, target), ordinary, training=training)
    first, thin, last = found.image_sizes
    assert thin == expected
    assert min(first) > 30 < min(last)
    assert changed["masks"].shape == (1, *expected)
    heights, widths = target["boxes"][0, 3] * expected[0] / size[0], target["boxes"][0, 2] * expected[1] / size[1]
    torch.testing.assert_close(changed["boxes"], torch.stack([heights * 0, heights * 0, widths, heights])[None])
    assert transform.fixed_size is None


def test_it_can_be_handed_to_another_process():
    transform = pickle.loads(pickle.dumps(TransformOfAnyShape(*SETTINGS)))
    assert prepared(transform, example(1, 166))[0].image_sizes == [(1, 83)]
