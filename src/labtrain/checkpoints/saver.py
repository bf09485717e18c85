"""Saves a run's checkpoints: copies while the loop waits, writes and delivers while it trains, and removes old ones.

::

    loop      copy the state into the staging buffers          the only wait
    writer    files and their sha256, fsync, manifest, rename  one save in flight; then retention
    delivery  to checkpoint.url, if that is remote             delivery.py

A failure of the writer reaches the loop at its next step. Rank 0 saves what all ranks have. If the state is spread over
the ranks, each saves its part, and rank 0 publishes the checkpoint when all parts are on the disk.
"""

import secrets
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch.distributed as dist

from labtrain.base.contracts import Link, SavedCheckpoint, State, TrailMark
from labtrain.base.errors import DamagedError, LabtrainError, StoreError, os_error_in
from labtrain.checkpoints.format import together, write_files
from labtrain.checkpoints.staging import Staging
from labtrain.record.trail import HISTORY, TRAIL, Record, first_step_of
from labtrain.stores.backends import is_local
from labtrain.stores.delivery import Delivery
from labtrain.stores.layout import check_chain, check_run, free_name, link_to, spool_of, without_links
from labtrain.stores.store import SCHEMA, Manifest, Store, TakenOverError, sealed, taken_over

Keep = Callable[[dict[str, int], dict[str, float]], set[str]]


