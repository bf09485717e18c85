"""Bring a newer labtrain's template, locks and wheel into an experiment: a three-way merge against what made it."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from labtrain import __version__
from labtrain.assets import asset
from labtrain.base.console import few, quoted
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.bootstrap import WHEEL_LOCK
from labtrain.environment.lock.derive import FLAKE_LOCK
from labtrain.environment.lock.files import read_project
from labtrain.environment.lock.newer import changed_pins
from labtrain.environment.lock.pins import read_pins
from labtrain.environment.lock.write import WRITTEN
from labtrain.project.carried import furnish
from labtrain.project.merge import Merged, Repository, alone, apply, merge, open_repository
from labtrain.project.origin import ASSETS, Carried, find_experiment, make_base, read_carried, render
from labtrain.record.identity import LOCK_FILE
from labtrain.record.sources import SUFFIXES

GOLDEN = "golden/receipt.json"
GENERATED = {*WRITTEN, FLAKE_LOCK, WHEEL_LOCK}
NOT_CODE = "tests/"  # below it nothing is part of a run's code
MOST = 40  # names in a line


@dataclass(frozen=True, kw_only=True, slots=True)
class Updated:
    """What an update did.

    Attributes:
        changes: lines about what changed.
        conflicts: lines about files that the person has to finish.
        next: lines with what to type.
    """

    changes: list[str]
    conflicts: list[str]
    next: list[str]


def update_experiment(folder: Path) -> Updated | None:
    """Update the experiment of a folder; None if it is up to date.

    Raises:
        LabtrainError: it cannot be updated. Nothing was changed, or the error says how to go back.
    """
    root = find_experiment(folder)
    with alone(root):
        repository = open_repository(root)
        carried = read_carried(root)
        _refuse_uncommitted(repository, carried)
        try:
            with tempfile.TemporaryDirectory() as name:
                found = _merge(repository, carried, Path(name))
        except OSError as error:
            raise LabtrainError(
                f"cannot make the update: {error}. No file has changed",
                hint="df -h ${TMPDIR:-/tmp}; make room, or elsewhere: TMPDIR=$HOME labtrain update",
            ) from error
        if found is None:
            return None
        updated, merged = found
        apply(repository, merged)
    return updated


def _merge(repository: Repository, carried: Carried, scratch: Path) -> tuple[Updated, Merged] | None:
    """Merge what the experiment's labtrain made with what this one makes; None if they are the same labtrain.

    Raises:
        OSError: `scratch` cannot be written.
    """
    base, values = make_base(carried, scratch)
    golden = scratch / "wheel" / ASSETS / GOLDEN
    _refuse_newer(carried, golden)
    theirs = render(asset("template"), values, scratch / "now")  # with any name: `labtrain new` would refuse some
    furnish(theirs)
    if (theirs / WHEEL_LOCK).read_text() == (carried.root / WHEEL_LOCK).read_text():
        return None
    merged = merge(repository, base, theirs, name=__version__, generated=GENERATED)
    now = _wheel_sha256(theirs)
    updated = Updated(
        changes=[
            f"labtrain {carried.version} ({carried.sha256[:12]}) -> {__version__} ({now[:12]})",
            *_files(repository, merged),
            *what_changes_bits(repository.inside(merged.changed), before=base, now=theirs, golden=golden),
        ],
        conflicts=merged.said,
        next=_next(repository, merged, _own_packages(carried.root, base)),
    )
    return updated, merged


def _refuse_uncommitted(repository: Repository, carried: Carried) -> None:
    for name in (WHEEL_LOCK, carried.wheel):
        if name not in repository.entries:
            raise ConfigError(
                f"{carried.root / name} is not committed: nobody could install the experiment from its repository",
                hint=f"git add -f {quoted(carried.root / name)} && git commit -m 'labtrain {carried.version}'",
            )


def _refuse_newer(carried: Carried, golden: Path) -> None:
    """Refuse to go back to an older labtrain.

    Of two builds of one version, the newer one has the newer reference run. Builds with the same reference run count as
    equal in age, and are not refused.
    """
    running = Version(__version__)
    same_version_but_newer = carried.version == running and _trained(golden) > _trained(asset(GOLDEN))
    if carried.version > running or same_version_but_newer:
        what = f"labtrain {carried.version}"
        if same_version_but_newer:
            what += f" with a reference run of {_trained(golden)}"
        raise ConfigError(
            f"{carried.root} carries {what}, newer than the labtrain that is running: {__version__}"
            + (f" with one of {_trained(asset(GOLDEN))}" if same_version_but_newer else ""),
            hint="make setup && . .venv/bin/activate   # the experiment's own labtrain",
        )


def _trained(golden: Path) -> str:
    """Return when a labtrain's reference run was trained: ISO 8601, UTC; empty if its receipt cannot be read."""
    try:
        return str(json.loads(golden.read_text())["segments"][-1]["started"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ""


def _wheel_sha256(experiment: Path) -> str:
    return (experiment / WHEEL_LOCK).read_text().strip().rpartition(":")[2]


def _own_packages(root: Path, base: Path) -> list[str]:
    """Return the packages that the experiment has besides labtrain's: named in pyproject.toml, or in its lock only."""
    named = read_project(root).get("dependencies", [])
    own, labtrains = ({pin.name for pin in read_pins(each / LOCK_FILE)} for each in (root, base))
    return list(map(str, named)) or sorted(own - labtrains)


def _files(repository: Repository, merged: Merged) -> list[str]:
    """Return lines about the files: how many change, which both sides had changed, and which of yours are replaced."""
    states = list(merged.changed.values())
    counts = ", ".join(
        f"{states.count(letter)} {word}" for letter, word in (("A", "new"), ("M", "modified"), ("D", "deleted"))
    )
    yours = repository.inside(merged.edited & merged.changed.keys())
    both = [name for name in yours if name not in {*GENERATED, *repository.inside(merged.conflicts)}]
    replaced = [name for name in yours if name in GENERATED]
    return [
        f"files  {len(states)} changed: {counts}",
        *([f"merged  with your edits: {few(both, MOST)}"] if both else []),
        *([f"replaced  {few(replaced, MOST)}: these are generated, yours were not merged"] if replaced else []),
    ]


def what_changes_bits(changed: list[str], *, before: Path, now: Path, golden: Path) -> list[str]:
    """Return lines about what can change results.

    Args:
        changed: the experiment's files that change.
        before: the experiment as its labtrain made it.
        now: as the running labtrain makes it.
        golden: the receipt of the reference run of the experiment's labtrain.
    """
    moved = changed_pins(before / LOCK_FILE, now / LOCK_FILE)
    code = [name for name in changed if name.endswith(SUFFIXES) and not name.startswith(NOT_CODE)]
    conf = [name for name in changed if name.startswith("conf/")]
    was, is_now = _weights(golden), _weights(asset(GOLDEN))
    reference = f"the same weights ({is_now[:12]})"
    if was != is_now:
        reference = f"other weights: {was[:12] or 'unknown'} -> {is_now[:12]}. Yours can differ, too"
    return [
        f"packages  {few(moved, MOST) if moved else 'the same versions'}",
        f"reference run  {reference}",
        f"code  {few(code, MOST) if code else 'yours is unchanged'}",
        f"configuration  {few(conf, MOST) if conf else 'yours is unchanged'}",
        "runs  labtrain and the lock are part of a run's name: new runs get new names. Old runs stay in runs/",
    ]


def _weights(golden: Path) -> str:
    try:
        return str(json.loads(golden.read_text())["results"]["weights_digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _next(repository: Repository, merged: Merged, own: list[str]) -> list[str]:
    """Return what to type, in order."""
    deleted, dropped = (repository.inside(merged.lacking(stage)) for stage in (2, 3))
    both = [quoted(name) for name in repository.inside(merged.conflicts) if name not in {*deleted, *dropped}]
    steps = [
        *([("git status", f"edit the files with conflicts, then: git add {' '.join(both)}")] if both else []),
        *((f"git rm {quoted(name)}", f"keeps it deleted; or keep it: git add {quoted(name)}") for name in deleted),
        *(
            (f"git add {quoted(name)}", f"keeps it; or delete it: git rm {quoted(name)}")
            for name in dropped
            if name not in deleted
        ),
        ("git diff --cached", "what changed"),
        ("make setup", "installs the new lock"),
        *(
            [(".venv/bin/labtrain lock write && make setup && git add -u", f"your own packages: {few(own)}")]
            if own
            else []
        ),
        (f"git commit -m 'labtrain {__version__}'", "new runs then name this commit"),
        ("git reset --hard", "instead of a commit: goes back to before the update"),
    ]
    width = max(len(command) for command, _ in steps)
    return [f"{command:<{width}}  # {what}" for command, what in steps]


def lines_of(updated: Updated) -> list[str]:
    """Return the lines to print."""
    width = max(len(line.partition("  ")[0]) for line in updated.changes[1:])
    changes = [f"  {what:<{width}}  {rest}" for what, _, rest in (line.partition("  ") for line in updated.changes[1:])]
    conflicts = [f"  {line}" for line in updated.conflicts]
    return [updated.changes[0], *changes, *(["conflicts", *conflicts] if conflicts else []), "next",
            *(f"  {line}" for line in updated.next)]  # fmt: skip
