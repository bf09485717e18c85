"""`labtrain ls` and `labtrain.runs`: list the runs below a folder. No torch; each receipt is read once."""

import fcntl
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from labtrain.base.console import one_line, shown, warn
from labtrain.base.errors import ConfigError, LabtrainError, in_words, not_readable
from labtrain.base.untrusted import NotPlainError, is_number, open_plain
from labtrain.record import receipt
from labtrain.record.differences import flat, shown_value
from labtrain.record.identity import enclosing, get, what_counts
from labtrain.record.trail import read_history_lines
from labtrain.review.catalog.notes import read_note
from labtrain.stores.backends import is_local
from labtrain.stores.layout import checkpoint_place

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = (
    "run",
    "id",
    "experiment",
    "status",
    "steps",
    "started",
    "ended",
    "seconds",
    "device",
    "commit",
    "size_bytes",
    "note",
)
WIDTH = 100  # of the table, if it is not printed to a terminal
NOTE = 24  # columns of a note
CELL = 16  # the longest value of a key that differs
FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, process


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The state of one run.

    Attributes:
        run: its folder, as the user would type it here.
        status: complete, interrupted, failed or running; killed: its process died; broken: its receipt cannot be
            read, and `error` says why.
        steps: optimizer steps done, as far as recorded.
        metric: name of the metric; None if the run has none.
        value: the metric's last value.
        weights_digest: of a complete run, 64 hex digits.
        started: UTC, ISO 8601.
        seconds: training time, over all segments that ended.
        error: why a broken run cannot be read.
        id: the run id.
        experiment: its name.
        metrics: the last value of each metric, by name.
        ended: UTC, ISO 8601; None if the last segment has not ended.
        device: what the last segment trained on, such as `2 x NVIDIA H200` or `cpu`.
        commit: git's, of the code; None outside a repository.
        size_bytes: of its folder, and of its checkpoints if they are on this machine.
        note: by `labtrain note`, in one line; empty if there is none.
        config: its configuration by dotted key, without keys that only control execution.
        differs: the part of `config` that is not the same in all listed runs; None: the run has no such key.
    """

    run: str
    status: str
    steps: int | None = None
    metric: str | None = None
    value: float | None = None
    weights_digest: str | None = None
    started: str | None = None
    seconds: float | None = None
    error: str | None = None
    id: str | None = None
    experiment: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    ended: str | None = None
    device: str | None = None
    commit: str | None = None
    size_bytes: int | None = None
    note: str = ""
    config: dict[str, object] = field(default_factory=dict)
    differs: dict[str, object] = field(default_factory=dict)


def list_runs(folders: Iterable[str | Path], *, metric: str | None = None) -> list[Row]:
    """Return a row for each run in or below `folders`: broken runs, then the others from old to new.

    Do not call it in a process that trains one of the runs: closing a file drops that process's locks on it.

    Args:
        folders: runs, or folders of runs.
        metric: its name; None: each run's checkpoint.monitor, else the first of its test, validation and other metrics.

    Raises:
        ConfigError: a folder does not exist, or the only one cannot be read, or no run has the metric.
    """
    found: dict[Path, Row] = {}
    places = list(map(Path, folders))
    for folder in places:
        try:
            os.scandir(folder).close()
        except PermissionError:
            if len(places) == 1:  # of several, the others are still listed
                raise not_readable(folder) from None
        except OSError:
            hint = "labtrain ls DIR; runs/ is next to train.py"
            raise ConfigError(f"{shown(folder)}: no such folder", hint=hint) from None
        found |= {run_dir: row_of(run_dir, metric) for run_dir in runs_below(folder)}
    rows = sorted(found.values(), key=lambda row: (row.started or "", row.run))
    if metric is not None and rows and all(row.metric is None for row in rows):
        names = sorted({row.metric for row in list_runs(found) if row.metric})
        raise ConfigError(
            f"no run has a metric {metric}",
            hint=f"the default without --metric is {', '.join(names)}" if names else "labtrain ls",
        )
    return with_differences(rows)


def with_differences(rows: list[Row]) -> list[Row]:
    """Return the rows with `differs`: first the keys that differ within an experiment, each in the receipts' order."""
    read = [row for row in rows if row.config]
    keys = list(dict.fromkeys(key for row in read for key in row.config))

    def vary(key: str, rows: list[Row]) -> bool:
        return any(row.config.get(key) != rows[0].config.get(key) for row in rows)

    groups = [[row for row in read if row.experiment == name] for name in dict.fromkeys(row.experiment for row in read)]
    found = [key for key in keys if vary(key, read)]
    found.sort(key=lambda key: not any(vary(key, group) for group in groups))
    return [replace(row, differs={key: row.config.get(key) for key in found}) if row.config else row for row in rows]


