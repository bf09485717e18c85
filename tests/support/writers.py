"""Two writers of one place, of which one is stopped before a change of its own until the other has taken over."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from labtrain.base.errors import LabtrainError
from labtrain.checkpoints.saver import Saver
from labtrain.stores.prune import check
from labtrain.stores.store import WRITER, Checkpoint, Store
from tests.support.saver import saver_of, state, writer_of


class Gate:
    """Stops who comes to it for the so many-th time, as `halt` does."""

    def __init__(self, halt: Callable[[], object]) -> None:
        self.left, self.halt = 0, halt

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.halt()


class Halting(Store):
    """A store that comes to a gate before each change, and after each look at who the writer is."""

    def __init__(self, place: str | Path, gate: Gate) -> None:
        super().__init__(place)
        self.gate = gate

    def writer(self, path: str = WRITER) -> dict[str, Any] | None:
        found = super().writer(path)
        self.gate.step()
        return found

    def seen(self, path: str = WRITER) -> str | None:
        found = super().seen(path)
        self.gate.step()
        return found

    def create(self, path: str, data: bytes) -> None:
        self.gate.step()
        super().create(path, data)

    def replace(self, path: str, data: bytes) -> None:
        self.gate.step()
        super().replace(path, data)

    def put(self, local: Path, path: str, callback: Any = None) -> None:
        self.gate.step()
        super().put(local, path, callback)

    def move(self, path: str, to: str) -> None:
        self.gate.step()
        super().move(path, to)

    def remove(self, path: str) -> None:
        self.gate.step()
        super().remove(path)

    def _write_into(self, folder: str, name: str, data: bytes) -> None:
        self.gate.step()
        super()._write_into(folder, name, data)


def begun(run_dir: Path, place: str, gate: Gate) -> Saver:
    """Return the saver of a run that has saved steps 1 and 2; from now on it comes to the gate."""
    saver = saver_of(run_dir, place)
    if writer_of(saver).home.url == place:
        writer_of(saver).home = Halting(place, gate)
    saver.open()
    if writer_of(saver).delivery is not None:
        writer_of(saver).delivery.remote = Halting(place, gate)
    write(saver, 1, 2)
    return saver


class Paused:
    """A run that is stopped while it saves 3 and 4, removes 1 and 2, or ends: a thread of this process.

    Args:
        run_dir: its folder.
        place: where its checkpoints lie.
        number: of the change before which it stops.
    """

    def __init__(self, run_dir: Path, place: str, number: int) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.error = ""
        gate = Gate(self._halt)
        self.saver = self._begin(run_dir, place, gate)
        gate.left = number
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        while not self.reached.wait(0.001) and self.thread.is_alive():
            pass

    def _begin(self, run_dir: Path, place: str, gate: Gate) -> Saver:
        return begun(run_dir, place, gate)

    @property
    def stopped(self) -> bool:
        """Whether it was stopped; it has come to its end else."""
        return self.reached.is_set()

    def go_on(self) -> str:
        """Let it go on; return what ends it."""
        self.opened.set()
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.error

    def _halt(self) -> None:
        self.reached.set()
        assert self.opened.wait(60)

    def _work(self) -> None:
        try:
            write(self.saver, 3, 4)
            self.saver.close(seconds=60, wanted=True)
        except LabtrainError as error:
            self.error = str(error)
            self.saver.abandon()


class Starting(Paused):
    """A run that is stopped while it opens, or saves 3 and 4 after that; one before has saved 1 and 2, and was killed.

    It looked for where to go on from before that.
    """

    def __init__(self, run_dir: Path, place: str, number: int) -> None:
        before = saver_of(run_dir, place)
        before.open()
        write(before, 1, 2)
        if writer_of(before).delivery is not None:
            writer_of(before).delivery.stop()
        super().__init__(run_dir, place, number)

    def _begin(self, run_dir: Path, place: str, gate: Gate) -> Saver:
        self.place, self.gate = place, gate
        saver = saver_of(run_dir, place)
        saver.known = {f"step-{step:010d}" for step in (1, 2)}
        if writer_of(saver).home.url == place:
            writer_of(saver).home = Halting(place, gate)
        return saver

    def _work(self) -> None:
        try:
            with patch("labtrain.checkpoints.writer.Store", partial(Halting, gate=self.gate)):
                self.saver.open()
        except LabtrainError as error:
            self.error = str(error)
            self.saver.abandon()
            return
        super()._work()


class Stopped:
    """The same in a process of its own, which SIGSTOP stops."""

    def __init__(self, run_dir: Path, place: str, number: int) -> None:
        self.read, said = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            code = 1
            try:
                gate = Gate(lambda: os.kill(os.getpid(), signal.SIGSTOP))
                saver = begun(run_dir, place, gate)
                gate.left = number
                write(saver, 3, 4)
                saver.close(seconds=60, wanted=True)
                code = 0
            except LabtrainError as error:
                os.write(said, str(error).encode())
                code = error.exit_code
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(code)
        os.close(said)
        _, status = os.waitpid(self.process, os.WUNTRACED)
        self.stopped = os.WIFSTOPPED(status)
        self.status = status

    def go_on(self) -> str:
        """Let it go on; return what ends it."""
        if self.stopped:
            os.kill(self.process, signal.SIGCONT)
            _, self.status = os.waitpid(self.process, 0)
        error = os.read(self.read, 10_000).decode()
        os.close(self.read)
        assert os.waitstatus_to_exitcode(self.status) == (2 if error else 0), error
        return error


def write(saver: Saver, *steps: int, size: int = 1000) -> None:
    """Save steps, and wait until each is where it belongs."""
    for step in steps:
        saver.save(state(step, size), {"run_id": "abc", "step": step, "epoch": 0, "metrics": {}, "logs": {}})
        saver.wait()
        if writer_of(saver).delivery is not None:
            assert writer_of(saver).delivery.wait(60)


def keep_all(steps: dict[str, int], scores: dict[str, float]) -> set[str]:
    """Keep every checkpoint."""
    return set(steps)


def whole(store: Store) -> dict[str, str]:
    """Return the digest of each checkpoint's manifest, by name, once each was read and found whole."""
    found = {}
    for checkpoint in store.checkpoints():
        assert check(checkpoint) is None, check(checkpoint)
        found[checkpoint.name] = str(store.manifest(checkpoint)["digest"])
    return found


