"""Turns plain values into scalars, tensors, tuples and lists, which a checkpoint can hold, and back.

Plain values are numbers, texts, bytes, None, tensors, numpy's arrays, members of an Enum, the values of TEXTS, and
lists, tuples, named tuples, dicts, sets and deques of those. Between the ranks of a training, objects of the
experiment's classes that hold only plain values are plain too.

labtrain pickles nothing, and reading a value runs no code from it. It looks up a class by its name among the imported
modules. The class must be an Enum, a named tuple or a class of the experiment. Its constructor is not called.
"""

import argparse
import copyreg
import sys
import sysconfig
import types
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Collection, Container, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag
from fractions import Fraction
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import UUID

import numpy as np
import torch
from torch import nn

from labtrain.base.errors import ConfigError

SCALARS = (type(None), bool, int, float, complex, str, bytes)
SIMPLE = frozenset(SCALARS) - {complex}
LEAVES = frozenset({*SCALARS, torch.Tensor, nn.Parameter, np.ndarray})
DICTS: tuple[type[object], ...] = (dict, OrderedDict, Counter, defaultdict)
SEQUENCES: tuple[type[object], ...] = (list, tuple, torch.Size, set, frozenset, deque)
CONTAINERS: dict[str, Callable[..., object]] = {kind.__name__: kind for kind in (*DICTS, *SEQUENCES)}
FACTORIES: dict[object, str] = {kind: kind.__name__ for kind in (list, dict, set, int, float, str, tuple, deque)}
BY_NAME = {name: factory for factory, name in FACTORIES.items()}
OWN_FACTORY = ""  # of a defaultdict: code, which no checkpoint holds
BAGS = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap)
LIBRARIES = tuple(Path(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib", "purelib", "platlib"))


def _numbers(kind: type[object]) -> Callable[[str], object]:
    return lambda text: kind(*map(int, text.split()))


def _of_torch(text: str) -> object:
    return vars(torch)[text.removeprefix("torch.")]


# Values that a text describes completely: how to write and read it.
TEXTS: dict[type[object], tuple[Callable[[Any], str], Callable[[str], object]]] = {
    Fraction: (str, Fraction),
    Decimal: (str, Decimal),
    UUID: (str, UUID),
    type(Path()): (str, Path),
    PurePosixPath: (str, PurePosixPath),
    date: (date.isoformat, date.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    timedelta: (lambda span: f"{span.days} {span.seconds} {span.microseconds}", _numbers(timedelta)),
    range: (lambda each: f"{each.start} {each.stop} {each.step}", _numbers(range)),
    torch.dtype: (str, _of_torch),
    torch.layout: (str, _of_torch),
    torch.memory_format: (str, _of_torch),
}
TEXTS_BY_NAME = {kind.__name__: kind for kind in TEXTS}

Place = tuple[object, ...]


def is_plain(
    value: Any, storages: Container[torch.Tensor] = (), inside: tuple[int, ...] = (), *, objects: bool = False
) -> bool:
    """Return whether a value is plain.

    Args:
        value: any.
        storages: tensors that are not plain.
        inside: the ids of the containers around it.
        objects: objects of the experiment's classes are plain too.
    """
    kind = type(value)
    if kind in SCALARS or kind is torch.device:
        return True
    if kind is torch.Tensor:
        return value.layout in (torch.strided, torch.sparse_coo) and not value.is_meta and value not in storages
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biufc" and value.dtype.itemsize <= 8
    if kind is list and SIMPLE.issuperset(map(type, value)):
        return True
    if kind in TEXTS:
        write, read = TEXTS[kind]
        return repr(read(write(value))) == repr(value)  # a time may have a zone that its text does not name
    if isinstance(value, Enum):
        return _class_named(*_name_of(kind)) is kind and _member(type(value), _members(value)) is value
    if id(value) in inside:
        return True  # a list that holds itself
    inside = (*inside, id(value))
    if kind in DICTS:
        items = value.items()
        return all(_is_key(key) and is_plain(item, storages, inside, objects=objects) for key, item in items)
    if kind in SEQUENCES or _is_named_tuple(value):
        return all(is_plain(item, storages, inside, objects=objects) for item in value)
    if objects and is_own(kind) and _class_named(*_name_of(kind)) is kind:
        return all(is_plain(item, storages, inside, objects=True) for _, item in _state(value))
    return False


def _is_key(key: object) -> bool:
    kind = type(key)
    if isinstance(key, tuple | frozenset) and (kind in (tuple, frozenset) or _is_named_tuple(key)):
        return all(map(_is_key, key))
    return kind in SCALARS or (
        (kind in TEXTS or kind in (torch.device, torch.Size) or isinstance(key, Enum)) and is_plain(key)
    )


def _is_named_tuple(value: object) -> bool:
    kind = type(value)
    if not (isinstance(value, tuple) and hasattr(kind, "_fields")) or getattr(value, "__dict__", None):
        return False
    return _class_named(*_name_of(kind)) is kind


def _name_of(kind: type[object]) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _class_named(module: str, name: str) -> type[object] | None:
    """Return a class of an imported module; None if there is no such class."""
    found: object = sys.modules.get(module)
    for part in name.split("."):  # not getattr, which may run a module's own code
        found = vars(found).get(part) if isinstance(found, type | types.ModuleType) else None
    return found if isinstance(found, type) else None


def _members(member: Enum) -> list[str]:
    """Return the name of an Enum's member, or those that a Flag combines."""
    if isinstance(member, Flag) and member.name not in type(member).__members__:
        return [each.name or "" for each in member]
    return [member.name]


def _member(kind: type[Enum], names: list[str]) -> Enum | None:
    members = [kind.__members__.get(name) for name in names]
    if None in members:
        return None
    if issubclass(kind, Flag) and len(members) != 1:
        found = kind(0)
        for each in members:
            found |= each  # type: ignore[operator]
        return found
    return members[0]


def _state(value: object) -> list[tuple[str, object]]:
    """Return the attributes of an object, those in __slots__ too."""
    slots = [name for name in copyreg._slotnames(type(value)) if hasattr(value, name)]  # type: ignore[attr-defined]
    return [*getattr(value, "__dict__", {}).items(), *((name, getattr(value, name)) for name in slots)]


class Encoder:
    """Turns plain values into scalars, tensors, tuples and lists. An object's second occurrence is its number.

    Args:
        places: of objects that the reader has too, by id: the reader changes them instead of making new ones.
    """

    def __init__(self, places: dict[int, Place] | None = None) -> None:
        self.numbers: dict[int, int] = {}
        self.places = places or {}

    def __call__(self, value: Any) -> object:
        kind = type(value)
        if kind is complex:
            return "complex", value.real, value.imag
        if kind in SCALARS:
            return value
        if kind in TEXTS:
            return "text", TEXTS[kind][0](value), kind.__name__
        if kind is torch.device:
            return "device", value.type if value.type in ("cpu", "meta") else None
        if isinstance(value, Enum):
            return "enum", _members(value), *_name_of(kind)
        if isinstance(value, tuple | frozenset):
            return self._sequence(value)
        if id(value) in self.numbers:
            return "same", self.numbers[id(value)]
        self.numbers[id(value)] = len(self.numbers)
        node = self._object(value)
        return ("at", node, self.places[id(value)]) if id(value) in self.places else node

    def _object(self, value: Any) -> object:
        kind = type(value)
        if kind is torch.Tensor:
            return "tensor", value.detach(), value.is_cpu, value.requires_grad and value.is_leaf
        if isinstance(value, np.ndarray):
            return (
                "array",
                torch.from_numpy(np.ascontiguousarray(value).reshape(-1)),
                list(value.shape),
                str(value.dtype),
            )
        if isinstance(value, np.generic):
            return "number", torch.from_numpy(np.array(value).reshape(1)), str(value.dtype)
        if kind in DICTS:
            items = [(self(key), self(item)) for key, item in value.items()]
            factory = getattr(value, "default_factory", None)
            return kind.__name__, items, None if factory is None else FACTORIES.get(factory, OWN_FACTORY)
        if kind in SEQUENCES:
            return self._sequence(value)
        return "object", [(name, self(item)) for name, item in _state(value)], *_name_of(kind)

    def _sequence(self, value: Collection[object]) -> object:
        kind = type(value)
        if kind is list and SIMPLE.issuperset(map(type, value)):
            return "list", list(value)
        # In one order on every rank; the order of a set is random.
        items = [self(item) for item in (sorted(value, key=repr) if kind in (set, frozenset) else value)]
        if kind in SEQUENCES:
            return (kind.__name__, items, value.maxlen) if isinstance(value, deque) else (kind.__name__, items)
        return "named", items, *_name_of(kind)


class Decoder:
    """Turns them back; each number gives the same object again.

    Args:
        device: the device for tensors that were on an accelerator.
        there: the objects at the encoder's places; None for a checkpoint, which has no objects.

    Raises:
        ConfigError: a class does not exist any more.
    """

    def __init__(self, device: torch.device, there: dict[Place, object] | None = None) -> None:
        self.device, self.there, self.made = device, there, list[object]()

    def __call__(self, node: object, current: object = None, into: object = None) -> object:
        """Return the value.

        Args:
            node: from an encoder.
            current: the attribute's current value: it gives a defaultdict its factory. A tensor that an optimizer may
                hold is itself changed and returned.
            into: is changed and returned, if it has the same type.
        """
        if not isinstance(node, tuple):
            return node
        kind, content, *more = node
        if kind == "at":
            return self(content, current, (self.there or {}).get(more[0]))
        if kind == "complex":
            return complex(content, *more)
        if kind == "same":
            return self.made[content]
        if kind == "text":
            return TEXTS[TEXTS_BY_NAME[more[0]]][1](content)
        if kind == "device":
            return torch.device(content) if content else self.device
        if kind == "enum":
            return self._enum(content, *more)
        if kind == "tensor":
            return self._noted(self._tensor(content, current, into, *more))
        if kind == "array":
            return self._noted(self._array(content, into, *more))
        if kind == "number":
            return self._noted(content.numpy().astype(more[0])[0])
        if kind == "object" and self.there is not None:  # never of a checkpoint
            return self._own(content, into, *more)
        if kind == "named":
            return self._named_tuple(content, current, *more)
        if CONTAINERS[kind] in DICTS:
            return self._dict(content, current, into, CONTAINERS[kind], more[0])
        if kind in ("tuple", "frozenset", "Size"):
            return CONTAINERS[kind](self._items(content, current))
        return self._collection(kind, content, current, into, *more)

    def _enum(self, names: list[str], *where: str) -> object:
        found = _class_named(*where)
        member = _member(found, names) if found is not None and issubclass(found, Enum) else None
        if member is None:
            raise _gone(f"{'.'.join(where)}.{'|'.join(names)}")
        return member

    def _array(self, content: torch.Tensor, into: object, shape: list[int], dtype: str) -> object:
        array = content.numpy().astype(dtype).reshape(shape)
        if type(into) is np.ndarray and (into.shape, into.dtype) == (array.shape, array.dtype):
            into[...] = array
            return into
        return array

    def _named_tuple(self, content: list[object], current: object, *where: str) -> object:
        found = _class_named(*where)
        if found is None or not (issubclass(found, tuple) and hasattr(found, "_fields")):
            raise _gone(".".join(where))
        return tuple.__new__(found, self._items(content, current))

    def _collection(
        self, kind: str, content: list[object], current: object, into: object, maxlen: int | None = None
    ) -> object:
        made: Any = into
        if type(into) is not CONTAINERS[kind] or (isinstance(into, deque) and into.maxlen != maxlen):
            made = deque(maxlen=maxlen) if kind == "deque" else CONTAINERS[kind]()
        made.clear()
        self._noted(made)
        for item in self._items(content, current):  # one after the other: an item may be the list itself
            made.add(item) if kind == "set" else made.append(item)
        return made

    def _noted(self, made: object) -> object:
        self.made.append(made)
        return made

    def _items(self, content: list[object], current: object) -> Iterator[object]:
        like = current if isinstance(current, list | tuple) and len(current) == len(content) else [None] * len(content)
        return (self(item, now) for item, now in zip(content, list(like), strict=True))

    def _dict(
        self,
        content: list[tuple[object, object]],
        current: object,
        into: object,
        kind: Callable[..., object],
        factory: str | None,
    ) -> object:
        now = into if type(into) is kind else current
        own = getattr(now, "default_factory", None)
        before = dict(now) if isinstance(now, dict) and type(now) in DICTS else {}
        made: Any = into if type(into) is kind else kind()
        made.clear()
        if kind is defaultdict:
            made.default_factory = own if factory == OWN_FACTORY else BY_NAME.get(factory or "")
        self._noted(made)
        for key, item in content:
            read = self(key)
            like = before.get(read)
            if like is None and own is not None and _wants_factory(item):
                like = own()  # a defaultdict in one: the factory of the outer one makes it
            made[read] = self(item, like)
        return made

    def _own(self, content: list[tuple[str, object]], into: object, module: str, name: str) -> object:
        kind = _class_named(module, name)
        if kind is None or not is_own(kind):
            raise _gone(f"{module}.{name}")
        made = into if type(into) is kind else kind() if kind in BAGS else object.__new__(kind)
        self._noted(made)
        slots = copyreg._slotnames(kind)  # type: ignore[attr-defined]
        values = {each: self(item) for each, item in content}
        if hasattr(made, "__dict__"):
            vars(made).clear()
            vars(made).update({each: value for each, value in values.items() if each not in slots})
        for each in slots:
            if each in values:
                object.__setattr__(made, each, values[each])
        return made

    def _tensor(self, saved: torch.Tensor, current: object, into: object, on_cpu: bool, trained: bool) -> torch.Tensor:
        held = into if into is not None else current if trained else None
        if isinstance(held, torch.Tensor) and held.requires_grad == trained and _can_hold(held, saved):
            with torch.no_grad():
                return held.copy_(saved)
        device = torch.device("cpu") if on_cpu else self.device
        return saved.to(device, copy=True).requires_grad_(trained)


def _can_hold(held: torch.Tensor, saved: torch.Tensor) -> bool:
    alike = held.shape == saved.shape and held.dtype == saved.dtype and held.layout == saved.layout
    return alike and held.is_leaf and held.layout == torch.strided


def _wants_factory(node: object) -> bool:
    return isinstance(node, tuple) and (node[0], node[-1]) == ("defaultdict", OWN_FACTORY)


def _gone(name: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint holds a {name}, which the code no longer defines",
        hint="restore its former name; or resume=never",
    )


_own_classes: dict[type[object], bool] = {}


def is_own(kind: type[object]) -> bool:
    """Return whether a class and its bases are the experiment's, or the class is a plain holder of values."""
    if kind in BAGS:
        return True
    if kind not in _own_classes:
        bases = [base for base in kind.__mro__ if base.__module__ not in ("builtins", "abc", "typing")]
        builtin = [base for base in kind.__mro__ if base.__module__ == "builtins" and base is not object]
        _own_classes[kind] = bool(bases) and not builtin and all(map(is_experiments, bases))
    return _own_classes[kind]


def is_experiments(kind: type[object]) -> bool:
    """Return whether the experiment's code, not a library, defines a class."""
    return is_experiments_module(kind.__module__)


def is_experiments_module(name: str) -> bool:
    """Return whether a module belongs to the experiment, not to a library."""
    if name.partition(".")[0] == "labtrain":
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    return name == "__main__" if file is None else is_experiments_file(file)


def is_experiments_code(frame: types.FrameType) -> bool:
    """Return whether a frame runs the experiment's code, not that of a library."""
    module = str(frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] != "labtrain" and is_experiments_file(frame.f_code.co_filename)


@cache
def is_experiments_file(file: str) -> bool:
    """Return whether a file of code does not belong to a library."""
    path = Path(file)
    return not ({"site-packages", "dist-packages"} & set(path.parts) or any(map(path.is_relative_to, LIBRARIES)))