def runs_below(folder: Path) -> Iterator[Path]:
    """Yield each folder with a receipt, and each that this user cannot read; skip hidden folders and those in runs."""
    closed: list[OSError] = []
    for here, folders, files in os.walk(folder, onerror=closed.append):
        if receipt.FILE in files:
            folders.clear()
            yield Path(here).resolve()
        folders[:] = [name for name in folders if not name.startswith(".")]
    yield from (Path(error.filename).resolve() for error in closed if isinstance(error, PermissionError))


def row_of(run_dir: Path, metric: str | None = None) -> Row:
    """Return the state of the run in a folder."""
    try:
        return _row_of(run_dir, metric)
    except (LabtrainError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        why = error.args[0] if isinstance(error, LabtrainError) else f"{shown(run_dir)}: {in_words(error)}"
        return Row(run=shown(run_dir), status="broken", error=str(why))


def _row_of(run_dir: Path, metric: str | None) -> Row:
    found = receipt.read(run_dir)
    if found is None:
        raise LabtrainError(f"{shown(run_dir)}: {receipt.FILE} is missing")
    monitor = get(found["config"], "checkpoint.monitor")
    segments, results, status = found["segments"], found["results"], found["status"]
    if status == "running" and not is_trained(run_dir):
        now = receipt.read(run_dir)  # it may have ended since
        if now is not None and now["status"] != "running":
            return row_of(run_dir, metric)
        status = "killed"
    elif status in ("interrupted", "failed") and is_trained(run_dir):
        status = "running"  # it has resumed, and its first step is not done yet
    steps, metrics = results.get("steps"), results.get("metrics", {})
    if status != "complete":
        steps, metrics = last_of(run_dir)
        steps = max(steps, segments[-1]["to_step"] or segments[-1]["from_step"])
    wanted = metric or (monitor if isinstance(monitor, str) else None) or next(iter(sorted(metrics, key=rank)), None)
    ended = [(receipt.time_of(each["started"]), receipt.time_of(each["ended"])) for each in segments if each["ended"]]
    return Row(
        run=shown(run_dir),
        status=status,
        steps=steps,
        metric=wanted if wanted in metrics else None,
        value=metrics.get(wanted) if wanted else None,
        weights_digest=results.get("weights_digest"),
        started=segments[0]["started"],
        seconds=sum((after - before).total_seconds() for before, after in ended) if ended else None,
        id=found["run_id"],
        experiment=found["config"]["experiment"],
        metrics=metrics,
        ended=segments[-1]["ended"],
        device=device_of(found),
        commit=found["code"]["commit"],
        size_bytes=size_of(run_dir, found),
        note=read_note(run_dir),
        # An empty group is one without keys.
        config={key: value for key, value in flat(what_counts(found["config"]), "").items() if value != {}},
    )


def device_of(found: receipt.Receipt) -> str:
    """Return what a run was trained on last: its GPUs, or `cpu`, and how many processes."""
    gpus, devices = found["hardware"].get("gpus", []), found["segments"][-1]["devices"]
    name = gpus[0]["name"] if gpus else "cpu"
    return f"{devices} x {name}" if devices > 1 else name


def size_of(run_dir: Path, found: receipt.Receipt) -> int:
    """Return the bytes of a run's files on this machine, without following links."""
    place = checkpoint_place(run_dir, found["config"]["checkpoint"]["url"])
    folders = [run_dir]
    if is_local(place) and not Path(place).resolve().is_relative_to(run_dir):
        folders.append(Path(place))
    size = 0
    for folder in folders:
        for here, _, files in os.walk(folder):
            for name in files:
                with suppress(OSError):  # a training has removed it since
                    size += os.lstat(f"{here}/{name}").st_size
    return size


def rank(name: str) -> tuple[int, str]:
    """Return a sort key for metrics: test, then validation, then the rest."""
    return ("test", "val").index(stage) if (stage := name.partition("/")[0]) in ("test", "val") else 2, name


def is_trained(run_dir: Path) -> bool:
    """Return whether a process on any node trains the run, without disturbing it."""
    try:
        with open_plain(run_dir / receipt.SIGN) as file:
            # Ask for a shared lock: it conflicts only with a process that may write. Readers' locks do not count.
            asked = struct.pack(FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
            kind: int = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
            return kind != fcntl.F_UNLCK
    except (FileNotFoundError, NotPlainError):
        return False
    except OSError:
        return True  # a file system without locks: believe the receipt


def last_of(run_dir: Path) -> tuple[int, dict[str, float]]:
    """Return the last step in a run's history, and the last value of each metric, up to a damaged line."""
    step, metrics = 0, dict[str, float]()
    with suppress(LabtrainError):
        for line in read_history_lines(run_dir):
            step, metrics = line["step"], metrics | line["metrics"]
    return step, metrics


def sort_rows(rows: list[Row], key: str) -> list[Row]:
    """Sort rows by a field, descending with a leading -; rows without a value come last."""
    name = key.removeprefix("-")
    attribute = {"metric": "value", "size": "size_bytes"}.get(name, name)
    with_it = [row for row in rows if comparable(getattr(row, attribute))]
    ordered = sorted(with_it, key=lambda row: getattr(row, attribute), reverse=key.startswith("-"))
    return ordered + [row for row in rows if not comparable(getattr(row, attribute))]


def comparable(value: object) -> bool:
    """Return whether a value can be sorted: not None and not NaN."""
    return value is not None and value == value


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of the table.

    Attributes:
        heading: its first line.
        cells: one for each run.
        right: aligned to the right, as numbers are.
        key: the configuration's key that it shows; empty: another value.
    """

    heading: str
    cells: list[str]
    right: bool = False
    key: str = ""

    @property
    def width(self) -> int:
        return max(map(len, [self.heading, *self.cells]))


def lines_of(rows: Sequence[Row], *, width: int = WIDTH) -> tuple[list[str], list[str]]:
    """Return the lines of a table of runs, and the configuration's keys that differ but have no room in it.

    A key that differs goes before times and weights, which are left out first.
    """
    always, differing, others = _columns(rows), _differing(rows), _others(rows)
    room = width - sum(column.width + 2 for column in always) + 2
    kept: list[Column] = []
    for column in (*_notes(rows), *differing, *others):
        if column.width + 2 <= room:
            room -= column.width + 2
            kept.append(column)
    last = [each for each in kept if not each.key]
    columns = [*always[:4], *(each for each in kept if each.key), *always[4:], *sorted(last, key=_is_note)]
    lines = []
    for cells in zip(*([column.heading, *column.cells] for column in columns), strict=True):
        padded = [cell.rjust(column.width) if column.right else cell.ljust(column.width)
                  for column, cell in zip(columns, cells, strict=True)]  # fmt: skip
        lines.append("  ".join(padded).rstrip())
    return lines, [column.key for column in differing if column not in kept]


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Return what every table shows; if all runs have the same metric, its name heads the column."""
    names = {row.metric for row in rows if row.metric}
    heading = names.pop() if len(names) == 1 else "metric"
    values = []
    for row in rows:
        value = "" if row.value is None else f"{row.value:.4f}" if abs(row.value) < 1e4 else f"{row.value:.4g}"
        values.append(f"{row.metric} {value}" if row.metric and heading == "metric" else value)
    return [
        Column(heading="run", cells=_names(rows)),
        Column(heading="status", cells=[row.status for row in rows]),
        Column(heading="steps", cells=["" if row.steps is None else str(row.steps) for row in rows], right=True),
        Column(heading=one_line(heading), cells=list(map(one_line, values)), right=heading != "metric"),
        Column(heading="size", cells=["" if row.size_bytes is None else size_text(row.size_bytes) for row in rows],
               right=True),
    ]  # fmt: skip


def _notes(rows: Sequence[Row]) -> list[Column]:
    notes = [row.note if len(row.note) <= NOTE else f"{row.note[: NOTE - 3]}..." for row in rows]
    return [Column(heading="note", cells=notes)] if any(notes) else []


def _is_note(column: Column) -> bool:
    return column.heading == "note"


def _others(rows: Sequence[Row]) -> list[Column]:
    times = ["" if row.seconds is None else duration(row.seconds) for row in rows]
    return [
        Column(heading="time", cells=times, right=True),
        Column(heading="started", cells=[one_line((row.started or "")[:16].replace("T", " ")) for row in rows]),
        Column(heading="weights", cells=[one_line((row.weights_digest or "")[:12]) for row in rows]),
    ]


def _differing(rows: Sequence[Row]) -> list[Column]:
    """Return a column for each key that differs; its heading is as much of the key's end as it needs to be unique."""
    keys = list(dict.fromkeys(key for row in rows for key in row.differs))
    taken = Counter(tail for key in keys for tail in _tails(key)) + Counter(("run", "status", "steps", "size"))
    found = []
    for key in keys:
        values = [row.differs.get(key) for row in rows]
        cells = ["" if value is None else one_line(shown_value(value, most=CELL)) for value in values]
        heading = next((tail for tail in _tails(key) if taken[tail] == 1), key)
        numbers = all(value is None or is_number(value) for value in values)
        found.append(Column(heading=one_line(heading), cells=cells, right=numbers, key=key))
    return found


def _tails(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[place:]) for place in reversed(range(len(parts)))]


def _names(rows: Sequence[Row]) -> list[str]:
    """Return each run as the user can name it: its id, with the experiment if there are several; else its folder."""
    runs = receipt.runs_folder().resolve()
    several = len({row.experiment for row in rows if row.experiment}) > 1
    names = []
    for row in rows:
        folder = Path(row.run).resolve()
        is_found = row.error is None and folder.parent.parent == runs and receipt.is_id(folder.name)
        names.append((f"{folder.parent.name}/" if several else "") + folder.name if is_found else one_line(row.run))
    return names


def size_text(size_bytes: int) -> str:
    """Format bytes as kB, MB or GB."""
    unit, factor = ("GB", 1e9) if size_bytes >= 1e9 else ("MB", 1e6) if size_bytes >= 1e6 else ("kB", 1e3)
    return f"{size_bytes / factor:,.1f} {unit}"


def duration(seconds: float) -> str:
    """Format seconds as H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def as_json(row: Row) -> dict[str, object]:
    """Return a row as JSON values: NaN and infinity become None."""
    found = asdict(row)
    del found["config"]
    finite = {name: value if math.isfinite(value) else None for name, value in row.metrics.items()}
    is_finite = row.value is None or math.isfinite(row.value)
    return found | {"metrics": finite} | ({} if is_finite else {"value": None})


def runs(path: str | Path = ".") -> "DataFrame":
    """Return a table of an experiment's runs: one row for each, from old to new.

    Columns: run (its folder), id, experiment, status, steps, started, ended, seconds, device, commit, size_bytes, note;
    then each metric; then each key of the configuration that differs between the runs.

    Args:
        path: the experiment's folder, or a folder in it; or a folder of runs.

    Raises:
        LabtrainError: pandas is not installed, or there is no such folder.
    """
    try:
        from pandas import DataFrame, to_datetime
    except ImportError:
        raise LabtrainError("labtrain.runs needs pandas, which is not installed", hint="pip install pandas") from None
    here = Path(path).resolve()
    root = enclosing(here)
    folder = here if root is None or here.is_relative_to(runs := receipt.runs_folder(root).resolve()) else runs
    rows = list_runs([folder]) if folder.is_dir() or root is None else []
    for row in rows:
        if row.error is not None:
            warn(row.error)
    metrics, keys = (list(dict.fromkeys(name for each in found for name in each))
                     for found in ([row.metrics for row in rows], [row.differs for row in rows]))  # fmt: skip
    table: dict[str, list[object]] = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    for name in metrics:
        is_taken = name in table or name in keys
        table[f"{name} (metric)" if is_taken else name] = [row.metrics.get(name) for row in rows]
    table |= {key: [row.differs.get(key) for row in rows] for key in keys}
    frame = DataFrame(table)
    for name in ("started", "ended"):
        frame[name] = to_datetime(frame[name], utc=True)
    return frame