def leftovers(store: Store) -> list[Checkpoint]:
    """Return what is no checkpoint, but for the empty manifests that keep names from writers that were taken over."""
    return [left for left in store.find() if not left.complete and left.sizes.keys() != {"manifest.json"}]


def walk(
    folder: Path,
    place_of: Callable[[int], str],
    *,
    ends: bool,
    others: int = 1,
    kind: type[Paused | Stopped] = Paused,
    numbers: Iterable[int] = range(1, 1000),
) -> int:
    """Stop a run before each of its changes in turn, while others take over one after the other.

    Args:
        folder: for the runs' folders.
        place_of: returns where the checkpoints of the so many-th try lie.
        ends: the last who takes over ends before the first run wakes up; else it saves on after that.
        others: how many take over.
        kind: how it is stopped.
        numbers: of the changes; to the last one at most.

    Returns:
        how many tries there were.
    """
    tries = 0
    for number in numbers:
        place = place_of(number)
        paused = kind(folder / f"{number}-a", place, number)
        if not paused.stopped:
            assert paused.go_on() == ""
            break
        tries += 1
        for other in range(others):
            saver = saver_of(folder / f"{number}-{other}", place, keep=keep_all)
            saver.open()
            write(saver, 3 + other, 4 + other, size=500)
            if other + 1 < others or ends:
                saver.close(seconds=60, wanted=True)
        store = Store(place)
        there, writer = whole(store), store.writer()
        error = paused.go_on()
        assert not error or "another process" in error, f"{number}: {error}"
        assert whole(store) == there, number
        assert store.writer() == writer, number
        if not ends:
            write(saver, 8, size=500)
            saver.close(seconds=60, wanted=True)
            there |= {"step-0000000008": whole(store)["step-0000000008"]}
        after = saver_of(folder / f"{number}-after", place, keep=keep_all)
        after.open()
        assert leftovers(store) == [], number
        after.close(seconds=60, wanted=True)
        assert whole(store) == there, number
        assert store.writer() is None
    return tries
