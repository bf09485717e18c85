"""The charts: curves of all runs and a timeline, and the same as sentences and numbers.

A curve of more than `AT_MOST` points is reduced to the minimum and maximum of equal intervals, so that no spike is
lost. Around each step where runs first differ, every point is kept. The numbers below a chart cover all points.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from labtrain.base.contracts import Options
from labtrain.review.report.data import Numbers, Run, Series, seconds_of

AT_MOST = 4_000  # points of a reduced curve, without those around a step where runs first differ
AROUND = 100  # steps before and after it
DIGITS = 7  # of a drawn point: more than a screen can show
# Units whose numbers are whole. A chart shows the first of these that its greatest number reaches, else the last one.
SIZES = {
    "bytes": ((1e9, "GB"), (1e6, "MB")),
    "FLOP/s": ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")),
}
SPANS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
STATUSES = ("complete", "interrupted", "killed", "failed", "running")


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveNumbers:
    """The numbers of one curve.

    Attributes:
        run: the run's label.
        of: which of the run's curves; empty if it has only one.
        first, last, least, greatest: (where, value); None if there is no number.
        count: number of points.
    """

    run: str
    of: str
    first: tuple[str, str] | None
    last: tuple[str, str] | None
    least: tuple[str, str] | None
    greatest: tuple[str, str] | None
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One panel.

    Attributes:
        title: what it shows.
        unit: of the numbers in `lines`.
        where: the x axis: step, or the time since the run's first start.
        summary: a few sentences for people who cannot see the chart.
        lines: one for each curve.
        drawn: the input of page.js.
    """

    title: str
    unit: str
    where: str
    summary: list[str]
    lines: list[CurveNumbers]
    drawn: Options


def curves_of(runs: list[Run]) -> list[Chart]:
    """Return charts of the trail's loss and of each metric in the history."""
    charts = [_by_step("Training loss", runs, lambda run: [("", run.loss)])]
    names = {name: None for run in runs for name in run.history.metrics}
    charts += [_by_step(name, runs, _metric(name)) for name in sorted(names)]
    return [chart for chart in charts if chart.lines]


def machine_of(runs: list[Run]) -> list[Chart]:
    """Return charts of throughput, utilisation and memory over time, and of learning rates over steps."""
    charts = [
        _by_time("Throughput", "samples/s", runs, lambda run: run.history.throughput),
        _by_time("FLOP/s", "FLOP/s", runs, lambda run: run.history.flops),
        _by_time("Model FLOPs utilisation", "%", runs, lambda run: run.history.utilisation),
        _by_time("Memory of the process", "bytes", runs, lambda run: run.history.memory),
        _by_time("Memory of the GPU", "bytes", runs, lambda run: run.history.gpu_memory),
        _by_step("Learning rate", runs, _rates),
    ]
    return [chart for chart in charts if chart.lines]


def timeline_of(runs: list[Run]) -> dict[str, object]:
    """Return the timeline's bars: one trace for each status, so that each has its own pattern."""
    bars = list(_bars(runs))
    return {
        "kind": "timeline",
        "rows": [run.label for run in runs],
        "traces": [
            {"status": status, "bars": [bar for said, bar in bars if said == status]}
            for status in STATUSES
            if any(said == status for said, _ in bars)
        ],
    }


