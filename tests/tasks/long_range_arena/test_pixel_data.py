"""Grey images as sequences of pixels."""

import numpy as np
import pytest

from lineara.tasks.long_range_arena.pixel_data import PixelData, as_sequences

IMAGES = np.array([[[0, 255, 3], [7, 0, 0]], [[0, 0, 0], [0, 0, 0]]], np.uint8)


class Two(PixelData):
    def source(self):
        return "memory"

    def read(self):
        return dict.fromkeys(("train", "val", "test"), as_sequences(IMAGES, np.array([1, 0])))


def batch_of(*, mask_zero_pixels):
    module = Two(batch_size=2, shuffle_seed=0, mask_zero_pixels=mask_zero_pixels)
    module.setup("predict")
    [batch] = module.predict_dataloader()
    return module, batch


def test_images_are_sequences_row_by_row():
    examples = as_sequences(IMAGES, np.array([1, 0]))
    assert [(tokens.tolist(), label) for tokens, label in examples] == [([0, 255, 3, 7, 0, 0], 1), ([0] * 6, 0)]
    assert (examples.tokens.dtype, examples.labels.dtype) == (np.uint8, np.uint8)


def test_black_pixels_are_tokens():
    _, batch = batch_of(mask_zero_pixels=False)
    assert batch["tokens"].tolist() == [[1, 256, 4, 8, 1, 1], [1] * 6]
    assert batch["mask"].all()


def test_black_pixels_can_be_hidden():
    _, batch = batch_of(mask_zero_pixels=True)
    assert batch["tokens"].tolist() == [[0, 255, 3, 7, 0, 0], [0] * 6]
    assert batch["mask"].tolist() == [[False, True, True, True, False, False], [False] * 6]


@pytest.mark.parametrize("mask_zero_pixels", [False, True])
def test_an_example_is_written_as_the_values_of_its_pixels(mask_zero_pixels):
    module, batch = batch_of(mask_zero_pixels=mask_zero_pixels)
    assert [module.describe(tokens) for tokens in batch["tokens"].numpy()] == ["0 255 3 7 0 0", "0 0 0 0 0 0"]
