"""Pathfinder as a data module: generated and published."""

import numpy as np
import pytest
from PIL import Image

from lineara.tasks.long_range_arena import PathfinderData
from lineara.tasks.long_range_arena.pathfinder import generate
from lineara.tasks.long_range_arena.pathfinder_drawing import PathfinderDrawing

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)")

FEW = {"num_train": 12, "num_val": 3, "num_test": 5, "num_workers": 1, "contour_len": 6, "generator_seed": 2}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A folder that holds the set of `FEW`."""
    folder = tmp_path_factory.mktemp("data")
    PathfinderData(data_root=str(folder), **FEW).prepare_data()
    return folder


def make(folder, **options):
    module = PathfinderData(**{"data_root": str(folder), "batch_size": 5, **FEW, **options})
    module.setup("fit")
    return module


def images_of(module, split):
    return module.split(split).tokens.reshape(-1, 32, 32)


def test_it_is_the_generated_set_of_its_parameters(generated):
    module = make(generated)
    assert [len(module.split(split)) for split in ("train", "val", "test")] == [12, 3, 5]
    expected = generate(20, drawing=PathfinderDrawing(contour_len=6), seed=2, num_workers=1, progress=False)
    assert np.array_equal(
        np.concatenate([images_of(module, split) for split in ("train", "val", "test")]), expected.images
    )
    labels = np.concatenate([module.split(split).labels for split in ("train", "val", "test")])
    assert np.array_equal(labels, expected.labels)
    assert module.shuffle_seed == 2


def test_the_set_is_kept(generated):
    before = {path: path.stat().st_mtime_ns for path in generated.rglob("*.npz")}
    file, *splits = make(generated).summary()
    assert {path: path.stat().st_mtime_ns for path in generated.rglob("*.npz")} == before
    assert [str(path) for path in before] == [file]
    assert splits[0] == "train: 12 examples; classes 0: 50.0%, 1: 50.0%"


def test_a_batch_has_1024_pixels_and_hides_the_black_ones_only_when_told(generated):
    [batch] = make(generated).test_dataloader()
    assert batch["tokens"].shape == (5, 1024)
    assert batch["mask"].all()
    assert np.array_equal(batch["tokens"].reshape(5, 32, 32) - 1, images_of(make(generated), "test"))
    [batch] = make(generated, mask_zero_pixels=True).test_dataloader()
    assert np.array_equal(batch["tokens"].reshape(5, 32, 32), images_of(make(generated), "test"))
    assert 0 < batch["mask"].sum() < batch["mask"].numel() / 2


def test_the_benchmark_is_the_default():
    module = PathfinderData()
    assert (module.num_train, module.num_val, module.num_test) == (160_000, 20_000, 20_000)
    assert (module.drawing, module.batch_size, module.shift) == (PathfinderDrawing(contour_len=14), 256, 1)


def test_a_published_folder_is_read_in_place_of_a_generated_set(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (10, 32, 32), np.uint8)
    (tmp_path / "imgs/0").mkdir(parents=True)
    (tmp_path / "metadata").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"imgs/0/sample_{number}.png")
    lines = [f"imgs/0 sample_{number}.png {number} {int(number % 3 == 0)} 1 2 3\n" for number in range(10)]
    (tmp_path / "metadata/0.npy").write_text("".join(lines))
    module = make(tmp_path / "none", published_folder=str(tmp_path))
    assert not (tmp_path / "none").exists()
    assert next(module.summary()) == str(tmp_path)
    for split, numbers in (("train", range(8)), ("val", [8]), ("test", [9])):
        assert np.array_equal(images_of(module, split), images[list(numbers)])
        assert module.split(split).labels.tolist() == [int(number % 3 == 0) for number in numbers]


def test_a_published_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}/none must be a published folder"):
        make(tmp_path, published_folder=str(tmp_path / "none"))


def test_it_is_trained_tested_and_predicted(generated, run_task):
    data = {
        "class_path": "lineara.tasks.long_range_arena.PathfinderData",
        "init_args": {"data_root": str(generated), "batch_size": 4, **FEW},
    }
    scores, predictions = run_task(data, num_classes=2, max_len=1024)
    assert "test/accuracy_of_majority_class" in scores
    expected = images_of(make(generated), "test").reshape(5, 1024).tolist()
    assert [list(map(int, row["tokens"].split())) for row in predictions] == expected
