"""The trail: a line a step, what it holds, how it is read, and where two of them part. No torch.

A line says step, epoch, loss (exactly), and digests: of the batch's indices, of the gradients before the optimizer's
step and of the weights after it (checksums.py). Nothing in a line depends on when or how a run was trained, so two
trails of one run have the same lines, wherever both have one.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from labtrain.base import contracts, untrusted
from labtrain.base.console import quoted
from labtrain.base.contracts import FileMark, HistoryLine, Manifest

TRAIL = "trail.jsonl"
HISTORY = "history.jsonl"  # its companion, of one machine and its time of day (history.py)
BEST_UNSURE = "the best value that the receipt names may be wrong"  # ends a note of the receipt
# In the order in which a step makes them; and the phase of the step that the first one that differs names.
PHASES = {
    "step": "step",
    "epoch": "epoch",
    "batch": "batch",
    "loss": "loss",
    "gradients": "gradient",
    "weights": "update",
}

Line = contracts.TrailLine

SUMMED = ("gradients", "weights")
SUMS = re.compile(r"(?:[0-9a-f]{2}){1,64}")  # two numbers of one width


def read_trail(run_dir: Path) -> list[Line]:
    """Return a run's trail, a dict a step; a last line cut by a crash is left out.

    Raises:
        DamagedError: a line in the middle is broken.
    """
    return parse_trail(trail_bytes(run_dir), run_dir)


def trail_bytes(run_dir: Path) -> bytes:
    """Return a run's trail as it lies there, without a last line cut by a crash; empty if there is no file.

    Raises:
        DamagedError: it is no plain file.
    """
    path = run_dir / TRAIL
    with suppress(FileNotFoundError, NotADirectoryError), untrusted.damage_of(path, hint=_aside(path)):
        lines = untrusted.read(path, untrusted.LINES_BYTES)
        return lines[: lines.rfind(b"\n") + 1]
    return b""


def parse_trail(lines: bytes, run_dir: Path) -> list[Line]:
    """Return whole lines of a run's trail, a dict a step.

    Raises:
        DamagedError: a line is none of a trail.
    """
    path = run_dir / TRAIL
    with untrusted.damage_of(path, hint=f"mv {quoted(run_dir)} {quoted(f'{run_dir}.broken')}"):
        text = b"[" + lines.rstrip(b"\n").replace(b"\n", b",") + b"]"  # a third faster than by lines
        found: list[Line] = json.loads(text.decode())
        for number, line in enumerate(found, 1):
            if not _is_line(line):
                raise ValueError(f"line {number} is none of a trail: {json.dumps(line)[:100]}")
    return found


def _is_line(line: object) -> bool:
    """Return whether a value has what is read of a line: older trails, and those of a test, have less."""
    return (
        isinstance(line, dict)
        and untrusted.is_count(line.get("step"))
        and not any(isinstance(value, dict | list) for value in line.values())
        and isinstance(line.get("loss"), int | float | str | None)
        and all((sums := line.get(key)) is None or (isinstance(sums, str) and SUMS.fullmatch(sums)) for key in SUMMED)
    )


def read_history_lines(run_dir: Path) -> Iterator[HistoryLine]:
    """Yield the lines of a run's history; one that a kill cut short is no JSON, and is passed over.

    Raises:
        DamagedError: it is no plain file, or a line is whole and none of a history.
    """
    path, lines = run_dir / HISTORY, b""
    with suppress(FileNotFoundError, NotADirectoryError), untrusted.damage_of(path, hint=_aside(path)):
        lines = untrusted.read(path, untrusted.LINES_BYTES)
    for number, text in enumerate(lines.split(b"\n"), 1):
        try:
            line = json.loads(text.decode(errors="replace"))
        except (ValueError, RecursionError):
            continue
        with untrusted.damage_of(path, hint=_aside(path)):
            if not is_history_line(line):
                raise ValueError(f"line {number} is none of a history: {text[:100].decode(errors='replace')}")
        yield line


def is_history_line(line: object) -> bool:
    """Return whether a value has what every line of a history has: a step, and metrics by name."""
    return (
        isinstance(line, dict)
        and untrusted.is_count(line.get("step"))
        and isinstance(line.get("metrics"), dict)
        and all(isinstance(name, str) and untrusted.is_number(value) for name, value in line["metrics"].items())
    )


def _aside(path: Path) -> str:
    """Return what to type so that a file is out of the way, and kept."""
    return f"mv {quoted(path)} {quoted(f'{path}.broken')}"


def cut_trail(path: Path, *, last_step: int) -> None:
    """Keep a trail's lines up to `last_step`; a last line without its end, left by a crash, goes too."""
    if not path.exists():
        return
    lines = untrusted.read(path, untrusted.LINES_BYTES)
    end = lines.rfind(b"\n") + 1
    while end:
        begin = lines.rfind(b"\n", 0, end - 1) + 1
        if parse_trail(lines[begin:end], path.parent)[0]["step"] <= last_step:
            break
        end = begin
    if end < len(lines):
        os.truncate(path, end)  # in one step: a crash leaves the one or the other


