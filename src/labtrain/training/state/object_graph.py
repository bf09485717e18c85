"""Finds what the code of a model can reach from some objects, and so may change.

Beside attributes and items of containers: fields in `__slots__`, closures, defaults and attributes of functions, the
globals that they name, attributes of classes, and what iterators and partial functions hold. It enters only functions,
classes and modules of the experiment.
"""

import functools
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

from labtrain.exact.plain_values import SCALARS, SIMPLE, is_experiments, is_experiments_module

Items = list[tuple[Any, Any]]  # (name, key or index; the value there)
Enter = Callable[[object, object, object], bool]  # (object, name in it, value there) -> whether to enter the value


@dataclass(frozen=True, slots=True)
class View:
    """One way in which an object holds other objects.

    Attributes:
        get: returns what it holds now.
        put: restores these; None if it cannot be changed from outside.
        path: the prefix of its items' names; None for the object's own path.
    """

    get: Callable[[], Items]
    put: Callable[[Items], object] | None = None
    path: str | None = None


def reach(roots: Mapping[str, object], enter: Enter) -> Iterator[tuple[str, object, list[tuple[View, Items]]]]:
    """Yield each reachable object once: its path, the object, and what it holds in each of its views.

    Args:
        roots: where to start, by path.
        enter: called before an object is entered; not for the roots, nor for a list's numbers and texts.
    """
    waiting, seen = deque(roots.items()), dict[int, object]()  # keeps the objects alive, so that no id is reused
    while waiting:
        path, value = waiting.popleft()
        if type(value) not in SCALARS:
            if id(value) in seen:
                continue
            seen[id(value)] = value
        held = [(view, view.get()) for view in views(value)]
        yield path, value, held
        # Fast path, for example for the losses of a million steps.
        if isinstance(value, list) and SIMPLE.issuperset(map(type, value)):
            continue
        for view, items in held:
            base = path if view.path is None else view.path
            for name, item in items:
                if enter(value, name, item):
                    waiting.append((f"{base}.{label(name)}" if base else label(name), item))


def label(name: object) -> str:
    """Return the text of a name, a key or an index in a path."""
    return str(name) if type(name) in SCALARS or isinstance(name, tuple) else type(name).__name__


def views(value: object) -> Iterator[View]:
    """Yield the ways in which an object holds other objects."""
    if type(value) in SCALARS:
        return
    if isinstance(value, dict):
        yield _mapping(value)
    elif isinstance(value, list | deque):
        yield _items(value, list if isinstance(value, list) else deque)
    elif isinstance(value, tuple):
        yield View(lambda: list(enumerate(value)))
    elif isinstance(value, set | frozenset):
        yield _set(value)
    elif isinstance(value, types.FunctionType):
        yield from _function(value)
    elif isinstance(value, type):
        if is_experiments(value):
            yield _class(value)
        return
    elif isinstance(value, types.ModuleType):
        if is_experiments_module(value.__name__):
            names = [name for name in vars(value) if not name.startswith("__")]
            yield _variables(vars(value), names, value.__name__)
        return
    elif isinstance(value, types.MethodType):
        yield View(lambda: [("__self__", value.__self__), ("__func__", value.__func__)])
    elif isinstance(value, property | staticmethod | classmethod):
        inner = [value.fget, value.fset] if isinstance(value, property) else [value.__func__]
        yield View(lambda: list(enumerate(inner)))
    elif isinstance(value, functools.partial):
        yield View(lambda: [("func", value.func), ("args", value.args), ("keywords", value.keywords)])
    elif isinstance(value, types.GeneratorType):
        yield View(lambda: list(value.gi_frame.f_locals.items()) if value.gi_frame else [])
    elif hasattr(type(value), "__next__") and type(value).__module__ in ("builtins", "itertools"):
        yield View(lambda: list(enumerate(_reduced(value))))
    if isinstance(getattr(value, "__dict__", None), dict):
        yield _mapping(vars(value))
    if slots := _slots(cast(object, type(value))):
        yield View(
            lambda: [(name, getattr(value, name)) for name in slots if hasattr(value, name)],
            functools.partial(_set_slots, value),
        )
    if is_experiments(type(value)):
        yield View(lambda: [(kind.__qualname__, kind) for kind in type(value).__mro__ if is_experiments(kind)], path="")


