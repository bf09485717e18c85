"""Tells from a function's code whether it reads an argument. In doubt it does."""

import dis
import types
from collections.abc import Iterator
from functools import cache

# Names with which code can read any local variable.
ANY_VARIABLE = frozenset(
    {"locals", "vars", "eval", "exec", "currentframe", "_getframe", "stack", "breakpoint", "set_trace"}
)


def reads(function: object, place: int) -> bool:
    """Return whether a function or method reads its argument at a place, when it is called by position.

    A name counts as read wherever the code loads it, also in a branch that never runs.

    Args:
        function: also an object that can be called, which counts as reading.
        place: of the argument, after `self`.
    """
    bound = isinstance(function, types.MethodType)
    found = function.__func__ if isinstance(function, types.MethodType) else function
    return not isinstance(found, types.FunctionType) or _loads(found.__code__, place + bound)


@cache
def _loads(code: types.CodeType, place: int) -> bool:
    """Return whether code loads its positional argument at a place, or the `*args` that holds it."""
    several = code.co_argcount + code.co_kwonlyargcount  # where the name of *args stands
    if place >= code.co_argcount and not code.co_flags & 0x04:  # CO_VARARGS
        return True  # the call fails: that is its own error
    name = code.co_varnames[place if place < code.co_argcount else several]
    if name in code.co_cellvars or any(ANY_VARIABLE & set(each.co_names) for each in _nested(code)):
        return True  # an inner function may read it
    loads = (each.argval for each in dis.get_instructions(code) if "LOAD" in each.opname and "FAST" in each.opname)
    return any(name in (names if isinstance(names, tuple) else (names,)) for names in loads)  # two at once: 3.13


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _nested(each)
