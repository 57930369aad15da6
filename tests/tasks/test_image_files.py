"""Image files of every kind as colours, broken ones by name, and those of a folder."""

import re
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lineara.tasks import image_files
from lineara.tasks.image_files import BrokenImageError, list_images, read_image, read_pixels

RED = (255, 0, 0)


def pixels_of(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.array(image)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "jpg"])
def test_colours_are_read_from_every_format(tmp_path, suffix):
    image = Image.new("RGB", (5, 7), RED)
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    found = pixels_of(tmp_path / f"a.{suffix}")
    assert found.shape == (7, 5, 3)
    assert np.abs(found.astype(int) - RED).max() <= 2 * (suffix == "jpg")


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
def test_other_modes_become_colours(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode).save(path)
    assert pixels_of(path).min() >= 250


def test_a_palette_with_transparent_entries_is_read_without_a_warning(tmp_path):
    image = Image.new("P", (3, 2))
    image.putpalette([*RED, 0, 255, 0])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert pixels_of(tmp_path / "a.png").reshape(-1, 3).tolist() == [list(RED)] * 6


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_images_are_turned_upright(tmp_path, orientation, suffix):
    colours = np.kron(np.random.default_rng(0).integers(0, 2, (3, 5, 3)) * 255, np.ones((16, 16, 1))).astype(np.uint8)
    image, path = Image.fromarray(colours), tmp_path / f"a{suffix}"
    marks = image.getexif()
    marks[0x0112] = orientation
    image.save(path, exif=marks, quality=100)
    stored = np.array(read_image(path, apply_exif=False)).astype(int)
    assert np.abs(stored - colours).mean() < 30  # which is not less wrong for any other orientation
    with Image.open(path) as again:
        assert np.array_equal(read_image(path), ImageOps.exif_transpose(again.convert("RGB")))


def test_of_16_bits_the_upper_8_count(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (13, 17), dtype=np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(tmp_path / "a.png")
    assert np.array_equal(pixels_of(tmp_path / "a.png"), np.stack([grey] * 3, axis=2))


def test_printing_colours_become_those_of_a_screen(tmp_path):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, 8:, 0] = 255  # cyan beside white
    Image.frombytes("CMYK", (16, 16), inks.tobytes()).save(tmp_path / "a.jpg", quality=100)
    pixels = pixels_of(tmp_path / "a.jpg").astype(float)
    assert pixels[:, :8].mean((0, 1)).tolist() == pytest.approx([255] * 3, abs=3)
    assert pixels[:, 8:].mean((0, 1)).tolist() == pytest.approx([0, 255, 255], abs=6)


def test_what_is_below_transparency_is_kept(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    Image.fromarray(np.concatenate([colours, np.zeros((13, 17, 1), np.uint8)], axis=2)).save(tmp_path / "a.png")
    assert np.array_equal(pixels_of(tmp_path / "a.png"), colours)


def test_values_that_are_no_colours_are_refused(tmp_path):
    Image.fromarray(np.ones((13, 17), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(
        BrokenImageError, match=r"a\.tif must be .*, got values of 32 bits, mode F; save it with 8 or 16$"
    ):
        read_image(tmp_path / "a.tif")


def test_pixels_are_the_colours_as_a_tensor(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    pixels = read_pixels(tmp_path / "a.png")
    assert (pixels.dtype, pixels.shape, pixels.is_contiguous()) == (torch.uint8, (3, 13, 17), True)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), colours)


def noise(path):
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 30, 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_a_file_that_is_cut_off_is_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    content = noise(path)
    for length in (1, 20, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises(
            BrokenImageError, match=rf"^{re.escape(str(path))} must be an image that can be read, got \S"
        ):
            read_image(path)


def test_damaged_content_is_named(tmp_path):
    path = tmp_path / "a.png"
    content = bytearray(noise(path))
    content[100:140] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(BrokenImageError, match=f"^{re.escape(str(path))} must be an image"):
        read_image(path)


@pytest.mark.parametrize(("content", "reason"), [(b"", "no image"), (b"text", "no image"), (None, "No such file")])
def test_what_is_no_image_is_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BrokenImageError, match=f"got {reason}[^\n]*$"):
        read_image(path)


def test_the_images_of_a_folder_are_sorted_and_other_files_left_out(tmp_path):
    for name in ("b.JPEG", "a.png", "c.webp", "c.Tif", "notes.txt", ".a.png", "d.jpg.part"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.JPEG", "c.Tif", "c.webp"]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold images \(\.jpg, .*\), got none; name another one$"):
        list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must be a folder of images, got no such folder; name another one$"):
        list_images(tmp_path / "nowhere")


def test_without_pillow_it_names_the_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"^reading images needs PIL.*: pip install 'lineara\[train,vision\]'$"):
        runpy.run_path(image_files.__file__)