def _set_slots(value: object, saved: Items) -> None:
    for name, item in saved:
        object.__setattr__(value, name, item)


def _mapping(mapping: dict[Any, Any]) -> View:
    kind: Any = OrderedDict if isinstance(mapping, OrderedDict) else dict  # Counter.update would add instead of replace

    def put(saved: Items) -> None:
        kind.clear(mapping)
        for key, item in saved:
            kind.__setitem__(mapping, key, item)

    return View(lambda: list(kind.items(mapping)), put)


def _items(items: Iterable[object], kind: Any) -> View:
    def put(saved: Items) -> None:
        kind.clear(items)
        kind.extend(items, [item for _, item in saved])

    return View(lambda: list(enumerate(kind.__iter__(items))), put)


def _set(items: Any) -> View:
    def put(saved: Items) -> None:
        set.clear(items)
        set.update(items, [item for _, item in saved])

    return View(lambda: [(item, item) for item in items], put if isinstance(items, set) else None)


def _function(function: types.FunctionType) -> Iterator[View]:
    if not is_experiments_module(function.__module__ or "labtrain"):
        return
    module, name = function.__module__, function.__qualname__.replace(".<locals>", "")
    defaults = [("defaults", function.__defaults__), ("kwdefaults", function.__kwdefaults__)]
    yield View(lambda: [(key, value) for key, value in defaults if value is not None], path=name)
    yield _variables(function.__globals__, sorted(_globals(function.__code__)), module)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def get() -> Items:
        return [(key, cell.cell_contents) for key, cell in cells.items() if not _is_empty(cell)]

    def put(saved: Items) -> None:
        for key, item in saved:
            cells[key].cell_contents = item

    yield View(get, put, path=name)


def _globals(code: types.CodeType) -> set[str]:
    """Return the names of its module that a function, and functions inside it, may use."""
    inner = [_globals(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*inner)


def _variables(table: dict[str, object], names: Iterable[str], path: str) -> View:
    """Return a view of some variables of a module."""

    def put(saved: Items) -> None:
        table.update(saved)
        for name in names:
            if name in table and name not in dict(saved):
                del table[name]

    return View(lambda: [(name, table[name]) for name in names if name in table], put, path)


def _class(kind: type[object]) -> View:
    def get() -> Items:
        return [(name, item) for name, item in vars(kind).items() if not name.startswith(("__", "_abc"))]

    def put(saved: Items) -> None:
        then = dict(saved)
        for name, item in get():
            if name not in then:
                delattr(kind, name)
            elif then[name] is not item:
                setattr(kind, name, then[name])
        for name in then.keys() - vars(kind).keys():
            setattr(kind, name, then[name])

    return View(get, put, path=kind.__qualname__.replace(".<locals>", ""))


@functools.cache
def _slots(kind: type[object]) -> list[str]:
    found: list[str] = []
    for each in kind.__mro__:
        names = vars(each).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            mangled = f"_{each.__name__.lstrip('_')}{name}" if name[:2] == "__" != name[-2:] else name
            if isinstance(vars(each).get(mangled), types.MemberDescriptorType):
                found.append(mangled)
    return found


def _reduced(iterator: object) -> tuple[object, ...]:
    """Return what an iterator of the standard library iterates over, and its position."""
    if type(iterator) is count:
        return (repr(iterator),)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = iterator.__reduce__()
    except TypeError:
        return ()
    return tuple(parts[1:]) if isinstance(parts, tuple) else ()


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is cell  # never true; raises ValueError if the cell is empty
    except ValueError:
        return True
