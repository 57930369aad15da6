"""Portable float maps: read as others write them, refused when damaged, written so that others read them."""

import numpy as np
import pytest
from torchvision.datasets.utils import _read_pfm

from lineara.tasks.stereo_depth.pfm import read_pfm, write_pfm

ROWS = [[1.5, -2.0, 3.25], [np.inf, 5.0, 6.0]]


@pytest.mark.parametrize("order", ["<", ">"])
def test_rows_come_from_the_bottom_in_either_order_of_bytes(tmp_path, make, order):
    path = tmp_path / "map.pfm"
    path.write_bytes(make.pfm_bytes(ROWS, order=order))
    values = read_pfm(path)
    assert values.dtype == np.float32
    assert values.flags["C_CONTIGUOUS"]
    assert values.tolist() == ROWS
    values[0, 0] = 7  # it can be written to


def test_the_bytes_of_a_file_written_by_hand(tmp_path):
    path = tmp_path / "map.pfm"
    # 1.0 is 3f800000 and 2.0 is 40000000: the lower row, then the upper one.
    path.write_bytes(b"Pf\n1 2\n1.0\n" + bytes.fromhex("3f800000 40000000"))
    assert read_pfm(path).tolist() == [[2.0], [1.0]]
    path.write_bytes(b"Pf\n1 2\n-1.0\n" + bytes.fromhex("0000803f 00000040"))
    assert read_pfm(path).tolist() == [[2.0], [1.0]]


@pytest.mark.parametrize(
    "header", [b"Pf 3 2 -0.003922\n", b"Pf\r\n3 2\r\n-1\r\n", b"Pf\n3\n2\n-255\n", b"Pf\n3  2\n-1 "]
)
def test_headers_as_other_programs_write_them(tmp_path, header):
    """Also where the first value begins with the byte of a line's end, and whatever the size of the scale."""
    rows = np.array([[1, 2, 3], [4, 5, 6]], "<f4")
    rows[1, 0] = np.frombuffer(b"\n\r\n\x40", "<f4")[0]
    path = tmp_path / "map.pfm"
    path.write_bytes(header + rows[::-1].tobytes())
    assert np.array_equal(read_pfm(path), rows)


def test_three_channels(tmp_path):
    values = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    path = tmp_path / "map.pfm"
    write_pfm(path, values)
    assert path.read_bytes().startswith(b"PF\n5 2\n")
    assert np.array_equal(read_pfm(path), values)
    assert np.array_equal(read_pfm(path, channels=3), values)
    with pytest.raises(ValueError, match=r"map\.pfm must have 1 channel, got 3 channels$"):
        read_pfm(path, channels=1)
    write_pfm(path, values[..., 0])
    with pytest.raises(ValueError, match=r"map\.pfm must have 3 channels, got 1 channel$"):
        read_pfm(path, channels=3)


def test_torchvision_reads_what_is_written(tmp_path):
    values = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32)
    values[2, 3] = np.inf
    write_pfm(tmp_path / "map.pfm", values[:, ::-1])  # not contiguous
    assert np.array_equal(_read_pfm(tmp_path / "map.pfm", slice_channels=1)[0], values[:, ::-1])
    assert np.array_equal(read_pfm(tmp_path / "map.pfm"), values[:, ::-1])
    write_pfm(tmp_path / "doubles.pfm", values.astype(np.float64))
    assert np.array_equal(read_pfm(tmp_path / "doubles.pfm"), values)


@pytest.mark.parametrize("end", [b"\n", b" \n", b" \t\r\n", b" "])
def test_blanks_behind_the_scale_are_no_values(tmp_path, end):
    values = np.frombuffer(b" \t\t " * 6, "<f4").reshape(2, 3)  # values that begin like blanks stay whole
    (tmp_path / "map.pfm").write_bytes(b"Pf\n3 2\n-1" + end + values.tobytes())
    assert np.array_equal(read_pfm(tmp_path / "map.pfm"), values)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"must begin as a portable float map does, with Pf or PF, width, height and scale, got b''"),
        (b"P5\n3 2\n255\n123456", r"must begin as a portable float map does, .* got b'P5.*'"),
        (b"Pf\n3 2\n", r"must begin as a portable float map does, .*"),
        (b"Pf\n3 two\n-1\n", r"must have numbers for width, height and scale, got '3 two -1'"),
        (b"Pf\n0_3 2\n-1\n" + bytes(24), r"must have numbers for width, height and scale, got '0_3 2 -1'"),
        (b"Pf\n3.5 2\n-1\n", r"must have numbers for width, height and scale, got '3\.5 2 -1'"),
        (b"Pf\n3 2\nlittle\n", r"must have numbers for width, height and scale, got '3 2 little'"),
        (b"Pf\n\xff 2\n-1\n", r"must have numbers for width, height and scale, got .*"),
        (b"Pf\n0 2\n-1\n", r"must have a width and a height of at least 1, got 0 and 2"),
        (b"Pf\n3 -2\n-1\n", r"must have a width and a height of at least 1, got 3 and -2"),
        (b"Pf\n3 2\n0\n" + bytes(24), r"must have a scale below or above 0, got 0\.0"),
        (b"Pf\n3 2\nnan\n" + bytes(24), r"must have a scale below or above 0, got nan"),
        (b"Pf\n3 2\n-1\n" + bytes(23), r"must hold 2 x 3 values of 1 channel, 24 bytes, .* got 23; get the file again"),
        (b"Pf\n3 2\n-1\n" + bytes(25), r"must hold 2 x 3 values of 1 channel, 24 bytes, .* got 25; get the file again"),
        (
            b"PF\n3 2\n-1\n" + bytes(24),
            r"must hold 2 x 3 values of 3 channels, 72 bytes, .* got 24; get the file again",
        ),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "map.pfm"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^\S*map\.pfm {sentence}$"):
        read_pfm(path)


def test_a_header_that_asks_for_more_than_there_is_allocates_nothing(tmp_path, monkeypatch):
    path = tmp_path / "map.pfm"
    path.write_bytes(b"Pf\n100000 100000\n-1\n")
    monkeypatch.setattr(np, "frombuffer", None)
    with pytest.raises(
        ValueError, match=r"must hold 100000 x 100000 values of 1 channel, 40,000,000,000 bytes, .* got 0"
    ):
        read_pfm(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.pfm must be a portable float map, got no such file$"):
        read_pfm(tmp_path / "no.pfm")
    with pytest.raises(OSError, match=r"must be a file that can be read, got Is a directory$"):
        read_pfm(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "map.pfm"
    write_pfm(path, np.ones((2, 3)))
    before = path.read_bytes()

    class Full:
        data = property(lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    monkeypatch.setattr(np, "ascontiguousarray", lambda *_, **__: Full())
    with pytest.raises(OSError, match=r"map\.pfm must be writable, got No space left on device"):
        write_pfm(path, np.zeros((2, 3)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 3, 2), (1, 2, 3, 3)])
def test_values_of_another_shape_are_refused(tmp_path, shape):
    with pytest.raises(
        ValueError, match=r"^values must be \(height, width\) or \(height, width, 3\) and not empty, got"
    ):
        write_pfm(tmp_path / "map.pfm", np.zeros(shape))
    assert list(tmp_path.iterdir()) == []
