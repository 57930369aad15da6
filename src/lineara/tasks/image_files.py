"""Image files: read as colours, listed in a folder."""

import struct
import warnings
import zlib
from pathlib import Path

try:
    import numpy as np
    from PIL import ExifTags, Image
    from torch import Tensor
    from torchvision.transforms.v2.functional import pil_to_tensor
except ImportError as error:
    raise ImportError(
        f"reading images needs {error.name}, which is not installed; install it with: "
        "pip install 'lineara[train,vision]'"
    ) from error

# What turns an image of each EXIF orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# As torchvision's data sets.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What Pillow raises on damaged files, and on one that asks for too much memory.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BrokenImageError(ValueError):
    """An image file that cannot be read; the sentence names it."""


def read_image(path: Path | str, *, apply_exif: bool = True) -> Image.Image:
    """The image as colours (mode RGB).

    Grey, palette and CMYK images become red, green and blue; a transparent part keeps the colour below it; of 16 bits,
    the upper 8 count. The image is turned upright by its EXIF orientation, as viewers show it.

    Args:
        path: the file.
        apply_exif: False keeps the pixels as they are stored.

    Raises:
        BrokenImageError: it is missing, no image, cut off, or has values that are no colours.
    """
    try:
        # Pillow warns of damaged notes and of transparency, of which nothing is used here; damaged pixels raise.
        with warnings.catch_warnings(action="ignore", category=UserWarning), Image.open(path) as image:
            return _upright(_as_colours(image), image) if apply_exif else _as_colours(image)
    except DAMAGE as error:
        reason = "no image that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else _words(error)
        raise BrokenImageError(f"{path} must be an image that can be read, got {reason}") from error


def read_pixels(path: Path | str, *, apply_exif: bool = True) -> Tensor:
    """The colours (3, height, width), uint8, of `read_image`."""
    return pil_to_tensor(read_image(path, apply_exif=apply_exif)).contiguous()


def is_image(path: Path | str) -> bool:
    """Whether a path ends as an image's does, and is not hidden."""
    path = Path(path)
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def list_images(folder: Path | str) -> list[Path]:
    """The images directly in a folder, by the ends of their names, sorted.

    Raises:
        FileNotFoundError: there is no such folder, or none in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be a folder of images, got no such folder; name another one")
    found = sorted(path for path in folder.iterdir() if is_image(path) and path.is_file())
    if not found:
        raise FileNotFoundError(f"{folder} must hold images ({', '.join(_SUFFIXES)}), got none; name another one")
    return found


def _upright(colours: Image.Image, image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGE:  # of the notes alone: the pixels have been read
        return colours
    turn = _TURNS.get(orientation)
    return colours if turn is None else colours.transpose(turn)


def _as_colours(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.array(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"values of 32 bits, mode {image.mode}; save it with 8 or 16")
    return image.convert("RGB")


def _words(error: Exception) -> str:
    """What an error says, without its number and on one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__
