"""Compare two runs: the causes of differences, then the first step that differs. No torch.

A cause is a difference that can change bits: in configuration, code, environment, hardware, determinism or data. Other
differences, such as the number of devices with shards, are listed apart. The trails show the first step that differs
(trail.py).
"""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

from labtrain.base.console import shown, warn
from labtrain.base.contracts import Change, as_options
from labtrain.base.errors import ConfigError, DamagedError, StoreError
from labtrain.base.files import sha256_of
from labtrain.base.untrusted import damage_of, open_plain
from labtrain.record import receipt as receipts
from labtrain.record.digests import read_weights
from labtrain.record.fingerprints import OF_A_FILE
from labtrain.record.identity import get, what_counts
from labtrain.record.own_runs import checkpoints_of
from labtrain.record.trail import TRAIL, first_step
from labtrain.stores.layout import stores_of
from labtrain.stores.store import Checkpoint, Manifest

KEY_WIDTH, VALUE_WIDTH = 44, 60  # of the table

# The parts of a receipt that can change bits; the rest says when, by whom and how far.
CAUSES = (
    "config",
    "code.sources",
    "code.outside",
    "code.labtrain",
    "environment.route",
    "environment.lock_digest",
    "environment.python",
    "environment.distributions",
    "environment.changed_files",
    "hardware.cpu",
    "hardware.instruction_sets",
    "hardware.libc",
    "hardware.gpus",
    "hardware.driver",
    "hardware.cuda",
    "hardware.cudnn",
    "hardware.nccl",
    "determinism",
    "data",
)
OF_THE_PROCESSOR = ("hardware.cpu", "hardware.instruction_sets")  # without effect in portable mode
ORIGIN = "segments.0.origin.digest"
AT_THE_END = ("environment.files", "environment.changed_files")  # only in the receipt of a training that has ended
# Derived from other keys.
WITHOUT_A_SAY = ("code.digest", "determinism.notes", "determinism.any_number_of_devices")


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One difference between two receipts.

    Attributes:
        key: the dotted key in the receipt.
        a: the first receipt's value.
        b: the second receipt's value.
        matters: whether it can change bits.
    """

    key: str
    a: object
    b: object
    matters: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """The first difference between two runs.

    Attributes:
        step: the first optimizer step whose trail differs; None if the trails show none.
        phase: the first phase that differs: batch, loss, gradient or update; length if one trail ends.
        tensor: the tensor that differs, if there is only one; otherwise the first, by name, that differs in the first
            checkpoint with a difference.
    """

    step: int | None
    phase: str | None
    tensor: str | None

    def __str__(self) -> str:
        parts = [f"first at step {self.step}, in the {self.phase}" if self.step is not None else "not in the trail"]
        if self.tensor is not None:
            parts.append(f"first tensor {self.tensor}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The result of `labtrain diff`.

    Attributes:
        differences: between the receipts, causes first.
        overrides: Hydra overrides that turn the first configuration into the second.
        divergence: the first difference; None if trails and common checkpoints are the same.
        metrics: (first, second) of each metric that differs, by name; None if a run has no such metric.
        same_weights: whether the final weights are the same; None if a run is not complete.
    """

    differences: list[Difference]
    overrides: list[str]
    divergence: Divergence | None
    metrics: dict[str, tuple[float | None, float | None]]
    same_weights: bool | None

    @property
    def same(self) -> bool:
        causes = any(difference.matters for difference in self.differences)
        return not causes and self.divergence is None and not self.metrics and self.same_weights is not False


def compare(one: Path, other: Path) -> Comparison:
    """Compare two runs.

    Args:
        one: a run's folder, or a receipt.
        other: the same.

    Raises:
        ConfigError: there is no run.
        DamagedError: a receipt or a trail is broken, or was changed.
    """
    (first, a), (second, b) = open_run(one), open_run(other)
    mine, theirs = a["results"], b["results"]
    metrics = {
        name: (mine["metrics"].get(name), theirs["metrics"].get(name))
        for name in sorted({*mine["metrics"], *theirs["metrics"]})
        if repr(mine["metrics"].get(name)) != repr(theirs["metrics"].get(name))  # by repr, NaN equals NaN
    } if mine and theirs else {}  # fmt: skip
    return Comparison(
        differences=sorted(differences(a, b), key=lambda each: not each.matters),
        overrides=overrides(as_options(a["config"]), as_options(b["config"])),
        divergence=first_difference(first, second),
        metrics=metrics,
        same_weights=mine["weights_digest"] == theirs["weights_digest"] if mine and theirs else None,
    )


