"""What differs between two runs, and where they part: the first step of the trail, and the first tensor. No torch."""

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from labtrain.catalog import list_checkpoints
from labtrain.digests import read_weights
from labtrain.errors import DamagedError
from labtrain.run import get, what_counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """The first difference of two runs.

    Attributes:
        step: the first optimizer step whose trail differs; None where no trail shows one.
        phase: what differs first in it: batch, loss or weights; length where one trail ends.
        tensor: the first tensor, by name, that differs in the first checkpoint with a difference.
    """

    step: int | None
    phase: str | None
    tensor: str | None

    def __str__(self) -> str:
        parts = [f"first at step {self.step}, in the {self.phase}" if self.step is not None else "no step of the trail"]
        if self.tensor is not None:
            parts.append(f"first tensor {self.tensor}")
        return ", ".join(parts)


# What of a receipt can change bits; the rest says when, by whom and how far.
CAUSES = (
    "config",
    "code.digest",
    "environment.lock_digest",
    "environment.python",
    "environment.distributions.torch",
    "hardware.cpu",
    "hardware.libc",
    "hardware.gpus",
    "determinism",
)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each cause that differs between two receipts: key, before, now.

    A key of the configuration is one where it can change bits under either receipt: the number of devices can, where
    `determinism.shards` is not in use.
    """
    counting = {key for one in (before, now) for key in _flat(what_counts(one["config"]), "config")}
    found = []
    for cause in CAUSES:
        one, other = _flat(get(before, cause), cause), _flat(get(now, cause), cause)
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key) and (cause != "config" or key in counting):
                found.append({"key": key, "before": one.get(key), "now": other.get(key)})
    return found


def _flat(node: Any, key: str) -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {key: node}
    return {name: value for part, child in node.items() for name, value in _flat(child, f"{key}.{part}").items()}


def first_difference(one: Path, other: Path) -> Divergence | None:
    """Compare two run folders; None where every step and the weights of every common checkpoint are the same."""
    step, phase = _first_step(one, other)
    tensor = _first_tensor(one, other)
    return None if step is None and tensor is None else Divergence(step=step, phase=phase, tensor=tensor)


def _first_step(one: Path, other: Path) -> tuple[int | None, str | None]:
    for mine, theirs in zip_longest(read_trail(one), read_trail(other)):
        if mine is None or theirs is None:
            return int((mine or theirs)["step"]), "length"
        for field in ("step", "batch", "loss", "weights"):
            if mine[field] != theirs[field]:
                return int(mine["step"]), field
    return None, None


def _first_tensor(one: Path, other: Path) -> str | None:
    theirs = {manifest["step"]: path for path, manifest in list_checkpoints(other / "checkpoints")}
    for path, manifest in list_checkpoints(one / "checkpoints"):
        if manifest["step"] not in theirs:
            continue
        pairs = zip_longest(read_weights(path), read_weights(theirs[manifest["step"]]))
        for mine, their in pairs:
            if mine != their:
                return (mine or their or ("",))[0]
    return None


def read_trail(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's trail, a dict a step; a last line cut by a crash is left out.

    Raises:
        DamagedError: a line in the middle is broken.
    """
    path = run_dir / "trail.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise DamagedError(f"{path} is broken: {error}", hint=f"mv {run_dir} {run_dir}.broken") from error
