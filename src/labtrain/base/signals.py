"""Stop on signals: all ranks finish the step and save first; a second Ctrl-C ends at once.

Schedulers and `kill` send SIGTERM, Ctrl-C sends SIGINT. Slurm sends SIGUSR1 before the time limit (`--signal=USR1@90`,
https://slurm.schedmd.com/sbatch.html) to every process of a job, which kills a process that does not handle it. So
labtrain blocks it from the start. It stays pending in the kernel, also over execve, until a thread waits for it. Child
processes (loader workers, wandb's service) inherit the block and survive.
"""

import _thread
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from labtrain.base.console import warn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
WRITER_NAME = "labtrain-writer"  # in the process list: at most 15 characters
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAVE, KEEP = 1.0, 0.5  # what a process asks for: a checkpoint, or a copy in memory (callbacks/kept.py)


class Child(Protocol):
    """A process that takes signals."""

    def send_signal(self, sig: int, /) -> None: ...


class Stopped(BaseException):
    """The training was stopped by a signal, and has saved. A BaseException, so that `except Exception` lets it through.

    Args:
        signum: the signal.
        saved: False if there was nothing to save, or no other rank to save with.
    """

    def __init__(self, signum: int, *, saved: bool = True) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.saved = signum, saved


class Wishes:
    """This process's requests to all ranks (stop, save), and what all ranks agreed on at the last step.

    Args:
        every_seconds: interval of saves.
    """

    def __init__(self, *, every_seconds: float | None = None) -> None:
        self.every_seconds = every_seconds
        self.signum = 0
        self.saved = time.monotonic()
        self.owed = False  # a save that was postponed
        self.can_save: Callable[[], bool] = lambda: True
        self.can_keep: Callable[[], bool] = lambda: False
        self.agreed_stop = 0
        self.begun = False  # there was a step, so other ranks take part, and there is something to save
        self.agreed_save = self.agreed_keep = False

    def numbers(self) -> tuple[float, float]:
        """Return the requests as numbers; all ranks act on their maximum: a signal number, and SAVE, KEEP or 0."""
        self.begun = True
        due = self.every_seconds is not None and time.monotonic() - self.saved >= self.every_seconds
        saves = (due or self.owed) and self.can_save()
        return float(self.signum), SAVE if saves else KEEP if self.can_keep() else 0.0

    def keep_time(self) -> None:
        """Record that a save was made now."""
        self.saved, self.owed = time.monotonic(), False

    def agree(self, stop: float, save: float) -> None:
        """Set the maximum over the ranks."""
        self.agreed_stop, self.agreed_save, self.agreed_keep = int(stop), save == SAVE, save == KEEP

    @contextmanager
    def listening(self, *, leads: bool) -> Iterator[None]:
        """Handle signals: remember the first and ignore later ones, except Ctrl-C, which ends the process.

        The kernel may send a signal several times: when a parent dies, once for each of its threads. In another thread
        than the main one, where Python sets no handlers, only warn.

        Args:
            leads: this is rank 0, which stops at once before the first step, because there is nothing to save.

        Raises:
            Stopped: before the first step.
        """
        if not in_main_thread():
            warn(
                "training in a thread: Ctrl-C, SIGTERM and SIGUSR1 do not save and stop it. To handle them, train in"
                " the main thread"
            )
            yield
            return

        def remember(signum: int, _frame: object) -> None:
            if self.signum:
                return
            self.signum = signum
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if leads and not self.begun:
                raise Stopped(signum, saved=False)

        before = {number: signal.signal(number, remember) for number in NUMBERS}
        mask = block()
        done = threading.Event()
        waits = threading.Thread(target=_pass_on, args=(done,), daemon=True)
        try:
            waits.start()  # a pending signal is raised here
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            done.set()
            with suppress(ProcessLookupError):
                signal.pthread_kill(waits.ident or 0, signal.SIGUSR1)
            waits.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def in_main_thread() -> bool:
    """Return whether this is the main thread, the only one that can set handlers: signal.signal."""
    return threading.current_thread() is threading.main_thread()


def _pass_on(done: threading.Event) -> None:
    """Pass each SIGUSR1 on to the main thread, until one comes after `done`."""
    while signal.sigwait({signal.SIGUSR1}) and not done.is_set():
        _thread.interrupt_main(signal.SIGUSR1)


def block() -> set[signal.Signals]:
    """Block SIGUSR1, also over execve, until a thread waits for it; return the earlier signal mask."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # type: ignore[return-value]


def end_on_interrupt() -> None:
    """Let Ctrl-C end this process without a traceback, until `listening`; also one that came since `hold_interrupts`.

    A process that ignores Ctrl-C, because a shell started it in the background, goes on to ignore it.
    """
    if in_main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def hold_interrupts() -> set[signal.Signals]:
    """Hold Ctrl-C back until the next program calls `end_on_interrupt`: Python would print a traceback while it starts.

    Returns:
        the earlier signal mask.
    """
    return signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # type: ignore[return-value]


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Start a training's process in the block, which begins with Ctrl-C held back."""
    mask = hold_interrupts()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def forwarding(child: Child, *, interrupts: bool) -> Iterator[list[int]]:
    """Forward signals to a child process; yield the list of those that came, which grows.

    Python sets handlers in the main thread only. In a different thread, forward nothing.

    Args:
        child: the process.
        interrupts: also Ctrl-C; False: the child is in the terminal's process group, so it gets Ctrl-C by itself.
    """
    caught: list[int] = []

    def forward(number: int, _frame: object) -> None:
        caught.append(number)
        if interrupts or number != signal.SIGINT:
            child.send_signal(number)

    if not in_main_thread():
        yield caught
        return
    before = {number: signal.signal(number, forward) for number in NUMBERS}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    try:
        yield caught
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def postponed() -> Iterator[None]:
    """Postpone Ctrl-C, SIGTERM and SIGHUP to the end of the block, for this process and its children."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def unblock() -> None:
    """Unblock SIGUSR1, including a pending one."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def outlive_parent(seconds: int) -> None:
    """Let this process live on for some time after its parent dies, instead of what `end_with_parent` asked for."""
    signal.signal(signal.SIGUSR2, lambda *_: signal.alarm(seconds))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGUSR2))


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Be the parent of descendants whose parent dies. Linux: prctl(2), PR_SET_CHILD_SUBREAPER."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)


def status_of(process: int) -> list[str]:
    """Return what proc_pid_stat(5) has of a process after its name: the state, the parent, ...

    Raises:
        OSError: there is no such process.
    """
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def children_of(parent: int) -> list[int]:
    """Return the children of a process.

    /proc/PID/task/TID/children would be faster, but may leave out a child while another one ends (proc(5)).
    """
    found = []
    for process in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with suppress(OSError):  # it has ended
            if int(status_of(process)[1]) == parent:
                found.append(process)
    return found


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Make the kernel send a signal to this process when its parent dies; exit if it is already dead.

    Linux: prctl(2), PR_SET_PDEATHSIG.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        sys.exit(128 + number)
