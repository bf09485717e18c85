"""What differs between two runs: causes first, then where they part. No torch.

A cause is what can change bits and is not the same: configuration, code, environment, hardware, determinism, data. What
differs and cannot change them, as the number of devices cannot with shards, is told apart. Where they part is
read in their trails (trail.py).
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

# What of a receipt can change bits; the rest says when, by whom and how far.
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
OF_THE_PROCESSOR = ("hardware.cpu", "hardware.instruction_sets")  # which portable mode makes equal
ORIGIN = "segments.0.origin.digest"
AT_THE_END = ("environment.files", "environment.changed_files")  # told by a training that has ended
# It follows from another, or is the same fact in other words.
WITHOUT_A_SAY = ("code.digest", "determinism.notes", "determinism.any_number_of_devices")


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One fact of two receipts that is not the same.

    Attributes:
        key: its place in the receipt.
        a: in the first.
        b: in the second.
        matters: whether it can change bits.
    """

    key: str
    a: object
    b: object
    matters: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """The first difference of two runs.

    Attributes:
        step: the first optimizer step whose trail differs; None where no trail shows one.
        phase: what differs first in it: batch, loss, gradient or update; length where one trail ends.
        tensor: the one tensor that differs in it; where it is more than one, the first, by name, that differs in the
            first checkpoint with a difference.
    """

    step: int | None
    phase: str | None
    tensor: str | None

    def __str__(self) -> str:
        parts = [f"first at step {self.step}, in the {self.phase}" if self.step is not None else "no step of the trail"]
        if self.tensor is not None:
            parts.append(f"first tensor {self.tensor}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What `labtrain diff` tells of two runs.

    Attributes:
        differences: of their receipts, causes first.
        overrides: what turns the first's configuration into the second's, as one types it.
        divergence: where they part; None where trails and common checkpoints are the same.
        metrics: (first, second) of each that is not the same, by name; None where one has it not.
        same_weights: whether both ended with the same; None where one has not ended.
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
        if repr(mine["metrics"].get(name)) != repr(theirs["metrics"].get(name))  # NaN is itself here
    } if mine and theirs else {}  # fmt: skip
    return Comparison(
        differences=sorted(differences(a, b), key=lambda each: not each.matters),
        overrides=overrides(as_options(a["config"]), as_options(b["config"])),
        divergence=first_difference(first, second),
        metrics=metrics,
        same_weights=mine["weights_digest"] == theirs["weights_digest"] if mine and theirs else None,
    )


def lines_of(found: Comparison) -> Iterator[str]:
    """Yield what a person reads of a comparison."""
    for matters, title in ((True, "causes"), (False, "differs, and cannot change bits")):
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
    words = {True: "the same", False: "others", None: "not compared: a run is not complete"}
    yield f"weights at the end: {words[found.same_weights]}"
    yield f"trails and checkpoints: {found.divergence or 'the same wherever both have them'}"
    yield from (f"  {name}  {shown_value(a)} -> {shown_value(b)}" for name, (a, b) in found.metrics.items())


def differences(a: receipts.Receipt, b: receipts.Receipt) -> Iterator[Difference]:
    """Yield what is not the same in two receipts, and whether it can change bits.

    A key of the configuration can where it is in the run's name under either receipt: the number of devices is not
    where `determinism.shards` is in use. The processor cannot where both ran in portable mode.
    """
    counting = {key for each in (a, b) for key in flat(what_counts(each["config"]), "config")}
    portable = all(each["determinism"]["mode"] == "portable" for each in (a, b))
    for section in ("config", "code", "environment", "hardware", "determinism", "data"):
        mine, theirs = flat(a[section], section), flat(b[section], section)
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            if mine.get(key) == theirs.get(key) or key in WITHOUT_A_SAY:
                continue
            if key.startswith(f"data.{OF_A_FILE}") and None in (mine.get(key), theirs.get(key)):
                continue  # the same file lies elsewhere, or was read from a cache
            if key in AT_THE_END and None in (mine.get(key), theirs.get(key)):
                continue
            wanted = {"determinism.seed": "seed"}.get(key, key)
            if section == "determinism" and get(a["config"], wanted) != get(b["config"], wanted):
                continue  # told as the configuration's
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

    What a receipt tells of its end alone, the installed files, is left out.
    """
    return [
        {"key": each.key, "before": each.a, "now": each.b}
        for each in differences(before, now)
        if each.matters and each.key not in AT_THE_END
    ]


def overrides(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """Return what turns one configuration into another, as Hydra's overrides."""
    mine, theirs = flat(a, ""), flat(b, "")
    changed = [f"{key}={_typed(theirs[key])}" for key in mine if key in theirs and mine[key] != theirs[key]]
    gone = [f"~{key}" for key in mine if key not in theirs]
    new = [f"+{key}={_typed(value)}" for key, value in theirs.items() if key not in mine]
    return changed + gone + new


