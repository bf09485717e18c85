"""`labtrain rm`: remove runs with their checkpoints, also from their stores. No torch.

A run is first renamed to a hidden folder, in one step. So a removal that is interrupted leaves no run that looks whole,
and the same command continues it.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from labtrain.base.console import quoted, shown
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError, not_readable
from labtrain.base.permissions import open_lock
from labtrain.base.untrusted import remove_tree
from labtrain.record import receipt
from labtrain.record.identity import RUN_ID
from labtrain.record.own_runs import checkpoints_of
from labtrain.review.catalog.listing import is_trained, row_of, size_text
from labtrain.stores.backends import is_local
from labtrain.stores.layout import stores_of
from labtrain.stores.store import WRITER, Checkpoint, Store

GOING = ".removing"  # the end of the name of a run's folder while it is removed


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """A run to remove.

    Attributes:
        run_dir: its folder.
        folder: where its files are now: `run_dir`, or the hidden folder that an interrupted removal has left.
        outside: the store of its checkpoints, if that is not in its folder.
        checkpoints: what that store has.
        says: what is removed, in a line.
    """

    run_dir: Path
    folder: Path
    outside: Store | None
    checkpoints: list[Checkpoint]
    says: str


def plan(runs: Sequence[Path]) -> list[Removal]:
    """Return what to remove for each run, once all of them may be removed. Removes nothing.

    Raises:
        LabtrainError: a folder is not a run, a run is training, or its store cannot be read.
    """
    return list({removal.run_dir: removal for removal in map(_plan, runs)}.values())


def _plan(run: Path) -> Removal:
    run_dir = _left_by_id(run) or receipt.find(run)
    if run_dir.is_symlink():
        raise ConfigError(f"{shown(run_dir)} is a link, must be a run's folder", hint=f"ls -l {quoted(run_dir)}")
    run_dir = Path(os.path.abspath(run_dir))  # noqa: PTH100  # it may be a broken path
    folder = run_dir if run_dir.is_dir() or not _left(run_dir).is_dir() else _left(run_dir)
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise not_readable(folder)
    if not (folder / receipt.FILE).is_file() and folder == run_dir:
        raise ConfigError(f"{shown(run_dir)} is not a run: looked for {receipt.FILE}", hint="labtrain ls lists runs")
    try:
        found = receipt.read(folder)
    except DamagedError:
        if not RUN_ID.fullmatch(run_dir.name):  # it may be another program's receipt.json
            raise
        found = None
    if is_trained(folder):
        raise LabtrainError(f"{shown(run_dir)} is training", hint="stop it first; labtrain ls shows when it has ended")
    row = row_of(folder)
    size = row.size_bytes if row.size_bytes is not None else _size(folder)
    what = f"{row.status}, {row.steps} steps" if row.steps is not None else row.status
    outside, checkpoints = _outside(run_dir, folder, found)
    if outside is not None:
        size = _size(folder)
        remote = sum(sum(each.sizes.values()) for each in checkpoints)
        what += f", {len(checkpoints)} checkpoints with {size_text(remote)} in {outside.url}"
    says = f"{shown(run_dir)}  {what}, {size_text(size)}"
    return Removal(run_dir=run_dir, folder=folder, outside=outside, checkpoints=checkpoints, says=says)


def _outside(run_dir: Path, folder: Path, found: receipt.Receipt | None) -> tuple[Store | None, list[Checkpoint]]:
    """Return the store of a run's checkpoints and what it has; None if they are in its folder.

    If a run of the same name has begun since, the store is that run's.
    """
    if found is None or (folder != run_dir and run_dir.exists()):
        return None, []
    place = checkpoints_of(run_dir, found)
    if is_local(place) and Path(place).resolve().is_relative_to(run_dir.resolve()):
        return None, []
    store = stores_of(run_dir, place)[-1]
    there = store.find() if not store.local or Path(store.root).is_dir() else []
    for each in there:
        if each.complete and (other := store.manifest(each)["run_id"]) != found["run_id"]:
            raise LabtrainError(
                f"{each.url} is a checkpoint of run {other}, not of {found['run_id']}",
                hint=f"labtrain store ls {quoted(store.url)}; move it to its own run first",
            )
    return store, there


def _left(run_dir: Path) -> Path:
    return run_dir.with_name(f".{run_dir.name}{GOING}")


def _left_by_id(run: Path) -> Path | None:
    """Return the folder that a run had, if it is named by its id and its removal was interrupted."""
    if not RUN_ID.fullmatch(str(run)) or run.exists() or receipt.with_id(str(run), receipt.runs_folder()):
        return None
    left = sorted(receipt.runs_folder().glob(f"*/.{run}{GOING}"))
    return left[0].with_name(str(run)) if left else None


def remove(removal: Removal) -> None:
    """Remove a run: first from sight, then its checkpoints in a store, then its files.

    Raises:
        LabtrainError: a training has begun meanwhile, or this user may not remove it.
    """
    left = _left(removal.run_dir)
    with ExitStack() as held:
        try:
            if removal.folder == removal.run_dir:
                held.enter_context(_held(removal.run_dir))
                if left.exists():  # of an earlier run of this name
                    remove_tree(left)
                removal.run_dir.rename(left)
            if removal.outside is not None:
                for checkpoint in removal.checkpoints:
                    removal.outside.discard(checkpoint.path)
                removal.outside.remove(WRITER)
            fetched = removal.run_dir.with_name(f".{removal.run_dir.name}.fetched")
            for folder in (fetched, left):
                if folder.is_dir():
                    remove_tree(folder)
        except PermissionError as error:
            raise ConfigError(
                f"{shown(Path(str(error.filename or removal.run_dir)))}: no permission to remove it",
                hint=f"ls -ld {quoted(removal.run_dir.parent)}",
            ) from None


@contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run's training, so that none begins."""
    lock = open_lock(run_dir / receipt.LOCK)
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise LabtrainError(f"{shown(run_dir)} is training", hint="stop it first") from None
        yield
    finally:
        os.close(lock)


def _size(folder: Path) -> int:
    return sum(os.lstat(f"{here}/{name}").st_size for here, _, files in os.walk(folder) for name in files)
