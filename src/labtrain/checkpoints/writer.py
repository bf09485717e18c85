"""Writes and delivers a run's checkpoints, and removes old ones, while the run trains (beside.py).

::

    files and their sha256, fsync, manifest, rename     then retention
    delivery to checkpoint.url, if that is remote       delivery.py

Rank 0 writes what all ranks have. If the state is spread over the ranks, each writes its part, and rank 0 publishes the
checkpoint when all parts are on the disk.
"""

import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch.distributed as dist

from labtrain.base.contracts import Link, State, TrailMark
from labtrain.base.errors import DamagedError, LabtrainError, StoreError, os_error_in
from labtrain.checkpoints.format import together, write_files
from labtrain.record.trail import HISTORY, TRAIL, Record, first_step_of
from labtrain.stores.backends import is_local
from labtrain.stores.delivery import Delivery
from labtrain.stores.layout import check_chain, check_run, spool_of, without_links
from labtrain.stores.store import SCHEMA, Manifest, Store, TakenOverError, sealed, taken_over

Keep = Callable[[dict[str, int], dict[str, float]], set[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Save:
    """One save.

    Attributes:
        name: of the checkpoint.
        manifest: run id, step, place and metrics; the writer adds files and digests.
        sizes: bytes of trail and history when the state was copied.
        missing: ranges of steps that the trail lacks.
        before: the last checkpoint that was saved, or resumed from.
        scores: of all checkpoints that have one, by name.
    """

    name: str
    manifest: Manifest
    sizes: dict[str, int]
    missing: list[list[int]]
    before: Link | None
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The outcome of a save: its manifest, None if it failed; the names of those that were removed after it."""

    manifest: Manifest | None
    removed: set[str] = field(default_factory=set)
    error: LabtrainError | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What was in the place: the writer's token, the manifests by name, oldest first, and all names that are used."""

    token: str
    manifests: dict[str, Manifest]
    taken: set[str]


class Writer:
    """Writes one run's checkpoints; only what `open` has returned for is rank 0's.

    Args:
        run_dir: the run's folder.
        place: where its checkpoints are: a folder or a URL.
        run_id: of the run.
        keep: from the steps and scores of all checkpoints by name, returns the names to keep.
        spool_bytes: how much may wait for a remote store.
    """

    def __init__(self, run_dir: Path, place: str, *, run_id: str, keep: Keep, spool_bytes: int) -> None:
        self.run_dir, self.place, self.keep, self.spool_bytes = run_dir, place, keep, spool_bytes
        self.run_id = run_id
        self.home = Store(place if is_local(place) else spool_of(run_dir))
        self.manifests: dict[str, Manifest] = {}  # manifests of the existing checkpoints, oldest first
        self.records = {"trail": Record(run_dir / TRAIL), "history": Record(run_dir / HISTORY)}
        self.taken: set[str] = set()
        self.undelivered: list[str] = []  # saved by an earlier process; stay in place until all ranks have loaded
        self.token = ""  # the writer's token; rank 0 only
        self.delivery: Delivery | None = None

    def open(self, *, known: set[str] | None, follows: str | None = None) -> Opened:
        """Become the only writer, and remove leftovers of a crash.

        Args:
            known: the checkpoints that the start found; None: those that are there now.
            follows: the token of this training's own writer, which was killed; None if there was none.

        Raises:
            LabtrainError: something there is a link, or belongs to another run; nothing has changed.
            StoreError: labtrain cannot write there.
            TakenOverError: another process has written there since this process chose its checkpoint.
        """
        remote = None if is_local(self.place) else Store(self.place)
        stores, seen = [self.home] + ([remote] if remote else []), []
        for store in stores:
            store.refuse_link()
            seen.append(store.seen())
            if follows is not None and seen[-1] != follows:
                raise taken_over(str(store))
            self._look(store)
        check_chain(self.manifests)
        known = set(self.manifests) if known is None else set(known)
        # `sweep` restores these.
        known |= {name.partition(".removing-")[0] for name in self.taken if ".removing-" in name}
        self.token = secrets.token_hex(8)
        self.home.renew(self.token, seen=seen[0])
        self.home.sweep(self.token)
        waiting = self._look(self.home)
        if remote is not None:
            remote.renew(self.token, seen=seen[1])
            remote.sweep(self.token, keep=waiting)
            self._look(remote)
        if late := self.manifests.keys() - known:
            for store in stores:
                store.leave(self.token)
            self.token = ""
            raise taken_over(f"{self.place}/{min(late)}")
        if remote is not None:
            # From here on only the delivery uses it: a connection has one thread.
            self.delivery = Delivery(self.home, remote, token=self.token, spool_bytes=self.spool_bytes)
            self.undelivered = waiting
        self.manifests = dict(sorted(self.manifests.items()))
        return Opened(token=self.token, manifests=dict(self.manifests), taken=self.taken)

    def _look(self, store: Store) -> list[str]:
        """Read which checkpoints exist; return the names of those that seem complete."""
        there = []
        for checkpoint in without_links(store.find()):
            if checkpoint.complete and checkpoint.name not in self.manifests:
                with suppress(DamagedError):
                    manifest = store.manifest(checkpoint)
                    check_run(checkpoint, manifest, self.run_id)
                    self.manifests[checkpoint.name] = manifest
            self.taken.add(checkpoint.name)
            if checkpoint.complete and checkpoint.name in self.manifests:
                there.append(checkpoint.name)
        return there

    def write(self, save: Save, state: State, group: "dist.ProcessGroup | None" = None) -> Written:
        """Write a state, publish it, and remove what it replaces.

        Args:
            save: of the checkpoint; rank 0's counts.
            state: Lightning's checkpoint dictionary, its weights under `state_dict`; nothing changes it meanwhile.
            group: the ranks that hold the state, if it is spread; all of them call this.
        """
        self._deliver_what_was_left()
        name, folder = save.name, ""
        try:
            folder = together(group, partial(self._begin, name))[0]
            written = write_files(Path(self.home.root, folder), state, group)
            manifest: Manifest = {**save.manifest, "schema": SCHEMA, "scores": save.scores, **written}
            manifest = together(group, partial(self._publish, save, manifest))[0]
        except BaseException as error:  # safetensors and torch have their own errors for a full disk
            if self.token and folder:
                with suppress(Exception):
                    self.home.remove(folder)  # only this writer uses it; makes room
            known = error if isinstance(error, LabtrainError) else self._explained(name, error)
            return Written(manifest=None, error=self._why(known))
        if not self.token:
            return Written(manifest=manifest)
        self.manifests[name] = manifest
        try:
            if self.delivery is not None:
                self.delivery.add(name, manifest)
            return Written(manifest=manifest, removed=self._retain(save.scores))
        except Exception as error:
            known = error if isinstance(error, LabtrainError) else self._explained(name, error)
            return Written(manifest=manifest, error=known)

    def _begin(self, name: str) -> str:
        """Return the folder to write to; on rank 0."""
        if not self.token:
            return ""
        self.home.check_writer(self.token)
        return self.home.writing(name, self.token)

    def _publish(self, save: Save, manifest: Manifest) -> Manifest:
        if not self.token:
            return {}
        if "history" in save.sizes:
            size_bytes = save.sizes["history"]
            manifest["history"] = self.records["history"].up_to(size_bytes) if size_bytes else None
        if "trail" in save.sizes:
            manifest["trail"] = self._trail_mark(save) if save.sizes["trail"] else None
        manifest = sealed({**manifest, "before": save.before})
        self.home.publish(save.name, manifest, self.token)
        return manifest

    def _trail_mark(self, save: Save) -> TrailMark:
        record = self.records["trail"]
        return {
            **record.up_to(save.sizes["trail"]),
            "first": first_step_of(record.path),
            "missing": save.missing,
        }

    def _why(self, error: LabtrainError) -> LabtrainError:
        """Return why a save has failed: if another process has taken over, that is the reason."""
        try:
            if self.token:
                self.home.check_writer(self.token)
        except LabtrainError as cause:
            return cause if isinstance(cause, TakenOverError) else error
        return error

    def _explained(self, name: str, error: BaseException) -> StoreError:
        found = os_error_in(error)
        return StoreError(
            f"{self.home}/{name} could not be written: {(found and found.strerror) or error}",
            hint=f"df -h {self.home}; ls -ld {self.home}; then the same command resumes from the newest",
        )

    def _deliver_what_was_left(self) -> None:
        for name in self.undelivered:
            if self.delivery is not None:
                self.delivery.add(name, self.manifests[name])
        self.undelivered = []

    def _retain(self, scores: dict[str, float]) -> set[str]:
        """Remove the checkpoints that are not kept; return their names."""
        steps = {name: manifest["step"] for name, manifest in self.manifests.items() if not manifest.get("finished")}
        doomed = steps.keys() - self.keep(steps, dict(scores))
        for name in doomed:
            del self.manifests[name]
        try:
            if self.delivery is not None:
                self.delivery.drop(doomed)
            else:
                for name in doomed:
                    self.home.discard(name, self.token)
        except OSError as error:
            sys.stderr.write(f"warning: {self.home}: superseded checkpoints could not be removed: {error}\n")
        return doomed

    def status(self) -> str:
        """Return a line about pending deliveries to a remote store; empty if there are none."""
        return self.delivery.status() if self.delivery is not None else ""

    def check(self) -> None:
        """Raise an error of the delivery."""
        if self.delivery is not None:
            self.delivery.check()

    def close(self, scores: dict[str, float], *, seconds: float, wanted: bool,
              gone: Callable[[], bool] = lambda: False) -> set[str]:  # fmt: skip
        """Wait for pending deliveries, and stop being the writer; return the names of the checkpoints removed now.

        Args:
            scores: of all checkpoints that have one, by name.
            seconds: how long to wait for a store that does not answer.
            wanted: whether an undelivered checkpoint is an error; otherwise a warning.
            gone: whether nobody waits for this any more.

        Raises:
            StoreError: names what was not delivered, and where it is.
        """
        self._deliver_what_was_left()
        removed = self._retain(scores)
        if self.delivery is not None:
            delivered = self.delivery.wait(seconds, gone=gone)
            self.delivery.stop()
            if not delivered:
                error = StoreError(
                    f"not delivered to {self.delivery.url}: {', '.join(sorted(self.delivery.waiting))}, kept in"
                    f" {self.home}: {self.delivery.trouble or 'checkpoint.deliver_seconds is over'}",
                    hint="the same command delivers it once the store answers",
                )
                if wanted:
                    raise error
                sys.stderr.write(f"warning: {error}\n")
                return removed
            with suppress(StoreError):
                Store(self.place).leave(self.token)
        self.home.leave(self.token)
        return removed

    def abandon(self) -> None:
        """Stop without the rest: the training has failed."""
        if self.delivery is not None:
            self.delivery.stop()
        elif self.token:
            with suppress(Exception):
                self.home.leave(self.token)
