"""A model's plain attributes: what its code keeps beside parameters and buffers.

A counter in `training_step`, a list of losses, the shadow weights of an average that is no buffer: torch and Lightning
save none of it. Plain are numbers, strings, bytes, None, tensors, numpy's arrays, and lists, tuples, dicts, sets and
deques of those. They are looked for in the model, in each of its submodules, and in the objects of the experiment's own
classes that these hold: `self.average.decay` as well as `self.steps`.

Left out: what torch, Lightning and torchmetrics keep for themselves, tensors that share their memory with a parameter
or a buffer, and attributes that hold anything else, such as a function, a dataset or a logger.
"""

import argparse
import functools
import io
import pickle
import random
import sys
import sysconfig
import types
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from labtrain.digests import digest_tree

SCALARS = (type(None), bool, int, float, complex, str, bytes)
SIMPLE = frozenset(SCALARS) - {complex}
LEAVES = frozenset({*SCALARS, torch.Tensor, nn.Parameter, np.ndarray})
DICTS: tuple[type[Any], ...] = (dict, OrderedDict, Counter, defaultdict)
SEQUENCES: tuple[type[Any], ...] = (list, tuple, set, frozenset, deque)
CONTAINERS = {kind.__name__: kind for kind in (*DICTS, *SEQUENCES)}
FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (list, dict, set, int, float, str, tuple, deque)}

# What a fresh module has is torch's; the rest of these is Lightning's.
PRIVATE = frozenset(nn.Module().__dict__) | {
    "prepare_data_per_node",
    "allow_zero_length_dataloader_with_multiple_devices",
    "_automatic_optimization",
    "_compiler_ctx",
    "_current_fx_name",
    "_device",
    "_device_mesh",
    "_dtype",
    "_example_input_array",
    "_fabric",
    "_fabric_optimizers",
    "_hparams",
    "_hparams_initial",
    "_hparams_name",
    "_log_hyperparams",
    "_metric_attributes",
    "_param_requires_grad_state",
    "_strict_loading",
    "_trainer",
}
LIBRARIES = tuple(Path(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib", "purelib", "platlib"))
BAGS = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap)
MOST_OBJECTS = 10_000  # that are looked through for hidden weights
NO_WEIGHTS = ("hydra", "lightning", "logging", "omegaconf", "threading", "torch", "torchmetrics")
RANDOM = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random, torch.Generator)

Snapshot = dict[str, dict[str, Any]]  # of the holder's path, the attributes' names: their values as `_Encoder` has them


def holders(module: nn.Module) -> dict[str, Any]:
    """Return what may hold plain attributes, by dotted path: the model, its submodules, the experiment's objects."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        if type(part).__module__.partition(".")[0] != "torchmetrics" and not _is_metric(part):
            found[path] = part
    seen = {id(part) for part in module.modules()}
    waiting = list(found.items())
    while waiting:
        path, holder = waiting.pop(0)
        for name, value in attributes_of(holder):
            for inner, item in _own_objects(value, f"{path}.{name}" if path else name):
                if id(item) not in seen:
                    seen.add(id(item))
                    found[inner] = item
                    waiting.append((inner, item))
    return found


def attributes_of(holder: Any) -> list[tuple[str, Any]]:
    """Return (name, value) of each attribute of an object that is not torch's or Lightning's own."""
    private: Any = PRIVATE if isinstance(holder, nn.Module) else ()
    return [(name, value) for name, value in vars(holder).items() if name not in private]


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a model by dotted name, as they are: a list is the model's own."""
    return {_joined(path, name): value for path, name, value in _plain(module)}


def kept_by(module: nn.Module) -> list[tuple[Any, str]]:
    """Return the holder and the name of each plain attribute."""
    found = holders(module)
    return [(found[path], name) for path, name, _ in _plain(module)]


def fingerprints(module: nn.Module) -> dict[str, str]:
    """Return a digest of each plain attribute, by dotted name: what has another one has changed."""
    return {_joined(path, name): fingerprint(value) for path, name, value in _plain(module)}


