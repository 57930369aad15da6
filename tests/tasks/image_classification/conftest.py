"""What the tests of image classification share."""

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other on a busy machine take a hundred times as long over such small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def write_set():
    """Writes a set of noisy images in folders of classes; the classes differ in their mean colours."""

    def write(root, **splits):
        random = np.random.default_rng(0)
        for split, counts in splits.items():
            for label, (name, count) in enumerate(counts.items()):
                folder = root / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    pixels = random.integers(120, size=(9 + index % 5, 11, 3), dtype=np.uint8)
                    pixels[:, :, label % 3] += np.uint8(100)
                    Image.fromarray(pixels).save(folder / f"{name}_{index}.png")
        return root

    return write
