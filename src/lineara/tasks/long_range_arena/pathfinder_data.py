"""Pathfinder: does one path connect the two markers? Drawings, pixel by pixel, 2 classes."""

from pathlib import Path

from lineara.tasks.long_range_arena.examples import SequenceExamples
from lineara.tasks.long_range_arena.pathfinder import PathfinderDrawing
from lineara.tasks.long_range_arena.pathfinder_files import (
    load_pathfinder,
    load_pathfinder_folder,
    prepare_pathfinder,
)
from lineara.tasks.long_range_arena.pixel_data import PixelData, as_sequences


class PathfinderData(PixelData):
    """Pathfinder, drawn here or published: 32 x 32 = 1,024 pixels; at most 257 token ids, see `PixelData`.

    Args:
        data_root: folder that generated sets are kept in.
        published_folder: folder of the published drawings; None generates.
        num_train: training drawings to generate.
        num_val: validation drawings to generate.
        num_test: test drawings to generate.
        contour_len: paddles of a contour: 6 is the easy set, 9 the intermediate, 14 the hard one.
        generator_seed: seed of the generated set, and of the order of training batches.
        batch_size: drawings per batch.
        num_workers: processes that generate; None takes all cores.
        mask_zero_pixels: whether black pixels are hidden, as in the published harnesses.
    """

    def __init__(
        self,
        data_root: str = "data",
        published_folder: str | None = None,
        num_train: int = 160_000,
        num_val: int = 20_000,
        num_test: int = 20_000,
        contour_len: int = 14,
        generator_seed: int = 0,
        batch_size: int = 256,
        num_workers: int | None = None,
        mask_zero_pixels: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle_seed=generator_seed, mask_zero_pixels=mask_zero_pixels)
        self.data_root = data_root
        self.published_folder = published_folder
        self.num_train = num_train
        self.num_val = num_val
        self.num_test = num_test
        self.drawing = PathfinderDrawing(contour_len=contour_len)
        self.generator_seed = generator_seed
        self.num_workers = num_workers

    def source(self) -> Path | str:
        if self.published_folder is not None:
            return self.published_folder
        return prepare_pathfinder(
            self.data_root,
            num_train=self.num_train,
            num_val=self.num_val,
            num_test=self.num_test,
            drawing=self.drawing,
            seed=self.generator_seed,
            num_workers=self.num_workers,
            progress=True,
        )

    def read(self) -> dict[str, SequenceExamples]:
        folder = self.published_folder
        splits = load_pathfinder(self.source()) if folder is None else load_pathfinder_folder(folder)
        return {split: as_sequences(examples.images, examples.labels) for split, examples in splits.items()}