def reduced(y: Numbers, *, at_most: int = AT_MOST, keep: Iterable[int] = ()) -> list[int]:
    """Return the indices of a curve's points to draw, in order.

    Args:
        y: a curve; NaN is a gap.
        at_most: number of points, without those in `keep`.
        keep: indices that are always kept.

    Returns:
        The minimum, the maximum and one gap of each of at_most / 2 intervals; the first and the last point.
    """
    count = len(y)
    if count <= at_most:
        return list(range(count))
    size = -(-count // max((at_most - 2) // 2, 1))
    rows = -(-count // size)
    padded = np.full(rows * size, np.nan)
    padded[:count] = y
    table = padded.reshape(rows, size)
    empty = np.isnan(table)
    start = np.arange(rows) * size
    numbers = ~empty.all(axis=1)
    empty.reshape(-1)[count:] = False  # the padding is not a gap
    chosen = [
        (start + np.where(np.isnan(table), np.inf, table).argmin(axis=1))[numbers],
        (start + np.where(np.isnan(table), -np.inf, table).argmax(axis=1))[numbers],
        (start + empty.argmax(axis=1))[empty.any(axis=1)],
        np.array([0, count - 1]),
        np.array([place for place in keep if 0 <= place < count], dtype=np.int64),
    ]
    return [int(place) for place in np.unique(np.concatenate(chosen))]


def _metric(name: str) -> Callable[[Run], list[tuple[str, Series]]]:
    return lambda run: [("", run.history.metrics[name])] if name in run.history.metrics else []


def _rates(run: Run) -> list[tuple[str, Series]]:
    """Return a run's learning rates; if all are the same, only one."""
    rates = run.history.rates
    if all(np.array_equal(rate.y, rates[0].y) for rate in rates):
        return [("", rate) for rate in rates[:1]]
    return [(f"group {number}", rate) for number, rate in enumerate(rates, 1)]


def _by_step(title: str, runs: list[Run], series_of: Callable[[Run], list[tuple[str, Series]]]) -> Chart:
    parts: dict[int, list[str]] = {}
    for run in runs:
        if run.parts_at is not None:
            parts.setdefault(run.parts_at, []).append(run.label)
    traces, lines, summary = [], [], []
    for place, run in enumerate(runs):
        for of, series in series_of(run):
            if not len(series.x):
                continue
            keep = [near for step in parts for near in _around(series.x, step)]
            indices = reduced(series.y, keep=keep)
            traces.append(_trace(place, of, series.x[indices], series.y[indices]))
            lines.append(_line(run.label, of, series, [f"{step:.0f}" for step in _corners(series)]))
            summary += [_sentence(lines[-1], "step ")]
            if len(indices) < len(series.x):
                summary[-1] += f" {len(indices):,} of {len(series.x):,} points are drawn."
            if series.gaps:
                at = series.x[np.isnan(series.y)][0]
                points = "1 value is" if series.gaps == 1 else f"{series.gaps:,} values are"
                summary[-1] += f" {points} not finite, first at step {at:.0f}: a gap."
    marks = [_mark(step, labels, runs[0].label) for step, labels in sorted(parts.items())]
    summary += [f"{mark['text']} at step {mark['at']}." for mark in marks]
    drawn = {"kind": "step", "title": title, "axis": "step", "unit": "", "traces": traces, "marks": marks}
    return Chart(title=title, unit="", where="step", summary=summary, lines=lines, drawn=drawn)


def _by_time(title: str, unit: str, runs: list[Run], series_of: Callable[[Run], Series]) -> Chart:
    begins = [seconds_of(run.receipt["segments"][0]["started"]) or 0.0 for run in runs]
    found = [(place, series_of(run), begins[place]) for place, run in enumerate(runs) if len(series_of(run).x)]
    longest = max((series.x[-1] - begin for _, series, begin in found), default=0.0)
    most = max((np.nanmax(series.y) for _, series, _ in found), default=0.0)
    span, word = next((each for each in SPANS if longest >= 2 * each[0]), SPANS[-1])
    sizes = SIZES.get(unit, ((1.0, unit),))
    size, unit_drawn = next((each for each in sizes if most >= each[0]), sizes[-1])
    traces, lines, summary = [], [], []
    for place, series, begin in found:
        indices = reduced(series.y)
        traces.append(_trace(place, "", (series.x[indices] - begin) / span, series.y[indices] / size))
        places = [f"{(time - begin) / span:.4g} {word}" for time in _corners(series)]
        lines.append(_line(runs[place].label, "", series, places, whole=unit in SIZES))
        summary += [_sentence(lines[-1], "", unit_drawn, size)]
    drawn = {"kind": "time", "title": title, "axis": f"{word} since the first start", "unit": unit_drawn,
             "traces": traces, "marks": []}  # fmt: skip
    return Chart(title=title, unit=unit, where="time", summary=summary, lines=lines, drawn=drawn)


def _mark(step: int, labels: list[str], first: str) -> dict[str, object]:
    names = ", ".join(labels)
    return {"at": step, "labels": names, "text": f"{names} differ{'s' if len(labels) == 1 else ''} from {first}"}


def _around(x: Numbers, step: int) -> range:
    return range(*(int(place) for place in np.searchsorted(x, (step - AROUND, step + AROUND + 1))))


def _trace(run: int, of: str, x: Numbers, y: Numbers) -> dict[str, object]:
    return {"run": run, "of": of, "x": [_short(value) for value in x], "y": [_short(value) for value in y]}


def _short(value: float) -> float | int | None:
    """Round a number to `DIGITS` digits; whole numbers stay exact, NaN becomes None."""
    if value != value:
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.{DIGITS}g}")


def _corners(series: Series) -> list[float]:
    """Return the x values of the first, last, least and greatest points."""
    if np.isnan(series.y).all():
        return [series.x[0], series.x[-1]]
    return [float(series.x[place]) for place in (0, -1, np.nanargmin(series.y), np.nanargmax(series.y))]


def _line(run: str, of: str, series: Series, places: list[str], *, whole: bool = False) -> CurveNumbers:
    def at(place: int, value: float) -> tuple[str, str] | None:
        return (places[place], f"{value:.0f}" if whole else repr(float(value))) if place < len(places) else None

    assert series.last is not None
    numbers = len(places) == 4
    return CurveNumbers(
        run=run,
        of=of,
        first=at(0, series.y[0]),
        last=at(1, series.last),
        least=at(2, np.nanmin(series.y)) if numbers else None,
        greatest=at(3, np.nanmax(series.y)) if numbers else None,
        count=len(series.y) - int(np.count_nonzero(np.isnan(series.y))) + series.gaps,
    )


def _sentence(line: CurveNumbers, step: str, unit: str = "", size: float = 1.0) -> str:
    """Return a curve's numbers in words, in a unit that is `size` of the numbers' own."""

    def say(point: tuple[str, str]) -> str:
        number = float(point[1]) / size
        value = f"{number:,.4g}" if abs(number) < 1e4 else f"{number:,.0f}"
        return f"{value}{f' {unit}' if unit else ''} at {step}{point[0]}"

    name = f"{line.run}{f' {line.of}' if line.of else ''}"
    parts = [f"{word} {say(point)}" for word, point in (
        ("first", line.first), ("last", line.last), ("least", line.least), ("greatest", line.greatest)
    ) if point]  # fmt: skip
    return f"{name}: {', '.join(parts)}."


def _bars(runs: list[Run]) -> Iterator[tuple[str, dict[str, object]]]:
    for place, run in enumerate(runs):
        for segment in run.receipt["segments"]:
            start = seconds_of(segment["started"])
            assert start is not None
            end = seconds_of(segment["ended"]) or max(start, run.history.last_time or start)
            steps = f"steps {segment['from_step']} to {'?' if segment['to_step'] is None else segment['to_step']}"
            yield segment["status"], {"row": place, "from": start, "to": max(end, start + 1), "text": steps}
