"""Tiny sets in the forms of Scene Flow, KITTI, Middlebury and ETH3D, which tests write and damage as they like."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HEIGHT, WIDTH = 23, 31


def pfm_bytes(rows, *, order="<"):
    """A file of one channel, written here by hand: rows from the bottom to the top."""
    rows = np.asarray(rows, np.float32)
    scale = {"<": -1, ">": 1}[order]
    header = f"Pf\n{rows.shape[1]} {rows.shape[0]}\n{scale}\n".encode()
    return header + b"".join(row.astype(f"{order}f4").tobytes() for row in rows[::-1])


def random_image(seed, size=(HEIGHT, WIDTH)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def random_truth(seed, size=(HEIGHT, WIDTH)):
    return np.random.default_rng(seed).uniform(0.5, 19.0, size).astype(np.float32)


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))


def write_bytes(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


FLYING = [f"{part}/{letter}/{scene}" for part in ("TRAIN", "TEST") for letter in "AB" for scene in ("0000", "0001")]
OTHERS = {"Monkaa": ["eating_x2", "flower"], "Driving": ["15mm_focallength/scene_backwards/fast"]}


def write_scene_flow(root, *, suffix=".png", image_pass="frames_cleanpass", right_truths=True):
    """Two frames of each scene; returns the root."""
    root = Path(root)
    scenes = [("FlyingThings3D", scene) for scene in FLYING]
    scenes += [(name, scene) for name, those in OTHERS.items() for scene in those]
    for number, (name, scene) in enumerate(scenes):
        for frame in ("0006", "0007"):
            seed = 10 * number + int(frame)
            for place, view in enumerate(("left", "right")):
                image = root / name / image_pass / scene / view / f"{frame}{suffix}"
                write_image(image, random_image([seed, place]))
                if view == "left" or right_truths:
                    truth = root / name / "disparity" / scene / view / f"{frame}.pfm"
                    write_bytes(truth, pfm_bytes(random_truth([seed, place])))
    return root


def write_kitti(root, year=2015, frames=7):
    """Of each frame the views and truths of 16 bits, of which every third column has none."""
    root = Path(root)
    names = {2012: ["colored_0", "colored_1"], 2015: ["image_2", "image_3"]}[year]
    truths = {2012: ["disp_occ", "disp_noc"], 2015: ["disp_occ_0", "disp_noc_0", "disp_occ_1", "disp_noc_1"]}[year]
    for number in range(frames):
        for place, folder in enumerate(names):
            for time in ("10", "11"):
                write_image(
                    root / "training" / folder / f"{number:06}_{time}.png", random_image([number, place, int(time)])
                )
        for place, folder in enumerate(truths):
            values = (random_truth([number, place]) * 256).astype(np.uint16)
            values[:, ::3] = 0
            write_image(root / "training" / folder / f"{number:06}_10.png", values)
    return root


def write_scene(views, truths, number, *, names=("disp0.pfm", "disp1.pfm"), mask=False):
    """A scene of Middlebury's or ETH3D's kind: infinite truths in the first row."""
    for place in (0, 1):
        write_image(views / f"im{place}.png", random_image([number, place]))
    for place, name in enumerate(names):
        truth = random_truth([number, place])
        truth[0] = np.inf
        write_bytes(truths / name, pfm_bytes(truth))
    if mask:
        values = np.full((HEIGHT, WIDTH), 255, np.uint8)
        values[:, :5], values[:, 5:9] = 0, 128
        write_image(truths / "mask0nocc.png", values)


def plain(tensor):
    """An image of a frame, as numpy has it."""
    return tensor.permute(1, 2, 0).numpy()


@pytest.fixture(scope="session")
def make():
    """The functions above, by their names."""
    return type("Make", (), {name: staticmethod(value) for name, value in globals().items() if callable(value)})


@pytest.fixture(params=[struct.error, zlib.error, IndexError, EOFError, Image.DecompressionBombError])
def opens_damaged(request, monkeypatch):
    """From its call on, every image fails to open as damaged ones do in Pillow."""

    def fail(*_, **__):
        raise request.param("damage")

    return lambda: monkeypatch.setattr(Image, "open", fail)
