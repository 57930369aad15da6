"""Image: CIFAR-10 in grey, pixel by pixel, 10 classes."""

import pickle
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lineara.tasks.long_range_arena.examples import SequenceExamples
from lineara.tasks.long_range_arena.pixel_data import PixelData, as_sequences

_WEIGHTS = (0.2989, 0.5870, 0.1140)


class ImageData(PixelData):
    """CIFAR-10 in grey, 32 x 32 = 1,024 pixels; at most 257 token ids, see `PixelData`.

    The last training images are for validation: of the published files, 45,000 train, 5,000 validate, 10,000 test.

    Args:
        data_root: folder that holds cifar-10-batches-py, the published set in its form for Python.
        num_val: training images to hold out for validation.
        mask_zero_pixels: whether black pixels are hidden, as in the published harnesses.
        shuffle_seed: seed of the order of training batches.
        batch_size: images per batch.

    Source: Krizhevsky, 2009, "Learning Multiple Layers of Features from Tiny Images". We differ from the arena's
    published split in which 5,000 training images validate: its reader has them in another order.
    """

    def __init__(
        self,
        data_root: str = "data",
        num_val: int = 5_000,
        mask_zero_pixels: bool = False,
        shuffle_seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle_seed=shuffle_seed, mask_zero_pixels=mask_zero_pixels)
        self.data_root = data_root
        self.num_val = num_val

    def source(self) -> Path:
        return Path(self.data_root) / "cifar-10-batches-py"

    def read(self) -> dict[str, SequenceExamples]:
        given, test = (self._read(train=train) for train in (True, False))
        if not 0 <= self.num_val < len(given):
            raise ValueError(
                f"num_val must be at least 0 and below the {len(given)} training images, got {self.num_val}"
            )
        num_train = len(given) - self.num_val
        return {"train": given.part(0, num_train), "val": given.part(num_train, len(given)), "test": test}

    def _read(self, *, train: bool) -> SequenceExamples:
        try:
            from torchvision.datasets import CIFAR10
        except ImportError as error:
            raise ImportError(
                "ImageData needs torchvision, which is not installed; install it with: pip install 'lineara[vision]'"
            ) from error
        files = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)] + [CIFAR10.meta["filename"]]
        if missing := [name for name in files if not (self.source() / name).is_file()]:
            raise FileNotFoundError(
                f"{self.source()} must hold CIFAR-10 in its form for Python, got no {missing[0]} there; unpack the "
                "published archive, so that cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta} lie in "
                "data_root, or set data_root"
            )
        try:
            images = CIFAR10(self.data_root, train=train)
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.source()} must hold CIFAR-10 as it was published, got files with another checksum; unpack the "
                "published archive again"
            ) from error
        return as_sequences(grey(images.data), np.array(images.targets))


def grey(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Luminance (..., height, width) of colours (..., height, width, 3), rounded as the published harness does.

    floor(255.5 * (0.2989 red + 0.5870 green + 0.1140 blue) / 255)
    """
    scale = np.float32(255.5 / 255)
    red, green, blue = (np.float32(weight) * scale * images[..., i] for i, weight in enumerate(_WEIGHTS))
    return (red + green + blue).astype(np.uint8)
