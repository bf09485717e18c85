"""A copy of the training's newest state in memory: it outlives the death of another rank, and a broken step.

The copy is what a checkpoint of that step would hold, made at the same place in the loop (epoch_loop.py). All ranks
make the state, and two of them copy it: rank 0, which writes checkpoints, and the last rank, which does so after the
death of rank 0. Rank 0 chooses the steps, so that the copies cost at most `SHARE` of the time: each step, where a step
takes a hundred times as long as a copy.

A copy skips what a save reports but does not hold: whether ranks differ, and what no checkpoint holds. Before the last
rank saves its copy, it compares the weights with the trail, which rank 0 has written.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from labtrain.base.contracts import State
from labtrain.base.errors import LabtrainError
from labtrain.checkpoints.saver import Saver
from labtrain.checkpoints.staging import Staging
from labtrain.exact.checksums import shown_sums, two_sums
from labtrain.record.trail import TRAIL, cut_trail, read_trail
from labtrain.stores.layout import link_to
from labtrain.stores.store import Manifest
from labtrain.training.start import wait_for_writer

SHARE = 0.01  # of rank 0's time, by the clock or by the processor: on a busy machine the clock measures others
CLOCKS = (time.monotonic, time.process_time)
TAKE_OVER_S = 15  # how long the last rank waits for the end of rank 0
OUTLIVES_S = 60  # how long it may take, after the death of rank 0, to save its copy
POLL_S = 0.05


class Kept:
    """The newest copy of one rank.

    Args:
        saver: which writes it.
        run_dir: the run's folder.
    """

    def __init__(self, saver: Saver, run_dir: Path) -> None:
        self.saver, self.run_dir = saver, run_dir
        self.copies = False  # whether this rank makes copies
        self.staging = Staging()
        self.held: tuple[State, Manifest] | None = None
        self.next_s = [0.0, 0.0]  # by each clock

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure a copy, and choose when the next one may be made."""
        begun_s = [clock() for clock in CLOCKS]
        yield
        now_s = [clock() for clock in CLOCKS]
        self.next_s = [now + (now - begun) / SHARE for begun, now in zip(begun_s, now_s, strict=True)]

    def due(self) -> bool:
        """Return whether another copy may be made."""
        return any(clock() >= next_s for clock, next_s in zip(CLOCKS, self.next_s, strict=True))

    def put(self, state: State, manifest: Manifest) -> None:
        """Copy a state; rank 0's manifest, with the scores of earlier checkpoints."""
        if self.copies:
            self.held = None  # the copy is not whole while it is made
            self.held = self.staging.copy(state), manifest

    def write(self, *, leads: bool, take_over: Callable[[], bool]) -> int | None:
        """Save the copy as a checkpoint, if there is none of its step or a later one; return its step.

        Args:
            leads: this is rank 0.
            take_over: tries to become the only process that trains this run, as rank 0 was.

        Raises:
            LabtrainError: it cannot be saved.
        """
        if self.held is None:
            return None
        if not leads:
            deadline_s = time.monotonic() + TAKE_OVER_S
            while not take_over():
                if time.monotonic() > deadline_s:
                    return None
                time.sleep(POLL_S)
        return self._write(*self.held, leads=leads)

    def _write(self, state: State, manifest: Manifest, *, leads: bool) -> int | None:
        saver = self.saver
        if leads:
            with suppress(LabtrainError):
                saver.wait()
        else:
            wait_for_writer(self.run_dir, saver.place)  # what rank 0 had begun to save may be newer
            saver.known = None
            saver.open()
            self._adopt_newest()
        try:
            return self._save(state, manifest, leads=leads)
        finally:
            if not leads:
                saver.abandon()

    def _save(self, state: State, manifest: Manifest, *, leads: bool) -> int | None:
        saver = self.saver
        if not leads and self._differs(state, manifest):
            return None
        if any(each["step"] >= manifest["step"] for each in saver.manifests.values()):
            return None
        saver.scores |= manifest.get("scores", {})
        cut_trail(self.run_dir / TRAIL, last_step=manifest["step"])  # as the next start would
        saver.save(state, manifest)
        saver.wait()
        return manifest["step"]

    def _differs(self, state: State, manifest: Manifest) -> bool:
        """Return whether the weights are not those that rank 0 had after the same step."""
        lines = [line for line in read_trail(self.run_dir) if line["step"] == manifest["step"]]
        return bool(lines) and lines[-1]["weights"] != shown_sums(
            two_sums(enumerate(state["state_dict"].values())).tolist()
        )

    def _adopt_newest(self) -> None:
        """Go on after the newest checkpoint, as rank 0 would have done."""
        saver = self.saver
        for name, manifest in saver.manifests.items():
            saver.before = link_to(name, manifest)
            trail = manifest.get("trail")
            saver.missing = trail["missing"] if trail else []
