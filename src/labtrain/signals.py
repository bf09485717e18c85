"""Signals that ask to stop: the step is finished and saved first, on all ranks together; a second signal ends at once.

SIGTERM is what schedulers and `kill` send, SIGINT is Ctrl-C, SIGUSR1 is what Slurm sends before a time limit
(`--signal=USR1@90`, https://slurm.schedmd.com/sbatch.html).
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """The training was asked to stop, and has saved. No Exception: `except Exception` must not swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


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
        self.agreed_save = False

    def numbers(self) -> tuple[float, float]:
        """Return them as numbers whose maximum over the ranks is what all do: a signal's number, 1 to save."""
        due = self.every_seconds is not None and time.monotonic() - self.saved >= self.every_seconds
        return float(self.signum), float((due or self.owed) and self.can_save())

    def keep_time(self) -> None:
        """Note that a save was made now."""
        self.saved, self.owed = time.monotonic(), False

    def agree(self, stop: float, save: float) -> None:
        """Take the maximum over the ranks."""
        self.agreed_stop, self.agreed_save = int(stop), save > 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to signals: the first is remembered, a second has its default action, the end of the process."""

        def remember(signum: int, _frame: object) -> None:
            self.signum = signum
            take_once(signum)
            for number in NUMBERS:
                signal.signal(number, signal.SIG_DFL)

        before = {number: signal.signal(number, remember) for number in NUMBERS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Have the kernel send a signal to this process when its parent is killed, or end it where that has happened.

    Linux: prctl(2), PR_SET_PDEATHSIG.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        sys.exit(128 + number)


def take_once(number: int) -> None:
    """Have the kernel not send again what tells that the parent was killed: it does so for each of its threads."""
    libc, due = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(PR_GET_PDEATHSIG, ctypes.byref(due))
    if due.value == number:
        libc.prctl(PR_SET_PDEATHSIG, 0)
