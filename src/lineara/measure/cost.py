"""What attention costs against the number of positions: time and peak memory, case by case, as a table."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lineara.measure.calls import median_seconds, peak_memory
from lineara.ops import efficient_attention, softmax_attention

_Function = Callable[..., Tensor]
LENGTHS = (256, 1024, 4096, 16384, 65536)
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_QUADRATIC = ("softmax",)
# A quadratic call is warmed up at this length: long enough for the code that longer ones run through.
_QUADRATIC_WARM_UP_LEN = 1024


@dataclass(frozen=True)
class Case:
    """One attention at one size, on random queries, keys and values of (batch, heads, positions, head_dim).

    Args:
        attention: `"efficient"` (`ops.efficient_attention`), `"efficient-reference"` (the same, impl="reference"),
            `"plain"` (the same formula as two softmaxes and two products), `"einsum"` (the same in the form of the
            popular package), or `"softmax"` (`ops.softmax_attention`).
        positions: number of query positions and of key positions.
        backward: whether the gradients of query, key and value are computed too.
        batch: items.
        heads: heads.
        head_dim: key channels, and value channels, per head.
        dtype: `"float64"`, `"float32"`, `"bfloat16"` or `"float16"`.
        device: `"cpu"`, `"cuda"` or `"cuda:<n>"`.

    Raises:
        ValueError: for an unknown attention, dtype or device, or sizes below 1.
    """

    attention: str
    positions: int
    backward: bool
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, choices in (("attention", ATTENTIONS), ("dtype", _DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("positions", "batch", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:<n>', got {self.device!r}")

    def __str__(self) -> str:
        return f"{self.attention}, {self.positions} positions, {_pass_name(self.backward)}"

    @property
    def outputs_bytes(self) -> int:
        """Bytes of what every attention has to return: the output, and with `backward` the three gradients."""
        elements = self.batch * self.heads * self.positions * self.head_dim
        return elements * getattr(torch, self.dtype).itemsize * (4 if self.backward else 1)


@dataclass(frozen=True)
class Cost:
    """What one call of a case cost.

    `seconds`, `seconds_min` and `seconds_max` are the median and the extremes of `repeats` calls; `peak_bytes` is the
    most memory beyond the inputs at any moment, and `extra_bytes` is `peak_bytes` without the case's `outputs_bytes`.
    """

    case: Case
    seconds: float
    seconds_min: float
    seconds_max: float
    repeats: int
    peak_bytes: int
    extra_bytes: int

    def as_row(self) -> dict[str, object]:
        """The case and its cost as one flat dict of numbers and strings, for a file or `viz.cost_curves`."""
        row = asdict(self)
        return row.pop("case") | row


def length_study(attentions: Iterable[str], positions: Iterable[int], *, heads: int, head_dim: int) -> list[Case]:
    """Every attention at every number of positions, forward, then forward and backward."""
    return [
        Case(attention, num_positions, backward, heads=heads, head_dim=head_dim)
        for attention in attentions
        for backward in (False, True)
        for num_positions in sorted(positions)
    ]


def measure_costs(
    cases: Iterable[Case],
    *,
    max_seconds: float = 2.0,
    limit_seconds: float | None = None,
    progress: Callable[[str], object] | None = None,
) -> list[Cost]:
    """Measure cases one after the other, after checking that what they compute is right.

    Args:
        cases: what to measure; lengths in rising order, where `limit_seconds` is to have an effect.
        max_seconds: time for the repeats of one case, as in `median_seconds`.
        limit_seconds: leave out a quadratic case if a single call of it is predicted to take longer: the time of the
            longest shorter case of the same settings, times the square of the ratio of their lengths. None measures
            everything.
        progress: called with one line of text after each case.

    Returns:
        The costs, in the order of the cases; those left out are missing.

    Raises:
        RuntimeError: if an attention does not give what it must, or a measuring process fails.
    """
    cases = list(cases)
    for attention, dtype, device in dict.fromkeys((case.attention, case.dtype, case.device) for case in cases):
        _check_results(Case(attention, 131, True, batch=2, heads=3, head_dim=16, dtype=dtype, device=device))
    report = progress or (lambda line: None)
    costs: list[Cost] = []
    for case in cases:
        predicted = _predicted_seconds(case, costs)
        if limit_seconds is not None and predicted is not None and predicted > limit_seconds:
            report(f"{case}: left out, a call is predicted to take {_digits(predicted)} s")
            continue
        cost = measure_case(case, max_seconds=max_seconds)
        report(f"{case}: {_digits(cost.seconds * 1e3)} ms, {_digits(cost.peak_bytes / 1e6)} MB")
        costs.append(cost)
    return costs


def measure_case(case: Case, *, max_seconds: float = 2.0) -> Cost:
    """Time one case in this process (see `median_seconds`) and measure its memory in a fresh one (see `peak_memory`).

    Raises:
        RuntimeError: if the process that measures memory fails.
    """
    timing = median_seconds(_make_call(case), max_seconds=max_seconds, device=case.device)
    peak = peak_memory(partial(_make_warm_call, case), device=case.device)
    extra = max(peak - case.outputs_bytes, 0)
    return Cost(case, timing.median, timing.minimum, timing.maximum, timing.repeats, peak, extra)


def cost_table(costs: Sequence[Cost]) -> str:
    """A table, aligned as text and valid as Markdown: four rows per length, one column per attention.

    Per length the median time and the peak memory (the result included, the inputs not) of the forward pass and of
    forward and backward pass together, in ms and MB (10^6 bytes) to three digits; last the ratio of `"softmax"` to
    `"efficient"` where both were measured at all. What is missing reads "not measured".

    Raises:
        ValueError: for costs that differ in batch, heads, head_dim, dtype or device.
    """
    if len({replace(cost.case, attention="plain", positions=1, backward=False) for cost in costs}) > 1:
        raise ValueError(
            "costs of one table must share batch, heads, head_dim, dtype and device, got several; make a table of each"
        )
    found = {(cost.case.attention, cost.case.positions, cost.case.backward): cost for cost in costs}
    attentions = [name for name in ATTENTIONS if any(name == key[0] for key in found)]
    compare = {"softmax", "efficient"} <= set(attentions)
    rows = [["positions", "", *attentions, *(["softmax / efficient"] if compare else [])]]
    for positions in sorted({key[1] for key in found}):
        for field, factor, unit in (("seconds", 1e3, "ms"), ("peak_bytes", 1e-6, "MB")):
            for backward in sorted({key[2] for key in found}):
                here = {name: found.get((name, positions, backward)) for name in attentions}
                values = {name: cost and getattr(cost, field) * factor for name, cost in here.items()}
                cells = [_digits(values[name]) for name in attentions]
                if compare:
                    cells.append(_ratio(values["softmax"], values["efficient"]))
                rows.append([str(positions), f"{_pass_name(backward)}, {unit}", *cells])
    return _aligned(rows)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.softmax(-1) @ (key.softmax(-2).mT @ value)


def einsum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    context = torch.einsum("bhnd,bhne->bhde", key.softmax(-2), value)
    return torch.einsum("bhnd,bhde->bhne", query.softmax(-1), context)


_FUNCTIONS: dict[str, _Function] = {
    "efficient": efficient_attention,
    "efficient-reference": partial(efficient_attention, impl="reference"),
    "plain": plain,
    "einsum": einsum,
    "softmax": softmax_attention,
}
ATTENTIONS = tuple(_FUNCTIONS)


def _textbook_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT * query.shape[3] ** -0.5).softmax(-1) @ value


def _make_call(case: Case) -> Callable[[], list[Tensor]]:
    """Build the case's inputs; the call returns its output and, with `backward`, the gradients."""
    return partial(_results, _FUNCTIONS[case.attention], *_inputs(case), backward=case.backward)


