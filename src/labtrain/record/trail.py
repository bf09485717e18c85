"""The trail: a line a step, what it holds, how it is read, and where two of them part. No torch.

A line says step, epoch, loss (exactly), and digests: of the batch's indices, of the gradients before the optimizer's
step and of the weights after it (checksums.py). Nothing in a line depends on when or how a run was trained, so two
trails of one run have the same lines, wherever both have one.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from labtrain.base.errors import DamagedError

TRAIL = "trail.jsonl"
HISTORY = "history.jsonl"  # its companion, of one machine and its time of day (history.py)
# In the order in which a step makes them; and the phase of the step that the first one that differs names.
PHASES = {
    "step": "step",
    "epoch": "epoch",
    "batch": "batch",
    "loss": "loss",
    "gradients": "gradient",
    "weights": "update",
}

Line = dict[str, Any]


def read_trail(run_dir: Path) -> list[Line]:
    """Return a run's trail, a dict a step; a last line cut by a crash is left out.

    Raises:
        DamagedError: a line in the middle is broken.
    """
    return parse_trail(trail_bytes(run_dir), run_dir)


def trail_bytes(run_dir: Path) -> bytes:
    """Return a run's trail as it lies there, without a last line cut by a crash; empty where there is none."""
    path = run_dir / TRAIL
    if not path.exists():
        return b""
    lines = path.read_bytes()
    return lines[: lines.rfind(b"\n") + 1]


def parse_trail(lines: bytes, run_dir: Path) -> list[Line]:
    """Return whole lines of a run's trail, a dict a step."""
    try:
        return list(json.loads(b"[" + lines.rstrip(b"\n").replace(b"\n", b",") + b"]"))  # a third faster than by lines
    except ValueError as error:
        path = run_dir / TRAIL
        raise DamagedError(f"{path} is broken: {error}", hint=f"mv {run_dir} {run_dir}.broken") from error


def read_history_lines(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's history; one that a kill cut short is no JSON, and is passed over."""
    path = run_dir / HISTORY
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                yield json.loads(line)


def cut_trail(path: Path, *, last_step: int) -> None:
    """Keep a trail's lines up to `last_step`; a last line without its end, left by a crash, goes too."""
    if not path.exists():
        return
    lines = path.read_bytes()
    end = lines.rfind(b"\n") + 1
    while end:
        begin = lines.rfind(b"\n", 0, end - 1) + 1
        if parse_trail(lines[begin:end], path.parent)[0]["step"] <= last_step:
            break
        end = begin
    if end < len(lines):
        os.truncate(path, end)  # in one step: a crash leaves the one or the other


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
    if field is None or not mine[field] or not theirs[field] or len(mine[field]) != len(theirs[field]):
        return None
    half = len(mine[field]) // 2
    modulus = 16**half
    plain, weighted = (
        (int(mine[field][part], 16) - int(theirs[field][part], 16)) % modulus
        for part in (slice(half), slice(half, None))
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