def lines_of(found: Comparison) -> Iterator[str]:
    """Yield a comparison as lines of text."""
    for matters, title in ((True, "causes"), (False, "other differences: cannot change bits")):
        rows = [
            (each.key, shown_value(each.a), shown_value(each.b))
            for each in found.differences
            if each.matters == matters
        ]
        if rows:
            yield title
            width = min(max(len(key) for key, _, _ in rows), KEY_WIDTH)
            yield from (f"  {key:<{width}}  {a} -> {b}" for key, a, b in rows)
    if found.overrides:
        yield f"from A's configuration to B's: python train.py {' '.join(map(shlex.quote, found.overrides))}"
    words = {True: "the same", False: "different", None: "not compared: a run is not complete"}
    yield f"final weights: {words[found.same_weights]}"
    yield f"trails and checkpoints: {found.divergence or 'the same in all common steps'}"
    yield from (f"  {name}  {shown_value(a)} -> {shown_value(b)}" for name, (a, b) in found.metrics.items())


def differences(a: receipts.Receipt, b: receipts.Receipt) -> Iterator[Difference]:
    """Yield the differences between two receipts, and whether each can change bits.

    A configuration key can change bits if it is part of either run's name. With `determinism.shards` the number of
    devices is not part of it. The processor cannot change bits if both runs used portable mode.
    """
    counting = {key for each in (a, b) for key in flat(what_counts(each["config"]), "config")}
    portable = all(each["determinism"]["mode"] == "portable" for each in (a, b))
    for section in ("config", "code", "environment", "hardware", "determinism", "data"):
        mine, theirs = flat(a[section], section), flat(b[section], section)
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            if mine.get(key) == theirs.get(key) or key in WITHOUT_A_SAY:
                continue
            if key.startswith(f"data.{OF_A_FILE}") and None in (mine.get(key), theirs.get(key)):
                continue  # the same file in another place, or read from a cache
            if key in AT_THE_END and None in (mine.get(key), theirs.get(key)):
                continue
            wanted = {"determinism.seed": "seed"}.get(key, key)
            if section == "determinism" and get(a["config"], wanted) != get(b["config"], wanted):
                continue  # reported as a difference of the configuration
            if section == "config":
                matters = key in counting
            else:
                matters = any(key == cause or key.startswith(f"{cause}.") for cause in CAUSES)
                matters = matters and not (portable and key in OF_THE_PROCESSOR)
            yield Difference(key=key, a=mine.get(key), b=theirs.get(key), matters=matters)
    begun = [receipts.origin_digest(each) or None for each in (a, b)]
    if begun[0] != begun[1]:
        yield Difference(key=ORIGIN, a=begun[0], b=begun[1], matters=True)


def changes(before: receipts.Receipt, now: receipts.Receipt) -> list[Change]:
    """Return each cause that differs between two receipts of one run: key, before, now.

    Installed files are left out: only the receipt of a training that has ended has them.
    """
    return [
        {"key": each.key, "before": each.a, "now": each.b}
        for each in differences(before, now)
        if each.matters and each.key not in AT_THE_END
    ]


