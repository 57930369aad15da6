"""The rows of the attention suite, and the file that keeps them: written whole after each of them."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from attention.shapes import Shape
from lineara.measure.machine import write_text

MEASURED = "measured"


@dataclass(frozen=True)
class Row:
    """One contender at one shape in one pass, and what was found.

    Args:
        status: `"measured"`, or `"not run: <reason>"`; then all that follows `code` is None.
        code: digest of the sources that ran; what other sources measured is another case.
        seconds: median of a call with its launches; `seconds_low` and `seconds_high` are the tenth and ninetieth
            percentile of `repeats` calls.
        device_seconds: median without the launches, on CUDA devices, where they could matter.
        copy_bytes_per_second: what a large copy reached in the same run.
        fraction_of_copy: bytes of the smallest possible traffic over `seconds`, as a fraction of that.
        error: the largest relative error of output and gradients against the reference.
        peak_bytes: the most memory at any moment beyond the inputs.
    """

    contender: str
    formula: str
    batch: int
    heads: int
    positions: int
    key_dim: int
    value_dim: int
    pass_name: str
    dtype: str
    device: str
    status: str
    machine: str
    versions: str
    commit: str
    code: str
    date: str
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    repeats: int | None = None
    device_seconds: float | None = None
    copy_bytes_per_second: float | None = None
    fraction_of_copy: float | None = None
    copies: int | None = None
    error: float | None = None
    peak_bytes: int | None = None
    picked: str | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.batch, self.heads, self.positions, self.key_dim, self.value_dim)

    @property
    def measured(self) -> bool:
        return self.status == MEASURED

    @property
    def case(self) -> tuple[object, ...]:
        """What a file has one row of."""
        setting = (self.dtype, self.device, self.machine, self.versions, self.code)
        return (self.contender, self.shape, self.pass_name, *setting)


class RowsFile:
    """A JSON file of rows: one per case, the newest.

    Raises:
        ValueError: for a file of something else.
        OSError: for a folder that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = {row.case: row for row in read_rows(path)} if path.exists() else {}
        self._write()

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def add(self, rows: Iterable[Row]) -> None:
        """Keep new rows in place of older ones of the same cases, on the disk too."""
        self._rows |= {row.case: row for row in rows}
        self._write()

    def has(self, row: Row) -> bool:
        """Whether this case was measured."""
        old = self._rows.get(row.case)
        return old is not None and old.measured

    def _write(self) -> None:
        write_text(self.path, json.dumps([asdict(row) for row in self.rows], indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Rows that the attention suite wrote.

    Raises:
        ValueError: for a file of something else.
    """
    known = {field.name for field in fields(Row)}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [Row(**{name: value for name, value in row.items() if name in known}) for row in found]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be a file written by the attention suite, got {error}; choose another folder"
        ) from error
