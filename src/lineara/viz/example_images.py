"""Examples of a set of images, each with its label above."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure


def example_images(
    images: Sequence[npt.NDArray[np.generic]] | npt.NDArray[np.generic],
    titles: Sequence[object],
    *,
    columns: int = 8,
    title: str | None = None,
) -> Figure:
    """Draw images row by row, without interpolation, as bright as they are.

    Args:
        images: each (height, width) grey or (height, width, 3) in colour; integers in 0..255 or numbers in 0..1.
        titles: what to write above each.
        columns: images in a row, at least 1.
        title: above all of them.

    Returns:
        A figure of one panel per image.

    Raises:
        ValueError: for no images, images of another shape, another number of titles, or no columns.
    """
    pictures = [np.asarray(image) for image in images]
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if not pictures or len(pictures) != len(titles):
        raise ValueError(f"images must be at least one, and titles as many, got {len(pictures)} and {len(titles)}")
    for picture in pictures:
        if picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)) or not picture.size:
            raise ValueError(f"images must have the shape (height, width) or (height, width, 3), got {picture.shape}")
    num_columns = min(columns, len(pictures))
    num_rows = -(-len(pictures) // num_columns)
    height_per_width = max(picture.shape[0] / picture.shape[1] for picture in pictures)
    size = (1.5 * num_columns, (1.5 * height_per_width + 0.3) * num_rows + (0.4 if title else 0.0))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=12)
    cells = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for cell, picture, label in zip(cells, pictures, titles):
        most = 255 if np.issubdtype(picture.dtype, np.integer) else 1
        cell.imshow(picture, cmap="gray", vmin=0, vmax=most, interpolation="nearest")
        cell.set_title(str(label), fontsize=10)
        cell.set_xticks([])
        cell.set_yticks([])
    for cell in list(figure.axes)[len(pictures) :]:
        cell.remove()
    return figure
