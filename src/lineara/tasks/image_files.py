"""Image files: read as colours, listed in a folder."""

import struct
import warnings
import zlib
from pathlib import Path

try:
    from PIL import Image
except ImportError as error:
    raise ImportError(
        "reading images needs Pillow, which is not installed; install it with: pip install 'lineara[train]'"
    ) from error

# As torchvision's data sets.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What Pillow raises on damaged files, and on one that asks for too much memory.
_DAMAGE = (
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


def read_image(path: Path | str) -> Image.Image:
    """The image as colours (mode RGB): grey, palette and CMYK ones are converted. Rotation marks (EXIF) are ignored.

    Raises:
        BrokenImageError: it is missing, no image, or cut off.
    """
    try:
        # Pillow warns of damaged marks and of transparency, of which nothing is used here; damaged pixels raise.
        with warnings.catch_warnings(action="ignore", category=UserWarning), Image.open(path) as image:
            return image.convert("RGB")
    except _DAMAGE as error:
        reason = "no image that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else _words(error)
        raise BrokenImageError(f"{path} must be an image that can be read, got {reason}") from error


def list_images(folder: Path) -> list[Path]:
    """The images directly in a folder, by the ends of their names, sorted.

    Raises:
        FileNotFoundError: there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be a folder of images, got no such folder; name another one")
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in _SUFFIXES)
    found = [path for path in found if not path.name.startswith(".")]
    if not found:
        raise FileNotFoundError(f"{folder} must hold images ({', '.join(_SUFFIXES)}), got none; name another one")
    return found


def _words(error: Exception) -> str:
    """What an error says, without its number and on one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__
