"""Saves a run's checkpoints: copies while the loop waits; a Writer does the rest while it trains.

::

    loop      copy the state into the staging buffers          the only wait
    writer    files, manifest, rename; delivery; retention     one save in flight (writer.py, beside.py)

A failure of the writer reaches the loop at its next step.
"""

from contextlib import suppress
from functools import partial
from pathlib import Path

import torch.distributed as dist

from labtrain.base.console import warn
from labtrain.base.contracts import Link, SavedCheckpoint, State
from labtrain.base.errors import LabtrainError
from labtrain.checkpoints.beside import DiedError, Host, InThread, take_forked
from labtrain.checkpoints.staging import Staging
from labtrain.checkpoints.writer import Keep, Opened, Save, Writer, Written
from labtrain.record.trail import HISTORY, TRAIL
from labtrain.stores.layout import free_name, link_to
from labtrain.stores.store import Manifest


class Saver:
    """Saves one run's checkpoints on rank 0; if the state is spread, every rank saves its part.

    Args:
        run_dir: the run's folder.
        place: where its checkpoints are: a folder or a URL.
        run_id: of the run.
        keep: from the steps and scores of all checkpoints by name, returns the names to keep.
        spool_bytes: how much may wait for a remote store.
    """

    def __init__(self, run_dir: Path, place: str, *, run_id: str, keep: Keep, spool_bytes: int) -> None:
        self.run_dir, self.place = run_dir, place
        self.make_writer = partial(Writer, run_dir, place, run_id=run_id, keep=keep, spool_bytes=spool_bytes)
        self.host: Host = take_forked() or InThread(self.make_writer)
        self.staging = Staging(self.host.memory)
        self.manifests: dict[str, Manifest] = {}  # manifests of the existing checkpoints, oldest first
        self.scores: dict[str, float] = {}
        self.before: Link | None = None  # the last checkpoint that was saved, or resumed from
        self.missing: list[list[int]] = []  # ranges of steps that the trail lacks
        self.taken: set[str] = set()
        self.staged: State | None = None  # the state that was saved last
        self.known: set[str] | None = None  # the checkpoints that the start found; None: those at `open`
        self.token = ""  # the writer's token; rank 0 only
        self.group: dist.ProcessGroup | None = None  # the writers' group of ranks, if the state is spread
        self.saving: Save | None = None  # in flight
        self.error: LabtrainError | None = None

    def open(self) -> None:
        """Become the only writer, and remove leftovers of a crash.

        Raises:
            LabtrainError: something there is a link, or belongs to another run; nothing has changed.
            StoreError: labtrain cannot write there.
            TakenOverError: another process has written there since this process chose its checkpoint.
        """
        try:
            self._take(self.host.open(self.make_writer, known=self.known))
        except DiedError:
            self._carry_on()
        for manifest in self.manifests.values():
            self.scores |= manifest.get("scores", {})

    def _take(self, opened: Opened) -> None:
        self.token, self.manifests = opened.token, opened.manifests
        self.taken |= opened.taken

    def spread_over(self, group: "dist.ProcessGroup") -> None:
        """From now on each rank of a group saves its part, in a thread; called on every rank."""
        self.group, opened = group, bool(self.token)
        if opened:
            self.host.abandon()
        self._move_to_thread()
        if opened:
            self._take(self.host.open(self.make_writer, known=set(self.manifests)))

    def _move_to_thread(self) -> None:
        self.host.end()
        self.host = InThread(self.make_writer)
        self.staging = Staging(self.host.memory)

    def _carry_on(self) -> None:
        """Go on in a thread: the writer's process was killed."""
        warn("the process that writes checkpoints was killed: from now on a thread of the training writes them")
        self._move_to_thread()
        follows = self.token or None
        self._take(self.host.open(self.make_writer, known=None, follows=follows))

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self.saving is not None and not self.host.is_done()

    def save(self, state: State, manifest: Manifest, *, finished: bool = False) -> str:
        """Copy a state and start to write it, after the previous save is written. Return the checkpoint's name.

        Args:
            state: Lightning's checkpoint dictionary, its weights under `state_dict`.
            manifest: run id, step, place and metrics; the writer adds files, digests and scores. Rank 0's manifest
                and name count.
            finished: final weights only; cannot be resumed.
        """
        self.wait()
        self.staged = self.staging.copy(state)
        records = {"trail": self.run_dir / TRAIL, "history": self.run_dir / HISTORY}
        self.saving = Save(
            name=free_name(manifest["step"], self.taken, finished=finished),
            manifest={**manifest, "finished": finished},
            sizes={key: path.stat().st_size for key, path in records.items() if path.exists()},
            missing=self.missing,
            before=self.before,
            scores=dict(self.scores),
        )
        try:
            self.host.start(self.saving, self.staged, self.group)
        except DiedError:
            self._carry_on()
            self.host.start(self.saving, self.staged, self.group)
        return self.saving.name

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
        return self.host.status()

    def check(self) -> None:
        """Raise an error of the writer or the delivery; on rank 0, which gets the errors of all ranks and ends them."""
        if self.saving is not None and self.host.is_done():
            self._finish()
        if self.error is not None and self.token:
            error, self.error = self.error, None
            raise error
        with suppress(DiedError):  # the next save carries on
            self.host.check()

    def wait(self) -> None:
        """Wait until the current save is on this machine's disk."""
        if self.saving is not None:
            self._finish()
        self.check()

    def _finish(self) -> None:
        assert self.saving is not None
        try:
            written = self.host.finish()
        except DiedError:
            written = self._written_again(self.saving)
        name, self.saving = self.saving.name, None
        if written.manifest is not None and self.token:
            self.manifests[name], self.before = written.manifest, link_to(name, written.manifest)
        self._forget(written.removed)
        self.error = written.error

    def _written_again(self, save: Save) -> Written:
        """Write a save whose writer was killed, if that has not published it."""
        self._carry_on()
        if save.name in self.manifests:
            return Written(manifest=self.manifests[save.name])
        assert self.staged is not None
        self.host.start(save, self.staged, self.group)
        return self.host.finish()

    def _forget(self, removed: set[str]) -> None:
        for name in removed:
            self.manifests.pop(name, None)
            self.scores.pop(name, None)

    def close(self, *, seconds: float, wanted: bool) -> None:
        """Wait for pending saves and deliveries, and stop being the writer.

        Args:
            seconds: how long to wait for a store that does not answer.
            wanted: whether an undelivered checkpoint is an error; otherwise a warning.

        Raises:
            StoreError: names what was not delivered, and where it is.
        """
        self.wait()
        try:
            removed = self.host.close(self.scores, seconds=seconds, wanted=wanted)
        except DiedError:
            self._carry_on()
            removed = self.host.close(self.scores, seconds=seconds, wanted=wanted)
        self._forget(removed)

    def abandon(self) -> None:
        """Stop without the rest: the training has failed."""
        with suppress(LabtrainError):
            self.wait()
        with suppress(DiedError):
            self.host.abandon()

    def end(self) -> None:
        """Let the writer's process end; called last."""
        self.host.end()
