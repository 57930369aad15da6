"""Digits: a small set that comes with scikit-learn, to stand in for ImageNet; 10 classes."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms import v2

from lineara.tasks.image_classification.data import ImageClassificationData

# Not the shuffling seed: runs with different orders of batches are judged on the same images.
_SPLIT_SEED = 0
_NUM_IMAGES = 1797
_SHADES = 16


class DigitsData(ImageClassificationData):
    """Handwritten digits of 8 x 8 pixels, white on black, as colour images.

    It needs no download, and shows whether a network learns from images at all. The 1,797 images are always split in
    the same way.

    Args:
        num_val: images for validation.
        num_test: images for testing.
        upscale: each pixel is repeated so often in height and width; 4 makes images of 32 x 32.
        max_shift: a training image is moved by up to so many of its 8 pixels, up or down and left or right.
        predict_folder: folder of images to predict; they are resized to that size, and their colours dropped.
        shuffle_seed: seed of the order of training images and of their augmentation.
        batch_size: images per batch and process.

    Source: Alpaydin, Kaynak, 1998, "Optical Recognition of Handwritten Digits", as in scikit-learn.
    """

    def __init__(
        self,
        num_val: int = 180,
        num_test: int = 360,
        upscale: int = 4,
        max_shift: int = 1,
        predict_folder: str | None = None,
        shuffle_seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=0,  # the images lie in memory
            skip_broken=False,
            shuffle_seed=shuffle_seed,
            predict_folder=predict_folder,
        )
        for name, value, least in (("upscale", upscale, 1), ("max_shift", max_shift, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if min(num_val, num_test) < 0 or num_val + num_test >= _NUM_IMAGES:
            raise ValueError(
                f"num_val and num_test must be at least 0 and leave one of the {_NUM_IMAGES} images for training, got "
                f"{num_val} and {num_test}"
            )
        self.num_val = num_val
        self.num_test = num_test
        self.upscale = upscale
        side = 8 * upscale
        self.augment = v2.Compose([v2.RandomCrop(side, padding=max_shift * upscale), v2.Grayscale(3)])
        self.fit = v2.Compose([v2.ToImage(), v2.Resize((side, side)), v2.Grayscale(3)])
        self.to_input = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3), v2.ToPureTensor()]
        )

    @property
    def classes(self) -> list[str]:
        return list("0123456789")

    def source(self) -> str:
        return "scikit-learn's digits"

    def read(self, split: str) -> "_Digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "DigitsData needs scikit-learn, which is not installed; install it with: pip install 'lineara[train]'"
            ) from error
        pixels, labels = load_digits(return_X_y=True)  # (n, 64), (n,)
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
        # The test images first, so that num_val does not change which they are.
        stops = {"test": (0, self.num_test), "val": (self.num_test, self.num_test + self.num_val)}
        first, last = stops.get(split, (self.num_test + self.num_val, len(labels)))
        chosen = order[first:last]
        images = (pixels[chosen] * (255 / _SHADES)).round().astype(np.uint8).reshape(-1, 8, 8)
        images = images.repeat(self.upscale, axis=1).repeat(self.upscale, axis=2)
        return _Digits(images, labels[chosen])


class _Digits:
    """Grey images (n, height, width), each as (1, height, width)."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer]) -> None:
        self.images = torch.from_numpy(images)
        self.targets: Sequence[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index][None], self.targets[index]