def _inputs(case: Case) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator(case.device).manual_seed(0)
    shape = (case.batch, case.heads, case.positions, case.head_dim)
    dtype = getattr(torch, case.dtype)
    return [torch.randn(shape, generator=generator, dtype=dtype, device=case.device) for _ in range(4)]


def _results(function: _Function, *tensors: Tensor, backward: bool) -> list[Tensor]:
    *inputs, grad_output = [tensor.detach() for tensor in tensors]
    if not backward:
        return [function(*inputs)]
    output = function(*(tensor.requires_grad_() for tensor in inputs))
    return [output, *torch.autograd.grad(output, inputs, grad_output)]


def _make_warm_call(case: Case) -> Callable[[], object]:
    warm_up = case
    if case.attention in _QUADRATIC:
        warm_up = replace(case, positions=min(case.positions, _QUADRATIC_WARM_UP_LEN))
    _make_call(warm_up)()
    return _make_call(case)


def _check_results(case: Case) -> None:
    """Compare output and gradients with those of the textbook formula in float64."""
    inputs = _inputs(case)
    textbook = _textbook_softmax if case.attention == "softmax" else plain
    right = _results(textbook, *(tensor.double() for tensor in inputs), backward=True)
    given = _results(_FUNCTIONS[case.attention], *inputs, backward=True)
    tolerance = torch.finfo(inputs[0].dtype).eps ** 0.5
    for name, a, b in zip(("output", "gradient of query", "gradient of key", "gradient of value"), given, right):
        error = ((a.double() - b).abs().max() / b.abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(
                f"{case.attention} attention in {case.dtype} must agree with its textbook formula, got a relative "
                f"error of {error:.2g} in the {name}; nothing was measured"
            )


def _predicted_seconds(case: Case, costs: Sequence[Cost]) -> float | None:
    """For a quadratic case of whose settings a shorter one was measured."""
    if case.attention not in _QUADRATIC:
        return None
    shorter = [
        cost
        for cost in costs
        if cost.case.positions < case.positions and replace(cost.case, positions=case.positions) == case
    ]
    if not shorter:
        return None
    longest = max(shorter, key=lambda cost: cost.case.positions)
    return longest.seconds * (case.positions / longest.case.positions) ** 2


def _pass_name(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def _digits(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "not measured"
    rounded = f"{value:.2e}"
    return f"{float(rounded):.{max(2 - int(rounded.partition('e')[2]), 0)}f}"


def _ratio(above: float | None, below: float | None) -> str:
    return "not measured" if above is None or not below else f"{_digits(above / below)} x"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
