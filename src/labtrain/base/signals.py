"""Signals that ask to stop: the step is finished and saved first, on all ranks together; a second Ctrl-C ends at once.

SIGTERM is what schedulers and `kill` send, SIGINT is Ctrl-C, SIGUSR1 is what Slurm sends before a time limit
(`--signal=USR1@90`, https://slurm.schedmd.com/sbatch.html) to every process of a job: one that knows nothing of it
would be ended. So it is blocked from the first line on. It waits in the kernel, over execve too, until a thread asks
for it; what is started on the way (loader workers, wandb's service) has it blocked as well, and lives.
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

PR_SET_PDEATHSIG = 1
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """The training was asked to stop, and has saved. No Exception: `except Exception` must not swallow it.

    Args:
        signum: the signal.
        saved: False where there was nothing to save, or nobody to save with.
    """

    def __init__(self, signum: int, *, saved: bool = True) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.saved = signum, saved


class Wishes:
    """What this process wants of all ranks: to stop, to save. What all agreed on at the last step is beside it.

    Args:
        every_seconds: how often to save.
    """

    def __init__(self, *, every_seconds: float | None = None) -> None:
        self.every_seconds = every_seconds
        self.signum = 0
        self.saved = time.monotonic()
        self.owed = False  # a save that was put off
        self.can_save: Callable[[], bool] = lambda: True
        self.agreed_stop = 0
        self.begun = False  # there has been a step: the others are asked, and something is to be saved
        self.agreed_save = False

    def numbers(self) -> tuple[float, float]:
        """Return them as numbers whose maximum over the ranks is what all do: a signal's number, 1 to save."""
        self.begun = True
        due = self.every_seconds is not None and time.monotonic() - self.saved >= self.every_seconds
        return float(self.signum), float((due or self.owed) and self.can_save())

    def keep_time(self) -> None:
        """Note that a save was made now."""
        self.saved, self.owed = time.monotonic(), False

    def agree(self, stop: float, save: float) -> None:
        """Take the maximum over the ranks."""
        self.agreed_stop, self.agreed_save = int(stop), save > 0

    @contextmanager
    def listening(self, *, leads: bool) -> Iterator[None]:
        """Listen to signals: the first is remembered, later ones are ignored, but for Ctrl-C, which ends the process.

        The kernel may send the same one several times: at a parent's death, once for each of its threads.

        Args:
            leads: this is rank 0, which before the first step just stops: there is nothing to save.

        Raises:
            Stopped: before the first step.
        """

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
            waits.start()  # one that has waited is raised here
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            done.set()
            with suppress(ProcessLookupError):
                signal.pthread_kill(waits.ident or 0, signal.SIGUSR1)
            waits.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _pass_on(done: threading.Event) -> None:
    """Wait for each SIGUSR1 and have the main thread handle it, until one comes after `done`."""
    while signal.sigwait({signal.SIGUSR1}) and not done.is_set():
        _thread.interrupt_main(signal.SIGUSR1)


def block() -> set[signal.Signals]:
    """Let SIGUSR1 wait until this process, or what it becomes, asks for it; return what was blocked before."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # type: ignore[return-value]


def unblock() -> None:
    """Let a SIGUSR1 come, also one that has waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Have the kernel send a signal to this process when its parent is killed, or end it where that has happened.

    Linux: prctl(2), PR_SET_PDEATHSIG.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        sys.exit(128 + number)
