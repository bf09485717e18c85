"""Where a training starts: at its own newest checkpoint, at that of another run, or at step 0."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from labtrain.base.console import shown, warn
from labtrain.base.contracts import Origin
from labtrain.base.credentials import without_secrets
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.permissions import make_folder, open_lock
from labtrain.base.signals import WRITER_NAME, status_of
from labtrain.checkpoints.format import check_loads
from labtrain.record import receipt
from labtrain.record.identity import Job
from labtrain.record.ranks import restarted
from labtrain.record.resume import checkpoint_digest
from labtrain.record.trail import BEST_UNSURE, HISTORY, TRAIL, is_as_recorded, missing_steps
from labtrain.stores.backends import is_local
from labtrain.stores.layout import checkpoint_place, newest_whole, spool_of, stores_of
from labtrain.stores.store import Manifest, Store, writer_lives

PATIENCE_S = 5  # a start waits this long for another one before it prints a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A checkpoint that a training resumes from: its name, its folder on this machine, and its manifest."""

    name: str
    path: Path
    manifest: Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where a training starts, and where it saves.

    Attributes:
        place: a folder or URL: where the run saves its checkpoints.
        fetched: a folder for copies of remote checkpoints.
        known: names of the checkpoints that were there.
        found: the checkpoint that it resumes from; None at step 0.
        origin: the receipt's entry for `found`, if that belongs to another run.
    """

    place: str
    fetched: Path
    known: set[str]
    found: Found | None
    origin: Origin | None

    @property
    def step(self) -> int:
        """The number of optimizer steps before this start."""
        return self.found.manifest["step"] if self.found else 0

    @property
    def path(self) -> Path | None:
        """The folder of the checkpoint."""
        return self.found.path if self.found else None

    @property
    def resumed(self) -> Found | None:
        """The checkpoint, if it is the run's own."""
        return self.found if self.origin is None else None


def find_start(job: Job) -> Start:
    """Return where a run starts.

    Raises:
        ConfigError: it should start from a run that has no checkpoint.
        LabtrainError: `find_checkpoint` cannot decide.
    """
    run_dir = Path(job.run_dir)
    place = checkpoint_place(run_dir, job.config["checkpoint"]["url"])
    job.hold(place)
    wait_for_writer(run_dir, place)
    fetched = run_dir.with_name(f".{run_dir.name}.fetched")
    known = {checkpoint.name for store in stores_of(run_dir, place) for checkpoint in store.checkpoints()}
    # If a launcher restarts a run that began from another run, the run resumes from its own checkpoints.
    resumes = not job.origin or job.origin_digest or restarted()
    found, origin = find_checkpoint(run_dir, place, fetched, run_id=job.run_id) if resumes else None, None
    if found is None and job.origin:
        found = find_checkpoint(run_dir, job.origin, fetched, run_id=None if job.origin_digest else job.run_id)
        origin = origin_of(job, found)
        if found is None:
            raise ConfigError(f"resume={job.config['resume']}: that run has no checkpoint yet", hint="resume=never")
    return Start(place=place, fetched=fetched, known=known, found=found, origin=origin)


def wait_for_writer(run_dir: Path, place: str) -> None:
    """Wait until the writer of a training that was killed has finished the save that it has (beside.py).

    It is on this machine. If the training is alive, return: this start is refused, or takes over, later.
    """
    home = Store(place if is_local(place) else spool_of(run_dir))
    begun, told = time.monotonic(), False
    while writer_lives(writer := home.writer()) and is_orphan(writer):
        if not told and time.monotonic() - begun > PATIENCE_S:
            told = True
            warn(f"waiting for process {writer and writer['process']}, which finishes a checkpoint in {home}")
        time.sleep(0.02)


def is_orphan(writer: Mapping[str, object] | None) -> bool:
    """Return whether a process wrote for a training that is dead; a live training may be suspended."""
    with suppress(OSError):
        if writer and Path(f"/proc/{writer['process']}/comm").read_text().strip() == WRITER_NAME:
            parent = int(status_of(cast(int, writer["process"]))[1])
            return parent != writer.get("parent", parent)
    return False


