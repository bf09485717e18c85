"""Keeps the draws of other threads away from those of the thread that trains or loads samples.

Python's `random` has one generator for all threads of a process. Libraries draw from it in threads of their own, for
instance how long to wait before they repeat a request (botocore/retryhandler.py; wandb and gcsfs do the same). If that
happened while a sample was loaded, the rest of the sample would be another: the weights would depend on the network.
During a run the functions of `random` use another generator in each other thread. It follows from what the training's
was seeded with last. So a thread of the experiment's own that loads a sample draws the same numbers for it each time.
"""

import os
import random
import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_shared: random.Random = random.getstate.__self__  # type: ignore[attr-defined]  # the functions are its methods
_own = threading.local()  # .generator: the one that a thread draws from during a run
_owner: int | None = None  # the thread that trains, or loads samples in a worker
_seeded: tuple[object, ...] = ()  # what the owner seeded its generator with last


def take_draws(say: Callable[[str], None]) -> Callable[[], None]:
    """Leave Python's generator to this thread, and to those that call `share_draws`; the result ends that.

    Args:
        say: gets a warning about the first other thread that draws, unless it is labtrain's.
    """
    global _owner
    before, _owner, told = _owner, threading.get_ident(), list[str]()

    def say_once(text: str) -> None:
        if not told:
            told.append(text)
            say(text)

    real = {name: value for name, value in vars(random).items() if getattr(value, "__self__", None) is _shared}
    vars(random).update({name: _by_thread(method, say_once) for name, method in real.items()})

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
        global _seeded
        generator = _shared if _owner in (None, threading.get_ident()) else _generator(say)
        if generator is _shared:
            if name == "seed":
                _seeded = (*arguments, *options.values())
            return method(*arguments, **options)
        result: Result = getattr(generator, name)(*arguments, **options)
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
        if not trains and not _is_labtrains():
            say(
                f"thread {thread.name!r} draws from Python's `random`. It gets a generator of its own, so that the"
                " training does not depend on it. If your code draws there, draw in the thread that trains or loads"
                " the samples, or from random.Random(seed)"
            )
    if found is not _shared and getattr(_own, "seeded", None) is not _seeded:
        _own.seeded = _seeded
        found.seed(repr(_seeded))
    return found


def _is_labtrains() -> bool:
    """Return whether this thread runs code of labtrain's, such as the delivery to a store."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith("labtrain.") and frame.f_globals is not globals():
            return True
    return False


def _follow_fork() -> None:
    """In a forked process, such as a loader's worker, the thread that is left takes the owner's place."""
    global _owner
    if _owner is not None:
        _owner = threading.get_ident()


os.register_at_fork(after_in_child=_follow_fork)
