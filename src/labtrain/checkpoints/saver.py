"""Saves of one run: copied while the loop waits, written and delivered while it trains; and which of them are kept.

::

    loop      copy the state into the staging buffers          the only wait
    writer    files and their sha256, fsync, manifest          one save in flight; then retention
    delivery  to checkpoint.url, where that is remote          delivery.py

A failure of the writer reaches the loop with its next step. Rank 0 saves what all ranks have; of a state that is spread
over them each saves its part, and rank 0 makes the checkpoint exist when all parts are on the disk.
"""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from labtrain.base.errors import DamagedError, LabtrainError, StoreError
from labtrain.checkpoints.format import together, write_files
from labtrain.checkpoints.staging import Staging
from labtrain.stores.backends import is_local
from labtrain.stores.delivery import Delivery
from labtrain.stores.layout import free_name, spool_of
from labtrain.stores.store import MANIFEST, SCHEMA, Manifest, Store, TakenOverError

Keep = Callable[[dict[str, int], dict[str, float]], set[str]]


class Saver:
    """Writes one run's checkpoints: on rank 0, and its part of a state that is spread on every other.

    Args:
        run_dir: the run's folder.
        place: where its checkpoints lie: a folder or a URL.
        keep: given the steps and scores of all by name, returns the names that are kept.
        spool_bytes: how much may wait for a remote store.
    """

    def __init__(self, run_dir: Path, place: str, *, keep: Keep, spool_bytes: int) -> None:
        self.run_dir, self.place, self.keep, self.spool_bytes = run_dir, place, keep, spool_bytes
        self.home = Store(place if is_local(place) else spool_of(run_dir))
        self.staging = Staging()
        self.manifests: dict[str, Manifest] = {}  # of those that exist, oldest first
        self.scores: dict[str, float] = {}
        self.taken: set[str] = set()
        self.undelivered: list[str] = []  # of a process before; not moved before all ranks have loaded one of them
        self.staged: dict[str, Any] | None = None  # the state that was saved last
        self.token = ""  # of rank 0
        self.group: Any = None  # of the ranks, where the state is spread over them; the writers' own
        self.delivery: Delivery | None = None
        self.thread: threading.Thread | None = None
        self.error: LabtrainError | None = None

    def open(self) -> None:
        """Become the one writer there, and remove what a crash of the one before left.

        Raises:
            StoreError: it cannot be written there.
        """
        self.token = self.home.take_over()
        remote = None if is_local(self.place) else Store(self.place)
        if remote is not None:
            remote.renew(self.token)
        waiting = []
        for store in [self.home] + ([remote] if remote else []):
            for checkpoint in store.find():
                self.taken.add(checkpoint.name)
                if MANIFEST not in checkpoint.sizes:
                    store.remove(checkpoint.path)
                    continue
                with suppress(DamagedError):
                    self.manifests[checkpoint.name] = store.manifest(checkpoint)
                    if store is self.home:
                        waiting.append(checkpoint.name)
        if remote is not None:  # from here on it is the delivery's alone: a connection has one thread
            self.delivery = Delivery(self.home, remote, token=self.token, spool_bytes=self.spool_bytes)
            self.undelivered = waiting
        self.manifests = dict(sorted(self.manifests.items()))
        for manifest in self.manifests.values():
            self.scores |= manifest.get("scores", {})

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self.thread is not None and self.thread.is_alive()

    def save(self, state: dict[str, Any], manifest: Manifest, *, finished: bool = False) -> str:
        """Copy a state and begin to write it; wait for the save before where one is still written. Return its name.

        Args:
            state: Lightning's checkpoint dictionary, its weights under `state_dict`.
            manifest: run id, step, place and metrics; files, digests and scores are added. Rank 0's counts, as its
                name does.
            finished: it is no place to go on from, but what became of the weights at the end.
        """
        self.wait()
        self._deliver_what_was_left()
        self.staged = copied = self.staging.copy(state)
        name = free_name(manifest["step"], self.taken, finished=finished)
        manifest = {**manifest, "finished": finished, "scores": dict(self.scores)}
        self.thread = threading.Thread(target=self._write, args=(name, copied, manifest), daemon=True)
        self.thread.start()
        return name

    def score(self, name: str, value: float) -> None:
        """Note what the monitored metric is for a checkpoint; with the next save it decides which are the best."""
        self.scores[name] = value

    def listed(self) -> list[dict[str, Any]]:
        """Return what the receipt says of each checkpoint; one in the run's folder by its path there."""
        place = self.place.removeprefix(f"{self.run_dir}/")
        return [
            {
                "path": f"{place}/{name}",
                "step": manifest["step"],
                "weights_digest": manifest["weights_digest"],
                "score": self.scores.get(name),
            }
            for name, manifest in self.manifests.items()
        ]

    def status(self) -> str:
        """Return what is on its way to a remote store, in a line; empty where nothing is."""
        return self.delivery.status() if self.delivery is not None else ""

    def check(self) -> None:
        """Raise what went wrong in the writer or the delivery since; on rank 0, which hears of all and ends them."""
        if self.error is not None and self.token:
            error, self.error = self.error, None
            raise error
        if self.delivery is not None:
            self.delivery.check()

    def wait(self) -> None:
        """Wait until the save in flight is on this machine's disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def close(self, *, seconds: float, wanted: bool) -> None:
        """Wait for what is on its way, and be the writer no more.

        Args:
            seconds: how long, where a store does not answer.
            wanted: whether what is not delivered then is an error; else a warning.

        Raises:
            StoreError: names what was not delivered, and where it is kept.
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
                    f" {self.home}: {self.delivery.trouble or 'the time is up'}",
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
        """Leave the rest undone: the training has failed."""
        with suppress(LabtrainError):
            self.wait()
        if self.delivery is not None:
            self.delivery.stop()
        elif self.token:
            with suppress(Exception):
                self.home.leave(self.token)

    def _write(self, name: str, state: dict[str, Any], manifest: Manifest) -> None:
        begun = False
        try:
            name = together(self.group, partial(self._begin, name))[0]
            begun = True
            manifest = {**manifest, "schema": SCHEMA, **write_files(Path(self.home.root, name), state, self.group)}
            together(self.group, partial(self._commit, name, manifest))
        except BaseException as error:  # safetensors and torch have errors of their own for a full disk
            self.error = error if isinstance(error, LabtrainError) else self._explained(name, error)
            mine = self.token and begun and not isinstance(error, TakenOverError)  # else it may be another's by now
            if mine and not Path(self.home.root, name, MANIFEST).exists():
                with suppress(Exception):
                    self.home.discard(name)  # room for what comes after
            return
        if self.token:
            self.manifests[name] = manifest
            if self.delivery is not None:
                self.delivery.add(name, manifest)
            self._retain()

    def _begin(self, name: str) -> str:
        if self.token:
            self.home.check_writer(self.token)
            self.home.renew(self.token)
        return name

    def _commit(self, name: str, manifest: Manifest) -> None:
        if self.token:
            self.home.check_writer(self.token)
            self.home.commit(name, manifest)

    def _explained(self, name: str, error: BaseException) -> StoreError:
        return StoreError(
            f"{self.home}/{name} could not be written: {getattr(error, 'strerror', None) or error}",
            hint=f"df -h {self.home}; ls -ld {self.home}; then the same command goes on from the newest",
        )

    def _deliver_what_was_left(self) -> None:
        for name in self.undelivered:
            if self.delivery is not None:
                self.delivery.add(name, self.manifests[name])
        self.undelivered = []

    def _retain(self) -> None:
        steps = {name: manifest["step"] for name, manifest in self.manifests.items() if not manifest["finished"]}
        doomed = steps.keys() - self.keep(steps, dict(self.scores))
        for name in doomed:
            del self.manifests[name]
            self.scores.pop(name, None)
        try:
            if self.delivery is not None:
                self.delivery.drop(doomed)
            else:
                for name in doomed:
                    self.home.discard(name)
        except OSError as error:
            sys.stderr.write(f"warning: {self.home}: what is superseded could not be removed: {error}\n")