def snapshot(module: nn.Module, *, unlike: dict[str, str] | None = None) -> Snapshot:
    """Return the plain attributes as tensors and plain values, which a checkpoint can hold.

    Tensors are the model's own, detached: copy them before the model goes on.

    Args:
        module: the model.
        unlike: fingerprints; an attribute that still has its own is left out.
    """
    encode, found = _Encoder(), Snapshot()
    for path, name, value in _plain(module):
        if unlike is None or unlike.get(_joined(path, name)) != fingerprint(value):
            found.setdefault(path, {})[name] = encode(value)
    return found


def restore(module: nn.Module, saved: Snapshot, *, device: torch.device) -> list[str]:
    """Set the attributes of a snapshot. What two of them shared, they share again.

    Args:
        module: the model, or another of its kind.
        saved: of `snapshot`.
        device: the training's; a tensor goes there if it was on an accelerator.

    Returns:
        the dotted names of those whose holder this model lacks: an object that was made during the training.
    """
    decode, now, missing = _Decoder(device), holders(module), list[str]()
    for path, values in saved.items():
        for name, value in values.items():  # decoded all, since a later one may be the same object
            holder = now.get(path)
            current = vars(holder).get(name) if holder is not None else None
            decoded = decode(value, current)
            if holder is None:
                missing.append(_joined(path, name))
            elif decoded is not current:
                vars(holder)[name] = decoded
    return missing


def hidden_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that a model keeps out of torch's sight, by name.

    A network in a list or in an object that is no module, such as a teacher that the optimizer is not to find; and
    tensors in the objects of libraries, such as the averages of weights that one keeps.
    """
    found: dict[str, torch.Tensor] = {}
    seen = {id(part) for part in module.modules()}
    waiting = [
        (f"{path}.{name}" if path else name, value, 0)
        for path, holder in holders(module).items()
        for name, value in attributes_of(holder)
        if type(value) not in SCALARS
    ]
    while waiting:
        path, value, depth = waiting.pop()
        kind = type(value)
        if kind in SCALARS or id(value) in seen or len(seen) > MOST_OBJECTS:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            weights = [*value.named_parameters(), *value.named_buffers()]
            found |= {f"{path}.{name}": tensor for name, tensor in weights}
        elif isinstance(value, torch.Tensor) and depth:
            found[path] = value
        elif kind in DICTS:
            waiting += [(f"{path}.{key}", item, depth) for key, item in value.items()]
        elif kind in (list, tuple):
            waiting += [(f"{path}.{index}", item, depth) for index, item in enumerate(value)]
        elif depth < 2 and hasattr(value, "__dict__") and not _has_no_weights(value):
            waiting += [(f"{path}.{name}", item, depth + 1) for name, item in vars(value).items()]
    return dict(sorted(found.items()))


def _has_no_weights(value: Any) -> bool:
    kind = type(value)
    code = isinstance(value, type | types.ModuleType) or hasattr(value, "__get__")
    return code or is_own(kind) or kind.__module__.partition(".")[0] in NO_WEIGHTS


def unkept(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each attribute that holds a state which no checkpoint can keep.

    Generators of random numbers, iterators, open files, and objects of the experiment's own classes whose state is not
    in attributes. Other objects of libraries are not judged.
    """
    storages = _Storages(module)
    for path, holder in holders(module).items():
        for name, value in attributes_of(holder):
            if not _is_plain(value, storages):
                yield from _stateful(value, _joined(path, name), set())


def fingerprint(value: Any) -> str:
    """Return what tells a value from any other; of a scalar the text itself, since a model has thousands.

    Of a value that is neither plain nor can be pickled it is the type.
    """
    kind = type(value)
    if kind in SCALARS:
        return f"{kind.__name__} {value!r}"
    if not _is_plain(value, ()):
        return f"{kind.__qualname__} {xxhash.xxh3_128_hexdigest(_pickled(value) or b'')}"
    if kind is list and SIMPLE.issuperset(map(type, value)):  # losses of a million steps
        return f"list {xxhash.xxh3_128_hexdigest(repr(value).encode(errors='surrogateescape'))}"
    return digest_tree(_Encoder()(value), algorithm=xxhash.xxh3_128)


