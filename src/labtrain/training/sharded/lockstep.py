"""Runs functions in lockstep: a thread for each, of which one runs at a time. Each runs to its next meeting point.

A function calls `meet` to stop there and to get the answer. Whoever runs the functions resumes them one after the
other, in an order of its own. So they run as if each had the interpreter to itself between two meeting points.
"""

import contextvars
import threading
from collections.abc import Callable
from dataclasses import dataclass

from labtrain.exact.draws import share_draws

_here = threading.local()


class _Aborted(BaseException):
    """Ends a function that waits at a meeting point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """What a function asks for at a meeting point.

    Attributes:
        kind: of meeting.
        key: which of that kind; all functions must meet at the same.
        payload: what this function brings.
    """

    kind: str
    key: int = 0
    payload: object = None


END = "end"


class Runner:
    """One function in a thread of its own, which runs only inside `resume`."""

    def __init__(self, body: Callable[[], object]) -> None:
        self.result: object = None
        self.outside: object = None  # what the function puts back after a block that it is in
        self._body = body
        self._error: BaseException | None = None
        self._meeting: Meeting | None = None
        self._answer: object = None
        self._aborted = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True, name="labtrain-shard")
        self._thread.start()

    def resume(self, answer: object = None) -> Meeting:
        """Run the function to its next meeting point and return what it asks for; re-raise what it raises.

        Args:
            answer: what `meet` returns to it.
        """
        self._answer, self._meeting = answer, None
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        return self._meeting or Meeting(kind=END)

    def close(self) -> None:
        """End the function where it waits."""
        if self._thread.is_alive():
            self._aborted = True
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        share_draws()
        self._go.acquire()
        _here.runner = self
        try:
            if not self._aborted:
                self.result = self._body()
        except _Aborted:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._back.release()

    def wait(self, meeting: Meeting) -> object:
        """Stop at a meeting point; called in the function's thread."""
        self._meeting = meeting
        self._back.release()
        self._go.acquire()
        if self._aborted:
            raise _Aborted
        return self._answer


def runs_here() -> bool:
    """Return whether the calling code runs in such a function."""
    return getattr(_here, "runner", None) is not None


def here() -> Runner:
    """Return the function that the calling code runs in."""
    runner: Runner = _here.runner
    return runner


def meet(kind: str, key: int = 0, payload: object = None) -> object:
    """Stop at a meeting point, and return the answer."""
    return here().wait(Meeting(kind=kind, key=key, payload=payload))
