"""The attention suite: every contender checked, timed and weighed at every shape, and kept at once.

The order is by weight, so that a run which ends early, by its time limit or by force, has what matters most. A
contender that cannot run is a row with the reason. Quadratic ones are left out where a call is predicted to take too
long, from what they took at the longest shorter length.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import lineara.measure.machine as machine
from attention.contenders import Contender, chosen
from attention.inputs import Inputs, Prepared, check, expected_results, prepare, random_inputs, weighed_call
from attention.limits import UNPREDICTED_POSITIONS, Limits, check_device, free_bytes, predicted_seconds
from attention.rounds import Copy, Spread, Step, num_copies, time_in_rounds, time_on_device
from attention.rows import MEASURED, Row, RowsFile
from attention.shapes import PASSES, Shape
from lineara.measure.calls import peak_memory
from lineara.ops import explain_implementation

# Above this many seconds a call, its launches do not matter.
_LAUNCHES_MATTER_BELOW = 2e-3
# The share of the time after which nothing is compiled any more, so that the rest is enough for everything else.
_COMPILING_SHARE = 0.6
_NO_MORE_COMPILING = f"nothing is compiled after {_COMPILING_SHARE:.0%} of the time limit"
_COMPILED = tuple(one.name for one in chosen(None) if one.compiles)
# What a shape takes at most: tensors of the inputs' size, in the wide dtype of the check.
_TENSORS_OF_A_CHECK = 16
_PEERS = (
    *("flash_bla", "linear-attention-transformer", "performer-pytorch", "linformer", "nystrom-attention", "timm"),
    "einops",
)


class Suite:
    """One run of the suite on one device in one dtype.

    Args:
        file: where rows are kept; cases that it has, measured by the same sources and versions, are not measured again.
        device: `"cpu"` or `"cuda"`.
        dtype: `"bfloat16"`, `"float16"` or `"float32"`.
        limits: see `Limits`.
        progress: called with one line of text after each case.

    Raises:
        ValueError: for CUDA where torch finds none.
    """

    def __init__(
        self, file: RowsFile, *, device: str, dtype: str, limits: Limits, progress: Callable[[str], object]
    ) -> None:
        check_device(device)
        self._file = file
        self._device = device
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._limits = limits
        self._progress = progress
        self._start = time.monotonic()
        self._shape: Shape | None = None
        self._calls: dict[str, Callable[..., Tensor]] = {}
        self._copy = Copy(device)
        package = Path(machine.__file__).parents[1]
        self._blank = Row(
            contender="",
            formula="",
            batch=1,
            heads=1,
            positions=1,
            key_dim=1,
            value_dim=1,
            pass_name="",
            dtype=dtype,
            device=device,
            status=MEASURED,
            machine=machine.hardware(device),
            versions=machine.versions(*_PEERS),
            commit=machine.commit(package),
            code=machine.code_digest(package / "ops", package / "measure"),
            date=machine.today(),
        )
        progress(f"a copy reaches {self._copy.bytes_per_second / 1e9:,.1f} GB/s")

    def measure(self, shapes: Iterable[Shape], contenders: Sequence[Contender], passes: Sequence[str] = PASSES) -> None:
        """Measure contenders at all shapes, in this order."""
        for shape in shapes:
            for name in passes:
                missing = [one for one in contenders if not self._file.has(self._row(one, shape, name, MEASURED))]
                if missing:
                    self._measure_pass(shape, name, missing)

    def _measure_pass(self, shape: Shape, name: str, contenders: Sequence[Contender]) -> None:
        found = self._inputs(shape, name)
        if isinstance(found, str):
            self._progress(f"{shape}, {name}: not run: {found}")
            self._file.add([self._row(one, shape, name, f"not run: {found}") for one in contenders])
            return
        inputs, expected = found
        ready: dict[str, Prepared] = {}
        rows: dict[str, Row] = {}
        for one in contenders:
            row = self._row(one, shape, name, MEASURED)
            checked = self._checked(one, shape, name, inputs, expected)
            if isinstance(checked, str):
                rows[one.name] = replace(row, status=f"not run: {checked}")
            else:
                ready[one.name], error = checked
                rows[one.name] = replace(row, error=error, copies=len(inputs))
        del found, expected
        rows |= self._timed(ready, rows, name)
        for one in contenders:
            if rows[one.name].measured:
                rows[one.name] = self._weighed(rows[one.name], one, ready[one.name])
        for row in rows.values():
            said = row.status if row.seconds is None else f"{row.seconds * 1e3:.4g} ms"
            self._progress(f"{shape}, {name}, {row.contender}: {said}")
        self._file.add(rows.values())

    def _inputs(self, shape: Shape, name: str) -> tuple[list[Inputs], list[Tensor]] | str:
        """Sets of inputs and what is expected of the first one; or the reason why nothing can run at a shape."""
        reason = self._refusal(shape)
        if reason is not None:
            return reason
        try:
            copies = num_copies(shape.inputs_bytes("forward", self._dtype.itemsize), self._device)
            inputs = [random_inputs(shape, self._dtype, self._device, seed) for seed in range(copies)]
            return inputs, expected_results(inputs[0], name)
        except RuntimeError as error:  # out of memory is one
            return self._reason(error)

    def _checked(
        self, contender: Contender, shape: Shape, name: str, inputs: Sequence[Inputs], expected: Sequence[Tensor]
    ) -> tuple[Prepared, float | None] | str:
        """A contender that runs and is right, with its error; or the reason why it is not timed."""
        reason = self._late(_COMPILING_SHARE if contender.compiles else 1.0) or self._prediction(contender, shape, name)
        if reason is not None:
            return reason
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                call = self._call(contender, shape)
                prepared = prepare(contender, call, shape, inputs, backward=name != "forward")
                return prepared, check(prepared, expected, name)
            except Exception as error:
                return self._reason(error, said)

    def _timed(self, ready: dict[str, Prepared], rows: dict[str, Row], name: str) -> dict[str, Row]:
        steps = {key: prepared.step(name) for key, prepared in ready.items()}
        spreads, failures = time_in_rounds(steps, device=self._device, max_seconds=self._limits.case_seconds)
        found = {key: replace(rows[key], status=f"not run: {self._reason(error)}") for key, error in failures.items()}
        for key, spread in spreads.items():
            on_device = self._without_launches(steps[key], spread)
            least = rows[key].shape.least_traffic(name, self._dtype.itemsize)
            found[key] = replace(
                rows[key],
                seconds=spread.median,
                seconds_low=spread.low,
                seconds_high=spread.high,
                repeats=spread.repeats,
                device_seconds=on_device,
                copy_bytes_per_second=self._copy.bytes_per_second,
                fraction_of_copy=least / spread.median / self._copy.bytes_per_second,
            )
        return found

    def _without_launches(self, step: Step, spread: Spread) -> float | None:
        if self._device == "cpu" or spread.median > _LAUNCHES_MATTER_BELOW:
            return None
        try:
            return time_on_device(step, self._copy.run, self._copy.seconds).median
        except Exception as error:
            self._progress(f"not timed without launches: {self._reason(error)}")
            return None

    def _weighed(self, row: Row, contender: Contender, prepared: Prepared) -> Row:
        if row.pass_name == "backward" or not self._limits.weigh:
            return row
        try:
            if self._device == "cuda":
                step = prepared.step(row.pass_name)
                with step.around():
                    return replace(row, peak_bytes=peak_memory(lambda: step.prepare(0), device="cuda"))
            if contender.compiles:  # a fresh process would compile it again
                return row
            words = (contender.name, row.shape, row.dtype, row.pass_name)
            return replace(row, peak_bytes=peak_memory(partial(weighed_call, *words)))
        except Exception as error:
            self._progress(f"{contender.name}, {row.shape}: not weighed: {self._reason(error)}")
            return row

    def _row(self, contender: Contender, shape: Shape, name: str, status: str) -> Row:
        return replace(
            self._blank,
            contender=contender.name,
            formula=contender.formula,
            pass_name=name,
            status=status,
            picked=self._picked(shape) if contender.name == "lineara" else None,
            **asdict(shape),
        )

    def _picked(self, shape: Shape) -> str:
        """What impl="auto" runs at this shape."""
        tensor = torch.empty((shape.batch, shape.heads, 1, 1), dtype=self._dtype, device=self._device)
        sized = tensor.expand(-1, -1, shape.positions, shape.key_dim)
        return explain_implementation(sized, sized, sized).partition(":")[0]

    def _call(self, contender: Contender, shape: Shape) -> Callable[..., Tensor]:
        """What a contender is called by, made once for all passes of a shape."""
        if shape != self._shape:
            self._calls.clear()
            self._shape = shape
        if contender.name not in self._calls:
            if contender.compiles and not any(name in _COMPILED for name in self._calls):
                torch.compiler.reset()  # it gives up on a function after several shapes
            self._calls[contender.name] = contender.make(shape, self._dtype, self._device)
        return self._calls[contender.name]

    def _late(self, share: float = 1.0) -> str | None:
        """Why nothing begins any more, after a share of the time."""
        over = self._limits.minutes is not None and time.monotonic() - self._start > 60 * share * self._limits.minutes
        return ("the time limit was reached" if share == 1.0 else _NO_MORE_COMPILING) if over else None

    def _refusal(self, shape: Shape) -> str | None:
        """Why nothing can run at a shape."""
        needed = _TENSORS_OF_A_CHECK * shape.all_heads * shape.positions * max(shape.key_dim, shape.value_dim)
        needed *= 4 if self._dtype.itemsize < 4 else 8
        free = free_bytes(self._device)
        if needed > free:
            return f"it needs about {needed / 1e9:,.1f} GB with its check, and {free / 1e9:,.1f} GB are free"
        return self._late()

    def _prediction(self, contender: Contender, shape: Shape, name: str) -> str | None:
        """Why a quadratic contender is left out at a shape, from what it took at shorter lengths."""
        needed = contender.map_bytes * shape.all_heads * shape.positions**2
        if needed > 0.8 * free_bytes(self._device):
            return f"its attention matrices need about {needed / 1e9:,.1f} GB"
        if not contender.quadratic:
            return None
        seconds = predicted_seconds(self._row(contender, shape, name, MEASURED), self._file.rows)
        if seconds is None:
            unknown = shape.positions > UNPREDICTED_POSITIONS
            return "no shorter length was measured that its time could be predicted from" if unknown else None
        if seconds > self._limits.call_seconds:
            return f"a call is predicted to take {seconds:.3g} s"
        return None

    def _reason(self, error: Exception, said: Sequence[warnings.WarningMessage] = ()) -> str:
        """An exception and the warnings before it in one line; raised again if the device no longer answers."""
        if self._device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as broken:
                raise RuntimeError(
                    f"the device must answer after a failed call, got {broken}; what was measured before is kept in "
                    f"{self._file.path}; call again without the contender that failed ({error})"
                ) from error
            torch.cuda.empty_cache()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        words = " ".join(lines[:2])[:200] or "no reason given"
        # Dot-product attention tells by warnings why a backend does not take a shape.
        told = [str(warning.message).partition(" (Triggered")[0][:200] for warning in said]
        words = "; ".join(dict.fromkeys([words, *told[1:3]]))
        return words if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {words}"
