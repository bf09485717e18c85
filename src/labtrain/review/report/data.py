"""Read a run's files for the page. Each file except the receipt may be missing, and each is checked."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from labtrain.base.console import quoted, shown
from labtrain.base.contracts import Options, as_options
from labtrain.base.errors import ConfigError
from labtrain.base.untrusted import damage_of
from labtrain.record import receipt as receipts
from labtrain.record.differences import Comparison, compare, open_run
from labtrain.record.trail import HISTORY, TRAIL, read_history_lines, read_trail
from labtrain.review.catalog.notes import read_note
from labtrain.review.verdicts import Verification, read_verifications

LATEST_S = 253_402_300_800.0  # the year 10000, beyond Python's datetime
MOST_GROUPS = 10_000
MEASURED = ("samples_per_s", "memory_bytes", "gpu_memory_bytes")
MEASURED_LATER = ("flops_per_s",)  # histories of earlier versions have no such key
UTILISATION = "utilisation"  # computed from two of a line's values

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A curve.

    Attributes:
        x: steps, or seconds since the epoch; increasing.
        y: measured values; NaN if a value was not finite or nothing was measured.
        last: the last written value, which may be NaN or infinite; None if the curve is empty.
        gaps: number of written values that are not finite.
    """

    x: Numbers
    y: Numbers
    last: float | None
    gaps: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryCurves:
    """The contents of history.jsonl.

    Attributes:
        metrics: by name, over steps.
        rates: the learning rate of each parameter group, over steps.
        throughput: samples per second, over time.
        flops: floating-point operations per second of the model's forward and backward, over time; empty if unknown.
        utilisation: these in percent of the peak of the devices, over time; empty if either is unknown.
        memory: bytes of the process, over time.
        gpu_memory: bytes of the GPU, over time; empty without a GPU.
        last_time: of the last line, in seconds since the epoch.
    """

    metrics: dict[str, Series]
    rates: list[Series]
    throughput: Series
    flops: Series
    utilisation: Series
    memory: Series
    gpu_memory: Series
    last_time: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run that was read.

    Attributes:
        label: its name on the page: A, B, ...
        folder: as the user named it.
        note: by `labtrain note`; empty if there is none.
        verifications: newest first; including those of an earlier state of this receipt.
        comparison: with the first run; None for the first run.
    """

    label: str
    folder: Path
    receipt: receipts.Receipt
    loss: Series
    history: HistoryCurves
    verifications: list[Verification]
    comparison: Comparison | None
    note: str = ""

    @property
    def parts_at(self) -> int | None:
        """The first step where it differs from the first run."""
        found = self.comparison.divergence if self.comparison else None
        return found.step if found else None


def read_runs(paths: Iterable[Path], signers: Path | None = None) -> list[Run]:
    """Read runs, each by its folder or its receipt; `signers` is a file of people whose signed verdicts count.

    Raises:
        ConfigError: there is no run, or a run is named twice.
        DamagedError: a file is broken or was changed.
    """
    found: dict[Path, receipts.Receipt] = {}
    for path in paths:
        folder, receipt = open_run(path)
        if any(folder.resolve() == other.resolve() for other in found):
            raise ConfigError(f"{shown(folder)} is named twice", hint="name each run once")
        found[folder] = receipt
    if signers is not None and not signers.is_file():
        raise ConfigError(f"{signers}: no such file (allowed signers)", hint="--signers FILE")
    first = next(iter(found))
    return [
        _read_run(folder, receipt, label_of(place), None if folder == first else compare(first, folder), signers)
        for place, (folder, receipt) in enumerate(found.items())
    ]


def label_of(place: int) -> str:
    """Return a run's name on the page: A, ..., Z, AA, AB, ..."""
    letter = chr(ord("A") + place % 26)
    return letter if place < 26 else label_of(place // 26 - 1) + letter


def _read_run(
    folder: Path, receipt: receipts.Receipt, label: str, comparison: Comparison | None, signers: Path | None
) -> Run:
    trail = folder / TRAIL
    with damage_of(shown(trail), hint=f"mv {quoted(trail)} {quoted(f'{trail}.broken')}"):
        losses = [(line["step"], float("nan" if line["loss"] is None else line["loss"])) for line in read_trail(folder)]
    return Run(
        label=label,
        folder=folder,
        receipt=receipt,
        loss=_series(losses),
        history=read_history(folder, _starts(receipt)),
        verifications=read_verifications(folder, digest=receipt["digest"], signers=signers),
        comparison=comparison,
        note=read_note(folder),
    )


def read_history(folder: Path, starts: Iterable[float] = ()) -> HistoryCurves:
    """Read a run's history; empty if there is none. If a step was done twice, the later line counts.

    Args:
        folder: the run's folder.
        starts: start times of its segments, in seconds since the epoch: curves over time have a gap there.

    Raises:
        DamagedError: a complete line is not a line of a history.
    """
    metrics: dict[str, dict[float, float]] = {}
    rates: list[dict[float, float]] = []
    measured: dict[str, list[tuple[float, float]]] = {key: [] for key in (*MEASURED, *MEASURED_LATER, UTILISATION)}
    last_time = None
    path = folder / HISTORY
    for line in read_history_lines(folder):
        with damage_of(shown(path), hint=f"mv {quoted(path)} {quoted(f'{path}.broken')}"):
            time, step = float(line["time"]), int(line["step"])
            if not 0 <= time < LATEST_S:
                raise ValueError(f"time {time} is out of range")
            if len(line["lr"]) > MOST_GROUPS:
                raise ValueError(f"{len(line['lr'])} learning rates")
            for name, value in line["metrics"].items():
                metrics.setdefault(name, {})[step] = float(value)
            for group, value in enumerate(line["lr"]):
                rates.extend({} for _ in range(group + 1 - len(rates)))
                rates[group][step] = float(value)
            for key, value in _measured(as_options(line)).items():
                if value is not None:
                    measured[key].append((time, float(value)))
        last_time = max(time, last_time or time)
    cuts = sorted(starts)
    by_time = {key: _series(_with_gaps(sorted(points), cuts), gaps=False) for key, points in measured.items()}
    return HistoryCurves(
        metrics={name: _series(sorted(points.items())) for name, points in sorted(metrics.items())},
        rates=[_series(sorted(points.items())) for points in rates],
        throughput=by_time["samples_per_s"],
        flops=by_time["flops_per_s"],
        utilisation=by_time[UTILISATION],
        memory=by_time["memory_bytes"],
        gpu_memory=by_time["gpu_memory_bytes"],
        last_time=last_time,
    )


def _measured(line: Options) -> Options:
    """Return what a line of a history measured at its time; None where nothing was measured.

    Raises:
        KeyError: a value that each version writes is missing.
    """
    found = {key: line[key] for key in MEASURED} | {key: line.get(key) for key in MEASURED_LATER}
    flops, peak = found["flops_per_s"], float(line.get("peak_flops_per_s") or 0)
    found[UTILISATION] = round(100 * float(flops) / peak, 4) if flops is not None and peak else None
    return found


def seconds_of(text: str | None) -> float | None:
    """Return a receipt's time in seconds since the epoch."""
    return None if text is None else receipts.time_of(text).timestamp()


def _starts(receipt: receipts.Receipt) -> list[float]:
    return [receipts.time_of(segment["started"]).timestamp() for segment in receipt["segments"]]


def _with_gaps(points: list[tuple[float, float]], cuts: list[float]) -> Iterator[tuple[float, float]]:
    """Yield points in order of time, with a NaN before the first point of each segment."""
    left = list(cuts)
    for number, (time, value) in enumerate(points):
        begun = bool(left) and left[0] <= time
        while left and left[0] <= time:
            left.pop(0)
        if begun and number:
            yield (points[number - 1][0] + time) / 2, math.nan
        yield time, value


def _series(points: Iterable[tuple[float, float]], *, gaps: bool = True) -> Series:
    x, y = np.array(list(points), dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(y)
    return Series(
        x=x,
        y=np.where(finite, y, np.nan),
        last=float(y[-1]) if len(y) else None,
        gaps=int(np.count_nonzero(~finite)) if gaps else 0,
    )
