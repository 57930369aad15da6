import numpy as np
import pytest
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lineara.viz.example_images import example_images

GREY = np.arange(35, dtype=np.uint8).reshape(5, 7)


def test_every_image_is_shown_unscaled_below_its_title():
    images = [GREY + i for i in range(11)]
    figure = example_images(images, range(11), columns=4, title="eleven")
    assert isinstance(figure, Figure)
    assert [axes.get_title() for axes in figure.axes] == [str(i) for i in range(11)]
    for axes, image in zip(figure.axes, images):
        [shown] = axes.images
        np.testing.assert_array_equal(shown.get_array(), image)
        assert isinstance(shown.norm, Normalize)
        assert (shown.norm.vmin, shown.norm.vmax) == (0, 255)
        assert shown.get_interpolation() == "nearest"
        assert not len(axes.get_xticks())
        assert not len(axes.get_yticks())
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (3, 4)
    assert figure.get_suptitle() == "eleven"
    figure.canvas.draw()


def test_fractions_and_colours_are_shown_as_they_are():
    fractions, colours = np.full((3, 5), 0.25), np.zeros((3, 5, 3), np.uint8)
    grey, colour = example_images([fractions, colours], ["a", "b"]).axes
    assert grey.images[0].norm.vmax == 1
    assert colour.images[0].get_array().shape == (3, 5, 3)


def test_one_array_holds_many_images_and_fewer_than_a_row_make_no_gaps():
    figure = example_images(np.stack([GREY] * 3), "abc")
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (1, 3)
    assert figure.get_suptitle() == ""


@pytest.mark.parametrize(
    ("images", "titles", "columns", "sentence"),
    [
        ([], [], 8, "images must be at least one, and titles as many, got 0 and 0"),
        ([GREY, GREY], ["one"], 8, "images must be .* got 2 and 1"),
        ([GREY], ["one"], 0, "columns must be at least 1, got 0"),
        ([GREY, GREY[0]], "ab", 8, r"images must have the shape \(height, width\) or .* got \(7,\)"),
        ([np.zeros((3, 5, 2))], "a", 8, r"images must have the shape .* got \(3, 5, 2\)"),
        ([np.zeros((0, 5))], "a", 8, r"images must have the shape .* got \(0, 5\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(images, titles, columns, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        example_images(images, titles, columns=columns)