def overrides(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """Return the Hydra overrides that turn one configuration into another."""
    mine, theirs = flat(a, ""), flat(b, "")
    changed = [f"{key}={_typed(theirs[key])}" for key in mine if key in theirs and mine[key] != theirs[key]]
    gone = [f"~{key}" for key in mine if key not in theirs]
    new = [f"+{key}={_typed(value)}" for key, value in theirs.items() if key not in mine]
    return changed + gone + new


def first_difference(one: Path, other: Path) -> Divergence | None:
    """Compare two run folders; None if every common step and the weights of every common checkpoint are the same.

    If checkpoints cannot be read, for example because the store is not reachable, warn and compare only the trails.
    """
    found = receipts.read(one)
    names = found["trail"]["tensors"] if found else []
    step, phase, tensor = first_step(one, other, names) or (None, None, None)
    try:
        tensor = tensor or _first_tensor(one, other)
    except (StoreError, DamagedError) as error:
        warn(f"checkpoints are not compared: {error.args[0]}")
    return None if step is None and tensor is None else Divergence(step=step, phase=phase, tensor=tensor)


def open_run(run: Path) -> tuple[Path, receipts.Receipt]:
    """Return a run's folder and its receipt, after checking the trail's sha256.

    Args:
        run: a run's folder or id, or a receipt.

    Raises:
        ConfigError: there is no run.
        DamagedError: the receipt or the trail is broken or was changed.
    """
    run_dir = run.parent if run.name == receipts.FILE else receipts.find(run)
    found = receipts.read(run_dir)
    if found is None:
        raise ConfigError(f"{shown(run_dir)} is not a run: looked for {receipts.FILE}", hint="labtrain ls lists runs")
    said, trail = found["trail"]["sha256"], run_dir / TRAIL
    there = None
    if said is not None and found["status"] != "running":
        wrong = damage_of(shown(trail), hint="copy it again from the machine that trained the run")
        with suppress(FileNotFoundError), wrong, open_plain(trail) as file:
            there = sha256_of(file)
    if said is not None and there not in (None, said):
        raise DamagedError(
            f"{shown(trail)} was changed after it was written: its receipt records sha256 {said[:12]}",
            hint="copy it again from the machine that trained the run",
        )
    return run_dir, found


def shown_value(value: object, *, most: int | None = VALUE_WIDTH) -> str:
    """Format a receipt's value in one line; `most` characters at most, None: all."""
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if most is None or len(text) <= most else f"{text[:most]}..."


def flat(node: object, key: str) -> dict[str, object]:
    """Return the leaves of nested dicts by their dotted keys, below `key`."""
    if not isinstance(node, dict) or not node:
        return {key: node}
    leaves: dict[str, object] = {}
    for part, child in node.items():
        leaves |= flat(child, f"{key}.{part}" if key else part)
    return leaves


def _typed(value: object) -> str:
    """Format a value in Hydra's override grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_typed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_typed, value)) + "]"
    if isinstance(value, str):
        plain = value and all(letter.isalnum() or letter in "_-./" for letter in value)
        plain = plain and not _means_something_else(value)
        # In quotes a backslash is literal, except before a quote.
        return value if plain else "'" + re.sub(r"(\\*)('|$)", _escaped, value) + "'"
    return json.dumps(value)


def _escaped(match: re.Match[str]) -> str:
    return match[1] * 2 + ("\\'" if match[2] else "")


def _means_something_else(text: str) -> bool:
    """Return whether an unquoted text is a number or a keyword to Hydra."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("null", "true", "false", "nan", "inf", "-inf")
    return True


def _first_tensor(one: Path, other: Path) -> str | None:
    """Return the first tensor, by name, that differs in the first common checkpoint with a difference.

    From a remote store, fetch only checkpoints whose weights digests differ.
    """
    theirs = dict(_checkpoints(other))
    with TemporaryDirectory(prefix="labtrain-") as scratch:
        for which, (mine, manifest) in sorted(dict(_checkpoints(one)).items()):
            their, its = theirs.get(which, (mine, manifest))
            remote = not (mine.store.local and their.store.local)
            if their is mine or (remote and manifest.get("weights_digest") == its.get("weights_digest")):
                continue
            folders = [each.store.fetch(each, Path(scratch, side, each.name))[0] if not each.store.local
                       else each.folder for side, each in (("a", mine), ("b", their))]  # fmt: skip
            for a, b in zip_longest(*map(read_weights, folders)):
                if a != b:
                    return (a or b or ("",))[0]
    return None


def _checkpoints(run_dir: Path) -> Iterator[tuple[tuple[int, bool], tuple[Checkpoint, Manifest]]]:
    """Yield a run's checkpoints, in its folder or at checkpoint.url, by step and whether they are the final one."""
    found = receipts.read(run_dir)
    place = checkpoints_of(run_dir, found) if found else str(run_dir / "checkpoints")
    for store in stores_of(run_dir, place):
        for checkpoint in store.checkpoints():
            with suppress(DamagedError):
                manifest = store.manifest(checkpoint)
                yield (manifest["step"], manifest.get("finished", False)), (checkpoint, manifest)