def find_checkpoint(run_dir: Path, place: str, into: Path, *, run_id: str | None) -> Found | None:
    """Return the newest whole checkpoint that a run resumes from.

    A checkpoint of a remote store is copied to this machine, once for all ranks that share the folder.

    Args:
        run_dir: its folder.
        place: where its checkpoints are, or those of another run that it resumes from.
        into: a folder for such copies.
        run_id: of the run whose checkpoints are there; None if they belong to another run.

    Raises:
        LabtrainError: the newest belongs to another run, or one is a link.
        StoreError: the store does not answer, so it is unknown whether it has a checkpoint.
    """
    stores = stores_of(run_dir, place)
    if is_local(place):
        found = newest_whole(stores, into=into, to_resume=True, run_id=run_id, look=check_loads)
    elif not any(store.checkpoints() for store in stores):
        found = None
    else:
        make_folder(into)
        with alone_in(into):
            found = newest_whole(stores, into=into, to_resume=True, run_id=run_id, look=check_loads)
    if found is None:
        return None
    checkpoint, path, manifest = found
    return Found(name=checkpoint.name, path=path, manifest=manifest)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process fetches into a folder; if that takes long, print which one."""
    with os.fdopen(open_lock(folder / ".lock"), "r+") as file:
        begun, patience = time.monotonic(), PATIENCE_S
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() - begun > patience:
                    patience += 60
                    file.seek(0)
                    warn(f"waiting for {file.read().strip() or 'another process'}, which fetches into {shown(folder)}")
                time.sleep(0.1)
        file.seek(0)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def refuse_outdated(before: receipt.Receipt | None, run_dir: Path) -> None:
    """Refuse to resume if another process has trained the run since this process read it.

    Raises:
        LabtrainError: the checkpoint that this start found may be old.
    """
    now = receipt.read(run_dir)
    if (now and now["digest"]) != (before and before["digest"]):
        raise LabtrainError(
            f"{shown(run_dir)}: another process trained it while this process started", hint="the same command resumes"
        )


def origin_of(job: Job, found: Found | None) -> Origin | None:
    """Return the receipt's entry for the checkpoint that a run starts from; None if the run resumes its own.

    Raises:
        ConfigError: it is not the checkpoint in the run's name.
    """
    if not job.origin_digest or found is None:
        return None
    name, manifest = found.name, found.manifest
    if (digest := checkpoint_digest(manifest)) != job.origin_digest:
        raise ConfigError(
            f"resume={job.config['resume']}: its newest checkpoint cannot be read, and the run would start from"
            f" an older checkpoint, {name}",
            hint=f"labtrain store check {job.origin}; rm -r the damaged one, then the same command starts from {name}",
        )
    return {
        "run_id": manifest["run_id"],
        "checkpoint": name,
        "step": manifest["step"],
        "digest": digest,
        "url": without_secrets(job.origin),
    }


def hold_records(
    run_dir: Path, found: Found, before: Mapping[str, Any], *, say: Callable[[str], None]
) -> list[list[int]]:
    """Warn if trail or history changed after a checkpoint was saved; return the steps that are lost.

    Args:
        run_dir: the run's folder.
        found: the checkpoint.
        before: the receipt, which says how often the trail has a line; if it is gone, the configuration.
        say: called with each warning.
    """
    name, manifest = found.name, found.manifest
    begun = (before.get("segments") or [{}])[0].get("origin") or {}
    missing = missing_steps(
        run_dir, manifest, every_n_steps=before["trail"]["every_n_steps"], from_step=begun.get("step", 0)
    )
    if missing:
        steps = ", ".join(f"{first} to {last}" if first < last else f"{first}" for first, last in missing)
        say(f"{TRAIL} was changed after {name} was saved: the lines of these steps are missing or different: {steps}")
    if (said := manifest.get("history")) and not is_as_recorded(run_dir / HISTORY, said):
        say(f"{HISTORY} was changed after {name} was saved: {BEST_UNSURE}")
    return missing


def warn_resumed(run_dir: Path, name: str, origin: Origin | None) -> None:
    """Print that a run resumes, or starts from another run, and from which checkpoint."""
    if origin is not None:
        warn(
            f"new run {shown(run_dir)}; it starts from checkpoint {name} of run {origin['run_id']}. "
            f"Run {origin['run_id']} is not modified."
        )
        return
    warn(f"{shown(run_dir)} resumes from {name} (resume=never starts a new run beside it)")