def encode(values: dict[Any, Any]) -> list[tuple[Any, Any, bytes | None]]:
    """Return values as one rank can send them to another: plain ones, and what can be pickled, such as an Enum."""
    found: list[tuple[Any, Any, bytes | None]] = []
    for key, value in values.items():
        if _is_plain(value, ()):
            found.append((key, _on_cpu(_Encoder()(value)), None))
        elif (pickled := _pickled(value)) is not None:
            found.append((key, None, pickled))
    return found


def decode(sent: list[tuple[Any, Any, bytes | None]], *, device: torch.device) -> dict[Any, Any]:
    """Return what `encode` was given, with tensors on the device if they were on one."""
    return {key: _Decoder(device)(node) if pickled is None else pickle.loads(pickled) for key, node, pickled in sent}


class _Pickler(pickle.Pickler):
    """Refuses tensors: one of a GPU would come out on the sender's."""

    def persistent_id(self, value: Any) -> None:
        if isinstance(value, torch.Tensor | nn.Module):
            raise pickle.PicklingError


def _pickled(value: Any) -> bytes | None:
    """Return a value pickled; None if it cannot be, or holds a tensor or a module."""
    file = io.BytesIO()
    try:
        _Pickler(file).dump(value)
    except Exception:  # whatever a class's own reduction raises
        return None
    return file.getvalue()