class Record:
    """A file of a run that only grows, as the manifests of its checkpoints hold it: bytes, and their sha256.

    Args:
        path: of the trail or the history.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size_bytes, self.sha = path, 0, hashlib.sha256()

    def up_to(self, size_bytes: int) -> FileMark:
        """Return what a manifest holds of the first bytes, once they are on the disk; only new bytes are read."""
        if size_bytes < self.size_bytes:
            self.size_bytes, self.sha = 0, hashlib.sha256()
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            file.seek(self.size_bytes)
            while self.size_bytes < size_bytes and (data := file.read(min(1 << 20, size_bytes - self.size_bytes))):
                self.sha.update(data)
                self.size_bytes += len(data)
        return {"size_bytes": self.size_bytes, "sha256": self.sha.hexdigest()}


def first_step_of(path: Path) -> int:
    """Return the step of a trail's first line; 0 if it has no lines."""
    with path.open("rb") as file, suppress(ValueError, KeyError, TypeError):
        return int(json.loads(file.readline())["step"])
    return 0


def is_as_recorded(path: Path, said: FileMark) -> bool:
    """Return whether a file begins with what a checkpoint's manifest says that it was when that was saved."""
    try:
        return Record(path).up_to(said["size_bytes"]) == {key: said[key] for key in ("size_bytes", "sha256")}
    except OSError:
        return False


def missing_steps(run_dir: Path, manifest: Manifest, *, every_n_steps: int, from_step: int = 0) -> list[list[int]]:
    """Return the ranges of steps, first and last, up to a checkpoint's, of which the trail has not the lines it had.

    Those that are not there; where all are, and yet it is not the trail that it was, all. The manifest of an older
    labtrain does not say what the trail was: then what is missing at its end.

    Args:
        run_dir: the run's folder.
        manifest: of the checkpoint.
        every_n_steps: how often a line was written; 0: never.
        from_step: the step that the run began from.
    """
    said, every = manifest.get("trail"), every_n_steps or 1
    last = manifest["step"] - manifest["step"] % every
    if not said:
        newest = max((step for step in _steps_in(run_dir / TRAIL) if step <= last), default=from_step)
        return [[newest - newest % every + every, last]] if every_n_steps and newest < last else []
    known = [list(steps) for steps in said["missing"]]
    if is_as_recorded(run_dir / TRAIL, said):
        return known
    first = said["first"]
    earlier = [steps for steps in known if steps[1] < first]
    found, before = list(earlier), first - every
    there = {step for step in _steps_in(run_dir / TRAIL) if first <= step <= last}
    there = {step for step in there if not any(begin <= step <= end for begin, end in known)}
    for step in [*sorted(there), last + every]:
        if step - before > every:
            found.append([before + every, step - every])
        before = step
    return found if found != known else [*earlier, [first, last]]


def _steps_in(path: Path) -> Iterator[int]:
    """Yield the step of each line of a trail that is one."""
    with suppress(OSError):
        for text in path.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                yield int(json.loads(text)["step"])


def phase_of(mine: Line, theirs: Line) -> str | None:
    """Return the first phase of one step that is not the same in two trails; None where all are."""
    return next((phase for field, phase in PHASES.items() if mine.get(field) != theirs.get(field)), None)


def differing_tensor(mine: Line, theirs: Line, names: list[str]) -> str | None:
    """Return the one tensor that differs in the first phase of a step that does; None where it is more than one.

    Args:
        mine: a line of one trail.
        theirs: the line of the same step of the other.
        names: of the tensors, by number.
    """
    phase = phase_of(mine, theirs)
    field = {"gradient": "gradients", "update": "weights"}.get(phase or "")
    one, other = (str(line.get(field or "") or "") for line in (mine, theirs))
    if not one or not other or len(one) != len(other):
        return None
    half = len(one) // 2
    modulus = 16**half
    plain, weighted = (
        (int(one[part], 16) - int(other[part], 16)) % modulus for part in (slice(half), slice(half, None))
    )
    found = [name for number, name in enumerate(names) if (2 * number + 1) * plain % modulus == weighted]
    return found[0] if len(found) == 1 else None


def first_step(one: Path, other: Path, names: list[str] | None = None) -> tuple[int, str, str | None] | None:
    """Return the first step that differs in the trails of two run folders, its phase, and the tensor where it is one.

    None where every step that both have is the same, and both go equally far; the phase `length` where one ends.
    """
    mine, theirs = trail_bytes(one), trail_bytes(other)
    if not mine or not theirs or mine == theirs:
        return None
    same = _line_of_the_first_difference(mine, theirs)
    if same < min(len(mine), len(theirs)):
        first, second = (
            parse_trail(lines[same : lines.find(b"\n", same)], folder)[0]
            for lines, folder in ((mine, one), (theirs, other))
        )
        if first["step"] == second["step"]:
            return first["step"], phase_of(first, second) or "line", differing_tensor(first, second, names or [])
    # One is written less often, begins later or ends earlier: by the steps that both have.
    steps = {line["step"]: line for line in read_trail(other)}
    trail = read_trail(one)
    for line in trail:
        there = steps.get(line["step"], line)
        if (phase := phase_of(line, there)) is not None:
            return line["step"], phase, differing_tensor(line, there, names or [])
    ends = trail[-1]["step"], max(steps)
    interval = max(
        trail[-1]["step"] - trail[-2]["step"] if len(trail) > 1 else 1,
        max(steps) - max(steps.keys() - {max(steps)}, default=0),
    )
    return None if abs(ends[0] - ends[1]) < interval else (min(ends) + 1, "length", None)


def _line_of_the_first_difference(one: bytes, other: bytes) -> int:
    """Return where the first line begins that differs, by bisection over how far both are the same."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        half = (same + most + 1) // 2
        if one[same:half] == other[same:half]:
            same = half
        else:
            most = half - 1
    return one.rfind(b"\n", 0, same) + 1
