"""Keeps the draws of other threads away from those of the thread that trains or loads samples.

Python's `random` has one generator for all threads of a process. Libraries draw from it in threads of their own, for
instance how long to wait before they repeat a request (botocore/retryhandler.py; wandb and gcsfs do the same). If that
happened while a sample was loaded, the rest of the sample would be another: the weights would depend on the network.
During a run the functions of `random` use another generator in other threads.
"""

import os
import random
import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from labtrain.exact.plain_values import is_experiments_code

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_shared: random.Random = random.getstate.__self__  # type: ignore[attr-defined]  # the functions are its methods
_own = threading.local()  # .generator: the one that a thread draws from during a run
_owner: int | None = None  # the thread that trains, or loads samples in a worker


def take_draws(say: Callable[[str], None]) -> Callable[[], None]:
    """Leave Python's generator to this thread, and to those that call `share_draws`; the result ends that.

    Args:
        say: gets a warning if another thread of the experiment's own draws.
    """
    global _owner
    before, _owner = _owner, threading.get_ident()
    real = {name: value for name, value in vars(random).items() if getattr(value, "__self__", None) is _shared}
    vars(random).update({name: _by_thread(method, say) for name, method in real.items()})

    def give_back() -> None:
        global _owner
        _owner = before
        vars(random).update(real)

    return give_back


def share_draws() -> None:
    """Let this thread draw from the generator of the run: it trains, too."""
    _own.generator = _shared


def _by_thread(method: Callable[Parameters, Result], say: Callable[[str], None]) -> Callable[Parameters, Result]:
    name = method.__name__

    @wraps(method)
    def draw(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        if _owner in (None, threading.get_ident()):
            return method(*arguments, **options)
        result: Result = getattr(_generator(say), name)(*arguments, **options)
        return result

    draw.__module__, draw.__qualname__ = random.__name__, name  # so that it can be pickled
    return draw


def _generator(say: Callable[[str], None]) -> random.Random:
    """Return what this thread draws from, which is not the owner."""
    found: random.Random | None = getattr(_own, "generator", None)
    if found is None:
        thread = threading.current_thread()
        # torch's threads were not started by Python, and a backward that runs there draws for the training.
        trains = isinstance(thread, threading._DummyThread)
        found = _own.generator = _shared if trains else random.Random()
        if not trains and _is_experiments():
            say(
                f"the experiment draws from Python's `random` in thread {thread.name!r}: labtrain seeds only the"
                " thread that trains or loads the samples; draw there, or from random.Random(seed)"
            )
    return found


def _is_experiments() -> bool:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if is_experiments_code(frame):
            return True
    return False


def _follow_fork() -> None:
    """In a forked process, such as a loader's worker, the thread that is left takes the owner's place."""
    global _owner
    if _owner is not None:
        _owner = threading.get_ident()


os.register_at_fork(after_in_child=_follow_fork)
