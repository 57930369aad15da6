"""Images to batches. A batch is a dict:

key        shape                      dtype    meaning
image      (batch, 3, height, width)  float32  colours, normalised as the network is used to
label      (batch,)                   int64    the class
file_name  (batch,)                   str      in place of the label, in batches to predict
broken     any number                 str      a sentence on each image of the batch that is left out as unreadable
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from lineara.tasks.image_files import BrokenImageError, list_images, read_image
from lineara.tasks.random_numbers import random_numbers_from

_NAMED_IMAGES = 10


class LabelledImages(Protocol):
    """What the loaders need of a split; reading one may raise `BrokenImageError`."""

    @property
    def targets(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


class ImageClassificationData(LightningDataModule):
    """Loaders over the splits that a subclass reads, and over a folder of images to predict.

    An epoch is resumed where a checkpoint left it: the order of training images and what augmentation does to each
    follow from the seed and the epoch, whatever the number of workers. An incomplete last batch of training is left
    out, so that steps are equally large; processes of a distributed run share an epoch evenly.

    Args:
        batch_size: images per batch and process.
        num_workers: processes that read images; 0 reads in this one.
        skip_broken: whether images that cannot be read are left out, with a warning, instead of ending the run.
            Images to predict always are.
        shuffle_seed: seed of the order of training images and of their augmentation.
        predict_folder: folder of images to predict.
    """

    # From an image as it is read to one of the network's size, in training and elsewhere; then to its input.
    augment: Callable[[Any], Any]
    fit: Callable[[Any], Any]
    to_input: Callable[[Any], Tensor]

    def __init__(
        self, *, batch_size: int, num_workers: int, skip_broken: bool, shuffle_seed: int, predict_folder: str | None
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.skip_broken = skip_broken
        self.shuffle_seed = shuffle_seed
        self.predict_folder = predict_folder
        self._splits: dict[str, LabelledImages] = {}
        self._reported: set[str] = set()
        self._batches_done = 0

    @abstractmethod
    def source(self) -> Path | str:
        """Where the set lies."""

    @abstractmethod
    def read(self, split: str) -> LabelledImages:
        """The split "train", "val" or "test"."""

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """The names of the classes in the order of their labels, once a split has been read."""

    def setup(self, stage: str) -> None:
        """Read the splits of the stage, and refuse a training split without a whole batch."""
        if stage == "predict":
            self._splits[stage] = _Unlabelled(self.predict_folder)
            return
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,)):
            self.split(split)
        share = len(self._order("train", shuffle=True)) if stage == "fit" else self.batch_size
        if share < self.batch_size:
            raise ValueError(
                f"batch_size must be at most the {share} training images of a process, got {self.batch_size}; set "
                "--data.batch_size"
            )

    def split(self, name: str) -> LabelledImages:
        """The images of "train", "val" or "test", read once; of "predict", once `setup` has listed them."""
        if name not in self._splits:
            self._splits[name] = self.read(name)
        return self._splits[name]

    def train_dataloader(self) -> DataLoader[Any]:
        start, self._batches_done = self._batches_done * self.batch_size, 0
        return self._loader("train", shuffle=True, start=start)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("predict")

    def photograph(self, image: Image.Image) -> tuple[Tensor, npt.NDArray[np.uint8]]:
        """What a network is given of a photograph, and the same for a person to look at.

        Returns:
            (3, height, width) as an item of a batch, and (height, width, 3) in 0..255.
        """
        shown = v2.functional.to_image(self.fit(image))  # (3, height, width)
        return self.to_input(shown), shown.permute(1, 2, 0).numpy()

    def summary(self) -> Iterator[str]:
        """Where the set lies, then images, classes and images per class of each split; a line each."""
        yield str(self.source())
        for split in ("train", "val", "test"):
            counts = np.bincount(self.split(split).targets, minlength=1)
            yield (
                f"{split}: {counts.sum():,} images, {np.count_nonzero(counts):,} classes of {counts.min():,} to "
                f"{counts.max():,} images"
            )

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Report what could not be read: here, because a worker's exception would carry its whole traceback."""
        predicting = self.trainer is not None and self.trainer.predicting
        for sentence in batch["broken"]:
            if not (self.skip_broken or predicting):
                raise ValueError(f"{sentence}; mend or remove it, or leave such images out by --data.skip_broken true")
            self._report(sentence, most=np.inf if predicting else _NAMED_IMAGES)
        return batch

    def state_dict(self) -> dict[str, int]:
        """How far into the epoch a checkpoint is, so that a resumed run goes on with the next batch."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {"batches_done": progress.ready % int(self.trainer.num_training_batches)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._batches_done = state_dict["batches_done"]

    def _report(self, sentence: str, *, most: float) -> None:
        if sentence in self._reported:
            return
        self._reported.add(sentence)
        if len(self._reported) <= most:
            warnings.warn(f"{sentence}; it is left out", RuntimeWarning, stacklevel=2)
        elif len(self._reported) == most + 1:
            warnings.warn(
                f"more than {most} images are broken and left out: no more are named", RuntimeWarning, stacklevel=2
            )

    def _order(self, split: str, *, shuffle: bool, start: int = 0) -> "EpochOrder":
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        return EpochOrder(
            len(self.split(split)),
            shuffle=shuffle,
            seed=self.shuffle_seed,
            start=start,
            num_processes=processes,
            rank=rank,
        )

    def _loader(self, split: str, *, shuffle: bool = False, start: int = 0) -> DataLoader[Any]:
        transform = v2.Compose([self.augment if shuffle else self.fit, self.to_input])
        # A generator of its own keeps the loader from drawing on the random numbers of the training.
        return DataLoader(
            _TransformedImages(self.split(split), transform),
            batch_size=self.batch_size,
            sampler=self._order(split, shuffle=shuffle, start=start),
            collate_fn=partial(_collate, target="file_name" if split == "predict" else "label"),
            drop_last=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )


class EpochOrder(DistributedSampler[Any]):
    """One process's images of an epoch, each as (its number, the seed of its augmentation).

    Shuffled, both depend on the seed and the epoch alone, and all processes have equally many images: the first ones
    once more where they do not come out even. Not shuffled, every image is one process's.

    Args:
        num_images: of the split.
        shuffle: whether the order is random.
        seed: of the random order.
        start: images to leave out of the first epoch, which a resumed run has seen already.
        num_processes, rank: how many processes share the epoch, and which of them this is.
    """

    # A DistributedSampler in name only: Lightning leaves those alone, and would wrap another so that it misses epochs.
    def __init__(
        self, num_images: int, *, shuffle: bool, seed: int = 0, start: int = 0, num_processes: int = 1, rank: int = 0
    ) -> None:
        numbers: Any = range(num_images)
        super().__init__(numbers, num_processes, rank, shuffle=shuffle, seed=seed)
        self.num_images = num_images
        self.start = start
        if not shuffle:
            self.num_samples = len(range(rank, num_images, num_processes))

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        random = np.random.default_rng((self.seed, self.epoch))
        order = np.arange(self.num_images)
        if self.shuffle:
            order = np.resize(random.permutation(self.num_images), self.num_samples * self.num_replicas)
        seeds = random.integers(2**63, size=self.num_images)
        for index in order[self.rank :: self.num_replicas][start:]:
            yield int(index), int(seeds[index])


class _TransformedImages(Dataset[Any]):
    """Items (image, target), or a sentence on a broken image; indexed as `EpochOrder` says."""

    def __init__(self, images: LabelledImages, transform: Callable[[Any], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Any] | str:
        index, seed = item
        try:
            image, target = self.images[index]
        except BrokenImageError as error:
            return str(error)
        with random_numbers_from(seed):
            return self.transform(image), target


class _Unlabelled:
    """Images of a folder, with their file names in place of labels."""

    targets: Sequence[int] = ()

    def __init__(self, folder: str | None) -> None:
        if folder is None:
            raise ValueError("predict_folder must name a folder of images, got none; set --data.predict_folder")
        self.files = list_images(Path(folder))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return read_image(self.files[index]), self.files[index].name


def _collate(items: Sequence[tuple[Tensor, Any] | str], *, target: str) -> dict[str, Any]:
    read = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0, 3, 0, 0)
    targets: Any = [value for _, value in read]
    if target == "label":
        targets = torch.tensor(targets, dtype=torch.int64)
    return {"image": images, target: targets, "broken": [item for item in items if isinstance(item, str)]}