def first_difference(one: Path, other: Path) -> Divergence | None:
    """Compare two run folders; None where every step and the weights of every common checkpoint are the same.

    Checkpoints that cannot be read, since their store is away, are not compared: that is said.
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
    """Return a run's folder and its receipt, once its trail has been held against it.

    Args:
        run: a run's folder, or a receipt.

    Raises:
        ConfigError: there is no run.
        DamagedError: the receipt or the trail is broken, or was changed.
    """
    run_dir = run.parent if run.name == receipts.FILE else run
    found = receipts.read(run_dir)
    if found is None:
        raise ConfigError(f"{shown(run_dir)} is no run: looked for {receipts.FILE}", hint="ls runs/*/")
    said, trail = found["trail"]["sha256"], run_dir / TRAIL
    there = None
    if said is not None and found["status"] != "running":
        wrong = damage_of(shown(trail), hint="take it from where it was written")
        with suppress(FileNotFoundError), wrong, open_plain(trail) as file:
            there = sha256_of(file)
    if said is not None and there not in (None, said):
        raise DamagedError(
            f"{shown(trail)} was changed after it was written: its receipt says sha256 {said[:12]}",
            hint="take it from where it was written",
        )
    return run_dir, found


def shown_value(value: object) -> str:
    """Return a value of a receipt in one line, shortened."""
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= VALUE_WIDTH else f"{text[:VALUE_WIDTH]}..."


def flat(node: object, key: str) -> dict[str, object]:
    """Return the leaves of nested dicts by their dotted keys, below `key`."""
    if not isinstance(node, dict) or not node:
        return {key: node}
    leaves: dict[str, object] = {}
    for part, child in node.items():
        leaves |= flat(child, f"{key}.{part}" if key else part)
    return leaves


def _typed(value: object) -> str:
    """Return a value in Hydra's grammar of overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_typed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_typed, value)) + "]"
    if isinstance(value, str):
        plain = value and all(letter.isalnum() or letter in "_-./" for letter in value)
        plain = plain and not _means_something_else(value)
        # In quotes a backslash is itself, but where it stands before a quote.
        return value if plain else "'" + re.sub(r"(\\*)('|$)", _escaped, value) + "'"
    return json.dumps(value)


def _escaped(match: re.Match[str]) -> str:
    return match[1] * 2 + ("\\'" if match[2] else "")


def _means_something_else(text: str) -> bool:
    """Return whether a text, typed as it is, is a number or a word of Hydra's."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("null", "true", "false", "nan", "inf", "-inf")
    return True


def _first_tensor(one: Path, other: Path) -> str | None:
    """Return the first tensor, by name, that differs in the first checkpoint that both have with a difference.

    Wherever their checkpoints lie; of two in a remote store, only those are fetched whose manifests differ.
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
    """Yield the checkpoints of a run, by step and whether they hold its end: in its folder, or at checkpoint.url."""
    found = receipts.read(run_dir)
    place = checkpoints_of(run_dir, found) if found else str(run_dir / "checkpoints")
    for store in stores_of(run_dir, place):
        for checkpoint in store.checkpoints():
            with suppress(DamagedError):
                manifest = store.manifest(checkpoint)
                yield (manifest["step"], manifest.get("finished", False)), (checkpoint, manifest)
