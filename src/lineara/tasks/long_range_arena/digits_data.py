"""Digits: a small set that comes with scikit-learn, to stand in for the image task; 10 classes."""

import numpy as np

from lineara.tasks.long_range_arena.examples import SequenceExamples
from lineara.tasks.long_range_arena.pixel_data import PixelData, as_sequences

# Not the shuffling seed: runs with different orders of batches are judged on the same images.
_SPLIT_SEED = 0


class DigitsData(PixelData):
    """Handwritten digits, 8 x 8 pixels of 17 shades; at most 18 token ids, see `PixelData`.

    No task of the arena: it needs no download, and shows whether a network learns from pixels at all. The 1,797 images
    are always split in the same way.

    Args:
        num_val: images for validation.
        num_test: images for testing.
        upscale: each pixel is repeated so often in height and width; 4 makes 32 x 32 = 1,024 positions.
        mask_zero_pixels: whether black pixels are hidden.
        shuffle_seed: seed of the order of training batches.
        batch_size: images per batch.

    Source: Alpaydin, Kaynak, 1998, "Optical Recognition of Handwritten Digits", as in scikit-learn.
    """

    def __init__(
        self,
        num_val: int = 180,
        num_test: int = 360,
        upscale: int = 1,
        mask_zero_pixels: bool = False,
        shuffle_seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle_seed=shuffle_seed, mask_zero_pixels=mask_zero_pixels)
        if upscale < 1:
            raise ValueError(f"upscale must be at least 1, got {upscale}")
        self.num_val = num_val
        self.num_test = num_test
        self.upscale = upscale

    def source(self) -> str:
        return "scikit-learn's digits"

    def read(self) -> dict[str, SequenceExamples]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "DigitsData needs scikit-learn, which is not installed; install it with: pip install 'lineara[train]'"
            ) from error
        pixels, labels = load_digits(return_X_y=True)  # (n, 64), (n,)
        num_train = len(labels) - self.num_val - self.num_test
        if min(self.num_val, self.num_test) < 0 or num_train < 1:
            raise ValueError(
                f"num_val and num_test must be at least 0 and leave one of the {len(labels)} images for training, "
                f"got {self.num_val} and {self.num_test}"
            )
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
        images = pixels.astype(np.uint8).reshape(-1, 8, 8)[order]
        images = images.repeat(self.upscale, axis=1).repeat(self.upscale, axis=2)
        examples = as_sequences(images, labels[order])
        # The test images first, so that num_val does not change which they are.
        stops = np.cumsum([0, self.num_test, self.num_val, num_train]).tolist()
        return {split: examples.part(*stops[i : i + 2]) for i, split in enumerate(("test", "val", "train"))}