class Saver:
    """Writes one run's checkpoints on rank 0; if the state is spread, every rank writes its part.

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
        self.staging = Staging()
        self.manifests: dict[str, Manifest] = {}  # manifests of the existing checkpoints, oldest first
        self.scores: dict[str, float] = {}
        self.before: Link | None = None  # the last checkpoint that was saved, or resumed from
        self.records = {"trail": Record(run_dir / TRAIL), "history": Record(run_dir / HISTORY)}
        self.missing: list[list[int]] = []  # ranges of steps that the trail lacks
        self.taken: set[str] = set()
        self.undelivered: list[str] = []  # saved by an earlier process; stay in place until all ranks have loaded
        self.staged: dict[str, object] | None = None  # the state that was saved last
        self.known: set[str] | None = None  # the checkpoints that the start found; None: those at `open`
        self.token = ""  # the writer's token; rank 0 only
        self.group: dist.ProcessGroup | None = None  # the writers' group of ranks, if the state is spread
        self.delivery: Delivery | None = None
        self.thread: threading.Thread | None = None
        self.error: LabtrainError | None = None

    def open(self) -> None:
        """Become the only writer, and remove leftovers of a crash.

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
            self._look(store)
        check_chain(self.manifests)
        known = set(self.manifests) if self.known is None else set(self.known)
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
        for manifest in self.manifests.values():
            self.scores |= manifest.get("scores", {})

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

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self.thread is not None and self.thread.is_alive()

    def save(self, state: State, manifest: Manifest, *, finished: bool = False) -> str:
        """Copy a state and start to write it, after the previous save is written. Return the checkpoint's name.

        Args:
            state: Lightning's checkpoint dictionary, its weights under `state_dict`.
            manifest: run id, step, place and metrics; the saver adds files, digests and scores. Rank 0's manifest
                and name count.
            finished: final weights only; cannot be resumed.
        """
        self.wait()
        self._deliver_what_was_left()
        self.staged = copied = self.staging.copy(state)
        name = free_name(manifest["step"], self.taken, finished=finished)
        manifest = {**manifest, "finished": finished, "scores": dict(self.scores)}
        sizes = {key: record.path.stat().st_size for key, record in self.records.items() if record.path.exists()}
        self.thread = threading.Thread(target=self._write, args=(name, copied, manifest, sizes), daemon=True)
        self.thread.start()
        return name

    def score(self, name: str, value: float) -> None:
        """Record the monitored metric of a checkpoint; the next save uses it to choose the best ones."""
        self.scores[name] = value

    def listed(self) -> list[SavedCheckpoint]:
        """Return the receipt's entry for each checkpoint; paths in the run's folder are relative to it."""
        place = self.place.removeprefix(f"{self.run_dir}/")
        return [
            {
                "path": f"{place}/{name}",
                "step": manifest["step"],
                "weights_digest": manifest.get("weights_digest", ""),
                "score": self.scores.get(name),
            }
            for name, manifest in self.manifests.items()
        ]

    def status(self) -> str:
        """Return a line about pending deliveries to a remote store; empty if there are none."""
        return self.delivery.status() if self.delivery is not None else ""

    def check(self) -> None:
        """Raise an error of the writer or the delivery; on rank 0, which gets the errors of all ranks and ends them."""
        if self.error is not None and self.token:
            error, self.error = self.error, None
            raise error
        if self.delivery is not None:
            self.delivery.check()

    def wait(self) -> None:
        """Wait until the current save is on this machine's disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def close(self, *, seconds: float, wanted: bool) -> None:
        """Wait for pending saves and deliveries, and stop being the writer.

        Args:
            seconds: how long to wait for a store that does not answer.
            wanted: whether an undelivered checkpoint is an error; otherwise a warning.

        Raises:
            StoreError: names what was not delivered, and where it is.
        """
        self.wait()
        self._deliver_what_was_left()
        self._retain()
        if self.delivery is not None:
            delivered = self.delivery.wait(seconds)
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
                return
            with suppress(StoreError):
                Store(self.place).leave(self.token)
        self.home.leave(self.token)

    def abandon(self) -> None:
        """Stop without the rest: the training has failed."""
        with suppress(LabtrainError):
            self.wait()
        if self.delivery is not None:
            self.delivery.stop()
        elif self.token:
            with suppress(Exception):
                self.home.leave(self.token)

    def _write(self, name: str, state: State, manifest: Manifest, sizes: dict[str, int]) -> None:
        folder = ""
        try:
            folder = together(self.group, partial(self._begin, name))[0]
            written = write_files(Path(self.home.root, folder), state, self.group)
            manifest = {**manifest, "schema": SCHEMA, **written}
            manifest = together(self.group, partial(self._publish, name, manifest, sizes))[0]
            if self.token:
                self.manifests[name], self.before = manifest, link_to(name, manifest)
        except BaseException as error:  # safetensors and torch have their own errors for a full disk
            self.error = (
                self._why(error) if isinstance(error, LabtrainError) else self._why(self._explained(name, error))
            )
            if self.token and folder:
                with suppress(Exception):
                    self.home.remove(folder)  # only this writer uses it; makes room
            return
        if self.token:
            try:
                if self.delivery is not None:
                    self.delivery.add(name, manifest)
                self._retain()
            except Exception as error:
                self.error = error if isinstance(error, LabtrainError) else self._explained(name, error)

    def _begin(self, name: str) -> str:
        """Return the folder to write to; on rank 0."""
        if not self.token:
            return ""
        self.home.check_writer(self.token)
        return self.home.writing(name, self.token)

    def _publish(self, name: str, manifest: Manifest, sizes: dict[str, int]) -> Manifest:
        if not self.token:
            return {}
        if "history" in sizes:
            manifest["history"] = self.records["history"].up_to(sizes["history"]) if sizes["history"] else None
        if "trail" in sizes:
            manifest["trail"] = self._trail_mark(sizes["trail"]) if sizes["trail"] else None
        manifest = sealed({**manifest, "before": self.before})
        self.home.publish(name, manifest, self.token)
        return manifest

    def _trail_mark(self, size_bytes: int) -> TrailMark:
        record = self.records["trail"]
        return {**record.up_to(size_bytes), "first": first_step_of(record.path), "missing": self.missing}

    def _why(self, error: LabtrainError) -> LabtrainError:
        """Return why a save has failed: if another process has taken over, that is the reason."""
        try:
            if self.token:
                self.home.check_writer(self.token)
        except LabtrainError as cause:
            return cause if isinstance(cause, TakenOverError) else error
        return error

    def _explained(self, name: str, error: BaseException) -> StoreError:
        return StoreError(
            f"{self.home}/{name} could not be written: {getattr(os_error_in(error), 'strerror', None) or error}",
            hint=f"df -h {self.home}; ls -ld {self.home}; then the same command resumes from the newest",
        )

    def _deliver_what_was_left(self) -> None:
        for name in self.undelivered:
            if self.delivery is not None:
                self.delivery.add(name, self.manifests[name])
        self.undelivered = []

    def _retain(self) -> None:
        steps = {name: manifest["step"] for name, manifest in self.manifests.items() if not manifest.get("finished")}
        doomed = steps.keys() - self.keep(steps, dict(self.scores))
        for name in doomed:
            del self.manifests[name]
            self.scores.pop(name, None)
        try:
            if self.delivery is not None:
                self.delivery.drop(doomed)
            else:
                for name in doomed:
                    self.home.discard(name, self.token)
        except OSError as error:
            sys.stderr.write(f"warning: {self.home}: superseded checkpoints could not be removed: {error}\n")
