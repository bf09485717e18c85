"""The trail: one line for each step. Read it, and find the first difference between two trails. No torch.

A line has step, epoch, loss (exact), and digests of the batch's indices, of the gradients before the optimizer's step
and of the weights after it (checksums.py). No part of a line depends on when or how a run was trained. So two trails
of one run have the same lines in all common steps.
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
from labtrain.base.files import writing

TRAIL = "trail.jsonl"
HISTORY = "history.jsonl"  # the lines that depend on the machine and the time (history.py)
BEST_UNSURE = "the best value that the receipt names may be wrong"  # ends a note of the receipt
# Fields in the order in which a step computes them; the first that differs names the phase.
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
SUMS = re.compile(r"(?:[0-9a-f]{2}){1,64}")  # two hex numbers of equal width


def read_trail(run_dir: Path) -> list[Line]:
    """Return a run's trail, one dict for each line; an incomplete last line is left out.

    Raises:
        DamagedError: another line is broken.
    """
    return parse_trail(trail_bytes(run_dir), run_dir)


def trail_bytes(run_dir: Path) -> bytes:
    """Return the bytes of a run's trail, without an incomplete last line; empty if there is no file.

    Raises:
        DamagedError: it is not a regular file.
    """
    path = run_dir / TRAIL
    with suppress(FileNotFoundError, NotADirectoryError), untrusted.damage_of(path, hint=_aside(path)):
        lines = untrusted.read(path, untrusted.LINES_BYTES)
        return lines[: lines.rfind(b"\n") + 1]
    return b""


def parse_trail(lines: bytes, run_dir: Path) -> list[Line]:
    """Parse complete lines of a run's trail, one dict for each.

    Raises:
        DamagedError: a line is not a trail line.
    """
    path = run_dir / TRAIL
    with untrusted.damage_of(path, hint=f"mv {quoted(run_dir)} {quoted(f'{run_dir}.broken')}"):
        text = b"[" + lines.rstrip(b"\n").replace(b"\n", b",") + b"]"  # a third faster than line by line
        found: list[Line] = json.loads(text.decode())
        for number, line in enumerate(found, 1):
            if not _is_line(line):
                raise ValueError(f"line {number} is not a trail line: {json.dumps(line)[:100]}")
    return found


def _is_line(line: object) -> bool:
    """Return whether a value is a trail line; lines of older trails and of tests have fewer keys."""
    return (
        isinstance(line, dict)
        and untrusted.is_count(line.get("step"))
        and not any(isinstance(value, dict | list) for value in line.values())
        and isinstance(line.get("loss"), int | float | str | None)
        and all((sums := line.get(key)) is None or (isinstance(sums, str) and SUMS.fullmatch(sums)) for key in SUMMED)
    )


def read_history_lines(run_dir: Path) -> Iterator[HistoryLine]:
    """Yield the lines of a run's history; skip lines truncated by a kill, which are not JSON.

    Raises:
        DamagedError: it is not a regular file, or a complete line is not a history line.
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
                raise ValueError(f"line {number} is not a history line: {text[:100].decode(errors='replace')}")
        yield line


def is_history_line(line: object) -> bool:
    """Return whether a value is a history line: it has a step, and metrics by name."""
    return (
        isinstance(line, dict)
        and untrusted.is_count(line.get("step"))
        and isinstance(line.get("metrics"), dict)
        and all(isinstance(name, str) and untrusted.is_number(value) for name, value in line["metrics"].items())
    )


def _aside(path: Path) -> str:
    """Return a command that moves a file out of the way."""
    return f"mv {quoted(path)} {quoted(f'{path}.broken')}"


def cut_trail(path: Path, *, last_step: int) -> None:
    """Truncate a trail after `last_step`; also remove an incomplete last line."""
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
        os.truncate(path, end)  # atomic: a crash leaves the old or the new file


class Record:
    """An append-only file of a run, as recorded in checkpoint manifests: size and sha256.

    Args:
        path: of the trail or the history.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size_bytes, self.sha = path, 0, hashlib.sha256()

    def up_to(self, size_bytes: int) -> FileMark:
        """Return the manifest's entry for the first bytes, after syncing them to disk; read only new bytes.

        Raises:
            WriteError: they cannot be synced.
            OSError: there is no such file.
        """
        if size_bytes < self.size_bytes:
            self.size_bytes, self.sha = 0, hashlib.sha256()
        with self.path.open("rb") as file:
            with writing(self.path):
                os.fsync(file.fileno())
            file.seek(self.size_bytes)
            while self.size_bytes < size_bytes and (data := file.read(min(1 << 20, size_bytes - self.size_bytes))):
                self.sha.update(data)
                self.size_bytes += len(data)
        return {"size_bytes": self.size_bytes, "sha256": self.sha.hexdigest()}


def first_step_of(path: Path) -> int:
    """Return the step of a trail's first line; 0 if there are no lines."""
    with path.open("rb") as file, suppress(ValueError, KeyError, TypeError):
        return int(json.loads(file.readline())["step"])
    return 0


def is_as_recorded(path: Path, said: FileMark) -> bool:
    """Return whether a file begins with the bytes that a checkpoint's manifest recorded."""
    try:
        return Record(path).up_to(said["size_bytes"]) == {key: said[key] for key in ("size_bytes", "sha256")}
    except OSError:
        return False


def missing_steps(run_dir: Path, manifest: Manifest, *, every_n_steps: int, from_step: int = 0) -> list[list[int]]:
    """Return ranges (first, last) of steps up to a checkpoint whose trail lines are missing or changed.

    If no line is missing but the trail changed, return all steps. The manifest of an older labtrain does not record the
    trail: then return only what is missing at its end.

    Args:
        run_dir: the run's folder.
        manifest: of the checkpoint.
        every_n_steps: interval of the trail's lines; 0: no trail.
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
    """Yield the step of each valid line of a trail."""
    with suppress(OSError):
        for text in path.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                yield int(json.loads(text)["step"])


def phase_of(mine: Line, theirs: Line) -> str | None:
    """Return the first phase of a step that differs between two trails; None if all are the same."""
    return next((phase for field, phase in PHASES.items() if mine.get(field) != theirs.get(field)), None)


def differing_tensor(mine: Line, theirs: Line, names: list[str]) -> str | None:
    """Return the tensor that differs in a step's first differing phase; None if several differ.

    Args:
        mine: a line of one trail.
        theirs: the line of the same step in the other trail.
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
    """Return the first step that differs in the trails of two run folders, its phase, and the tensor if it is only one.

    None if all common steps are the same and both trails end together; phase `length` if one trail ends earlier.
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
    # One trail has fewer lines, begins later or ends earlier: compare the common steps.
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
    """Return the offset of the first line that differs, by bisection over the common prefix."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        half = (same + most + 1) // 2
        if one[same:half] == other[same:half]:
            same = half
        else:
            most = half - 1
    return one.rfind(b"\n", 0, same) + 1
