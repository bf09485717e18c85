"""Deliver checkpoints from the spool to a remote store, newest first, in a background thread.

The training continues while the store is unavailable. Waiting checkpoints stay in the spool, a folder of the run, and
delivery is retried with increasing pauses. Checkpoints that retention would remove are not delivered.
"""

import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fsspec.callbacks import Callback

from labtrain.base.credentials import without_secrets
from labtrain.base.errors import LabtrainError, StoreError
from labtrain.stores.backends import explained
from labtrain.stores.store import Manifest, Store, TakenOverError

LONGEST_PAUSE_S = 60.0


class Delivery:
    """One run's deliveries.

    Args:
        spool: the local store where checkpoints wait.
        remote: the destination.
        token: identifies this process as the writer.
        spool_bytes: maximum size of waiting checkpoints.
    """

    def __init__(self, spool: Store, remote: Store, *, token: str, spool_bytes: int) -> None:
        self.spool, self.url, self.token, self.spool_bytes = spool, remote.url, token, spool_bytes
        self.remote: Store | None = remote
        self.changed = threading.Condition()
        self.waiting: dict[str, Manifest] = {}
        self.doomed: set[str] = set()
        self.error: LabtrainError | None = None
        self.trouble = ""
        self.progress = ""
        self.stopping = False
        self.thread = threading.Thread(target=self._work, name="labtrain-delivery", daemon=True)
        self.thread.start()

    def add(self, name: str, manifest: Manifest) -> None:
        """Queue a checkpoint in the spool for delivery."""
        with self.changed:
            self.waiting[name] = manifest
            self.changed.notify_all()

    def drop(self, names: set[str]) -> None:
        """Remove checkpoints from the spool now, and from the store once nothing newer waits.

        Raises:
            TakenOverError: another process writes to the spool.
        """
        with self.changed:
            for name in names:
                self.waiting.pop(name, None)
            self.doomed |= names
            self.changed.notify_all()
        for name in names:
            self.spool.discard(name, self.token)

    def check(self) -> None:
        """Raise if the training must end: another process has taken over, or the spool is full."""
        if self.error is not None:
            raise self.error
        with self.changed:
            waiting = dict(self.waiting)
        size = sum(_size(manifest) for manifest in waiting.values())
        if size > self.spool_bytes:
            raise StoreError(
                f"{len(waiting)} checkpoints of {size:,} bytes wait in {self.spool} for {self.url}, more than "
                f"checkpoint.spool_bytes={self.spool_bytes}: {self.trouble or 'the store is slower than the training'}",
                hint="start the same command again once the store answers: it resumes and delivers them;"
                " or set a larger checkpoint.spool_bytes",
            )

    def wait(self, seconds: float, *, gone: Callable[[], bool] = lambda: False) -> bool:
        """Wait until everything is delivered, and return whether it is; print the progress every 5 s.

        `gone` ends the wait once it returns True.
        """
        deadline, said = time.monotonic() + seconds, time.monotonic()
        with self.changed:
            while self.waiting or self.doomed:
                if self.error is not None:
                    raise self.error
                left = deadline - time.monotonic()
                if left <= 0 or gone():
                    return not self.waiting
                self.changed.wait(min(left, 1.0))
                if self.waiting and time.monotonic() - said > 5:
                    said = time.monotonic()
                    sys.stderr.write(f"{self.status()}\n")
        return True

    def status(self) -> str:
        """Return a line about pending deliveries; empty if there are none."""
        waiting = len(self.waiting)
        if not waiting:
            return ""
        return f"{waiting} to deliver to {self.url}: {self.progress or self.trouble or 'starting'}"

    def stop(self) -> None:
        """End the thread once it is idle; waiting checkpoints stay in the spool."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()

    def _work(self) -> None:
        failures = 0
        while True:
            with self.changed:
                while not (self.waiting or self.doomed or self.stopping):
                    self.changed.wait()
                if self.stopping:
                    return
                name = max(self.waiting, default=None)
            try:
                if name is not None:
                    self._deliver(name)
                self._remove()
                failures, self.trouble = 0, ""
            except TakenOverError as error:
                with self.changed:
                    self.error = error
                    self.changed.notify_all()
                return
            except Exception as error:  # a backend can raise anything; the delivery is retried
                if name is not None and name not in self.waiting:
                    continue  # superseded during delivery: its files are gone
                self.remote = None  # an SFTP connection that broke stays broken
                text = without_secrets(str(error.args[0] if error.args else type(error).__name__))
                if not failures:
                    sys.stderr.write(f"warning: {text}: the training continues, and checkpoints wait in {self.spool}\n")
                failures += 1
                with self.changed:
                    self.trouble, self.progress = text, ""
                    self.changed.notify_all()
                pause = min(LONGEST_PAUSE_S, 0.5 * 2**failures) * random.SystemRandom().uniform(0.5, 1.0)
                deadline = time.monotonic() + pause
                with self.changed:
                    while not self.stopping and (left := deadline - time.monotonic()) > 0:
                        self.changed.wait(left)

    def _deliver(self, name: str) -> None:
        manifest, remote = self.waiting[name], self._connected()
        with explained(self.url):
            if not remote.holds(name, manifest):
                remote.check_writer(self.token)
                progress = _Progress(self, name, _size(manifest))
                remote.upload(Path(self.spool.root, name), manifest, remote.writing(name, self.token), progress)
                remote.publish(name, manifest, self.token)
        self.spool.discard(name, self.token)
        with self.changed:
            self.waiting.pop(name, None)
            self.progress = ""
            self.changed.notify_all()

    def _remove(self) -> None:
        """Remove superseded checkpoints, only after their successor is delivered."""
        if self.waiting:
            return
        for name in sorted(self.doomed):
            remote = self._connected()
            with explained(self.url):
                remote.discard(name, self.token)
                remote.remove(remote.writing(name, self.token))  # it was superseded while it was uploaded
            with self.changed:
                self.doomed.discard(name)
                self.changed.notify_all()

    def _connected(self) -> Store:
        if self.remote is None:
            self.remote = Store(self.url)
        return self.remote


class _Progress(Callback):  # type: ignore[misc]
    """Tracks how much of a checkpoint is uploaded; fsspec's interface."""

    def __init__(self, delivery: Delivery, name: str, total: int) -> None:
        super().__init__()
        self.delivery, self.label, self.total = delivery, name, total
        self.before = self.value = 0

    def set_size(self, size: int) -> None:
        self.before += self.value
        self.value = 0

    def relative_update(self, inc: int = 1) -> None:
        self.value += inc
        done = (self.before + self.value) / 1e6
        self.delivery.progress = f"{self.label}, {done:,.0f} of {self.total / 1e6:,.0f} MB"


def _size(manifest: Manifest) -> int:
    return sum(file["size_bytes"] for file in manifest["files"].values())