def _on_cpu(node: Any) -> Any:
    if isinstance(node, tuple | list):
        return type(node)(map(_on_cpu, node))
    return node.cpu() if isinstance(node, torch.Tensor) else node


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _plain(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    storages = _Storages(module)
    for path, holder in holders(module).items():
        for name, value in attributes_of(holder):
            if type(value) in SCALARS or _is_plain(value, storages):
                yield path, name, value


class _Storages:
    """Whether a tensor shares its memory with a parameter or a buffer; they are looked up when first asked for."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.pointers: set[int] | None = None

    def __contains__(self, tensor: Any) -> bool:
        if self.pointers is None:
            weights = [*self.module.parameters(), *self.module.buffers()]
            self.pointers = {_pointer(weight) for weight in weights} - {0}
        return _pointer(tensor) in self.pointers


def _pointer(tensor: torch.Tensor) -> int:
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _is_plain(value: Any, storages: Container[torch.Tensor], inside: tuple[int, ...] = ()) -> bool:
    kind = type(value)
    if kind in SCALARS:
        return True
    if kind is torch.Tensor:
        return value.layout in (torch.strided, torch.sparse_coo) and not value.is_meta and value not in storages
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biufc" and value.dtype.itemsize <= 8
    if kind is list and SIMPLE.issuperset(map(type, value)):
        return True
    if id(value) in inside:
        return True  # a list that holds itself
    inside = (*inside, id(value))
    if kind in DICTS:
        factory = getattr(value, "default_factory", None)
        if factory is not None and FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
            return False
        return all(_is_key(key) and _is_plain(item, storages, inside) for key, item in value.items())
    return kind in SEQUENCES and all(_is_plain(item, storages, inside) for item in value)


def _is_key(key: Any) -> bool:
    return type(key) in SCALARS or (type(key) is tuple and all(map(_is_key, key)))


class _Encoder:
    """Turns plain values into scalars, tensors, tuples and lists. What comes a second time is named by its number."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind is complex:
            return "complex", value.real, value.imag
        if kind in SCALARS:
            return value
        if kind not in (tuple, frozenset):
            if id(value) in self.numbers:
                return "same", self.numbers[id(value)]
            self.numbers[id(value)] = len(self.numbers)
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
            return kind.__name__, items, factory.__name__ if factory else None
        simple = kind is list and SIMPLE.issuperset(map(type, value))
        items = list(value) if simple else [self(item) for item in value]
        return (kind.__name__, items, value.maxlen) if kind is deque else (kind.__name__, items)


class _Decoder:
    """Turns them back; each number is the same object again."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.made = device, list[Any]()

    def __call__(self, node: Any, current: Any = None) -> Any:
        """Return the value; `current` itself, changed, where it is a tensor that an optimizer may hold."""
        if not isinstance(node, tuple):
            return node
        kind, content, *more = node
        if kind == "complex":
            return complex(content, *more)
        if kind == "same":
            return self.made[content]
        if kind == "tensor":
            return self._noted(self._tensor(content, current, *more))
        if kind == "array":
            return self._noted(content.numpy().astype(more[1]).reshape(more[0]))
        if kind == "number":
            return self._noted(content.numpy().astype(more[0])[0])
        made: Any = defaultdict(FACTORIES.get(more[0])) if kind == "defaultdict" else None
        if CONTAINERS[kind] in DICTS:
            made = self._noted(CONTAINERS[kind]() if made is None else made)
            for key, item in content:
                made[self(key)] = self(item)
            return made
        if kind in ("tuple", "frozenset"):
            return CONTAINERS[kind](self(item) for item in content)
        made = self._noted(deque(maxlen=more[0]) if kind == "deque" else CONTAINERS[kind]())
        now = current if type(current) is type(made) and kind == "list" and len(current) == len(content) else None
        for index, item in enumerate(content):
            decoded = self(item, now[index] if now is not None else None)
            made.add(decoded) if kind == "set" else made.append(decoded)
        return made

    def _noted(self, made: Any) -> Any:
        self.made.append(made)
        return made

    def _tensor(self, saved: torch.Tensor, current: Any, on_cpu: bool, trained: bool) -> torch.Tensor:
        if trained and isinstance(current, torch.Tensor) and current.is_leaf and current.shape == saved.shape:
            with torch.no_grad():
                return current.copy_(saved)
        device = torch.device("cpu") if on_cpu else self.device
        return saved.to(device, copy=True).requires_grad_(trained)


def _is_metric(part: nn.Module) -> bool:
    torchmetrics: Any = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(part, torchmetrics.Metric | torchmetrics.MetricCollection)


def _own_objects(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the path and the object of each instance of the experiment's classes that a value is, or contains."""
    kind = type(value)
    if kind in DICTS or kind in (list, tuple, deque):
        items = value.items() if kind in DICTS else enumerate(value)
        if depth < 3 and not LEAVES.issuperset(map(type, value.values() if kind in DICTS else value)):
            for key, item in items:
                yield from _own_objects(item, f"{path}.{key}", depth + 1)
    elif is_own(kind) and hasattr(value, "__dict__"):
        yield path, value


_own_classes: dict[type[Any], bool] = {}


def is_own(kind: type[Any]) -> bool:
    """Return whether a class and all that it derives from are the experiment's, or just hold what one gives them."""
    if kind in BAGS:
        return True
    if kind not in _own_classes:
        bases = [base for base in kind.__mro__ if base.__module__ not in ("builtins", "abc", "typing")]
        builtin = [base for base in kind.__mro__ if base.__module__ == "builtins" and base is not object]
        _own_classes[kind] = bool(bases) and not builtin and all(map(is_experiments, bases))
    return _own_classes[kind]


def is_experiments(kind: type[Any]) -> bool:
    """Return whether a class is defined in the experiment's code, and not in a library."""
    return is_experiments_module(kind.__module__)


@functools.cache
def is_experiments_module(name: str) -> bool:
    """Return whether a module is the experiment's code."""
    if name.partition(".")[0] == "labtrain":
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return name == "__main__"
    path = Path(file)
    return not ({"site-packages", "dist-packages"} & set(path.parts) or any(map(path.is_relative_to, LIBRARIES)))


def _stateful(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if id(value) in seen or kind in SCALARS or isinstance(value, nn.Module | type | types.FunctionType):
        return
    seen.add(id(value))
    if isinstance(value, (*RANDOM, io.IOBase)) or hasattr(kind, "__next__"):
        yield path, value
    elif isinstance(value, dict) and (kind in DICTS or not _derived_by_experiment(kind)):
        for key, item in value.items():
            yield from _stateful(item, f"{path}[{key!r}]", seen)
    elif kind in SEQUENCES:
        for index, item in enumerate(value):
            yield from _stateful(item, f"{path}[{index}]", seen)
    elif _derived_by_experiment(kind) or (is_own(kind) and not hasattr(value, "__dict__")):
        yield path, value


def _derived_by_experiment(kind: type[Any]) -> bool:
    """Return whether a class of the experiment is a list, dict, set or deque with something of its own."""
    return kind not in (*DICTS, *SEQUENCES) and issubclass(kind, list | dict | set | deque) and is_experiments(kind)
