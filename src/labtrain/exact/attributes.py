"""Finds a model's plain attributes: the state that its code keeps beside parameters and buffers.

torch and Lightning do not save a counter in `training_step`, a list of losses, or averaged weights outside of buffers.
labtrain looks for them in the model, in its submodules, and in the objects of the experiment's classes that these hold:
`self.average.decay` as well as `self.steps`. plain_values.py defines which values are plain.

It skips attributes of torch, Lightning and torchmetrics, tensors that share memory with a parameter or a buffer, and
other values, such as a function, a dataset or a logger.
"""

import io
import random
import sys
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from labtrain.exact.plain_values import (
    DICTS,
    LEAVES,
    SCALARS,
    SEQUENCES,
    SIMPLE,
    Decoder,
    Encoder,
    is_experiments,
    is_own,
    is_plain,
)
from labtrain.record.digests import digest_tree

# The attributes of a new module are torch's; the others are Lightning's.
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
MOST_OBJECTS = 10_000  # to search for hidden weights
NO_WEIGHTS = ("hydra", "lightning", "logging", "omegaconf", "threading", "torch", "torchmetrics")
RANDOM = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random, torch.Generator)

Snapshot = dict[
    str, dict[str, object]
]  # of the holder's path, the attributes' names: their values as `Encoder` has them


def holders(module: nn.Module) -> dict[str, object]:
    """Return objects that may hold plain attributes, by dotted path: model, submodules, the experiment's objects."""
    found: dict[str, object] = {}
    for path, part in module.named_modules():
        if type(part).__module__.partition(".")[0] != "torchmetrics" and not _is_metric(part):
            found[path] = part
    seen = {id(part) for part in module.modules()}
    waiting = list(found.items())
    while waiting:
        path, holder = waiting.pop(0)
        for name, value in attributes_of(holder):
            for inner, item in own_objects(value, f"{path}.{name}" if path else name):
                if id(item) not in seen:
                    seen.add(id(item))
                    found[inner] = item
                    waiting.append((inner, item))
    return found


def attributes_of(holder: object) -> list[tuple[str, Any]]:
    """Return (name, value) of each attribute of an object that is not torch's or Lightning's own."""
    private = PRIVATE if isinstance(holder, nn.Module) else frozenset()
    return [(name, value) for name, value in vars(holder).items() if name not in private]


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """Return the plain attributes of a model by dotted name, not copied: a list is the model's own."""
    return {_joined(path, name): value for path, name, value in _plain(module)}


def kept_by(module: nn.Module) -> list[tuple[object, str]]:
    """Return the holder and the name of each plain attribute."""
    found = holders(module)
    return [(found[path], name) for path, name, _ in _plain(module)]


def fingerprints(module: nn.Module) -> dict[str, str]:
    """Return a digest of each plain attribute, by dotted name: it changes with the attribute."""
    return {_joined(path, name): fingerprint(value) or "" for path, name, value in _plain(module)}


def snapshot(module: nn.Module, *, unlike: dict[str, str] | None = None) -> Snapshot:
    """Return the plain attributes as tensors and plain values, which a checkpoint can hold.

    The tensors are the model's own, detached: copy them before the next step.

    Args:
        module: the model.
        unlike: fingerprints; an attribute that still has its fingerprint is left out.
    """
    encode, found = Encoder(), Snapshot()
    for path, name, value in _plain(module):
        if unlike is None or unlike.get(_joined(path, name)) != fingerprint(value):
            found.setdefault(path, {})[name] = encode(value)
    return found


def restore(module: nn.Module, saved: Snapshot, *, device: torch.device) -> list[str]:
    """Set the attributes of a snapshot. Objects that two of them shared are shared again.

    Args:
        module: the model, or another of its class.
        saved: from `snapshot`.
        device: the training's; a tensor goes there if it was on an accelerator.

    Returns:
        the dotted names of attributes whose object this model lacks: it was made during the training.
    """
    decode, now, missing = Decoder(device), holders(module), list[str]()
    for path, values in saved.items():
        for name, value in values.items():  # decode all, since a later one may be the same object
            holder = now.get(path)
            current = vars(holder).get(name) if holder is not None else None
            decoded = decode(value, current)
            if holder is None:
                missing.append(_joined(path, name))
            elif decoded is not current:
                vars(holder)[name] = decoded
    return missing


def hidden_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that a model hides from torch, by name.

    A network in a list or in an object that is not a module, such as a teacher that the optimizer must not find; and
    tensors in objects of libraries, such as averaged weights.
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


def _has_no_weights(value: object) -> bool:
    kind = type(value)
    code = isinstance(value, type | types.ModuleType) or hasattr(value, "__get__")
    return code or is_own(kind) or kind.__module__.partition(".")[0] in NO_WEIGHTS


def unkept(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield the dotted name and the value of each attribute with a state that no checkpoint can hold.

    Generators of random numbers, iterators, open files, and objects of the experiment's classes whose state is not in
    attributes. Other objects of libraries are not checked.
    """
    storages = _Storages(module)
    for path, holder in holders(module).items():
        for name, value in attributes_of(holder):
            if not is_plain(value, storages):
                yield from _stateful(value, _joined(path, name), set())


def fingerprint(value: Any) -> str | None:
    """Return a text that identifies a value; for a scalar its own text, since a model has thousands.

    The attributes identify an object of the experiment. None if the value is not plain.
    """
    kind = type(value)
    if kind in SCALARS:
        return f"{kind.__name__} {value!r}"
    if not is_plain(value, objects=True):
        return None
    if kind is list and SIMPLE.issuperset(map(type, value)):  # losses of a million steps
        return f"list {xxhash.xxh3_128_hexdigest(repr(value).encode(errors='surrogateescape'))}"
    return digest_tree(Encoder()(value), algorithm=xxhash.xxh3_128)


def items_of_lists(value: Any, depth: int = 0) -> int:
    """Return the number of items in a list, and in the lists inside of it, or of a dict or tuple; three levels deep."""
    kind = type(value)
    if kind is list and SIMPLE.issuperset(map(type, value)):
        return len(value)
    if depth < 3 and (kind in DICTS or kind in (list, tuple)):
        inner = sum(items_of_lists(item, depth + 1) for item in (value.values() if kind in DICTS else value))
        return inner + (len(value) if kind is list else 0)
    return 0


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _plain(module: nn.Module) -> Iterator[tuple[str, str, object]]:
    storages = _Storages(module)
    for path, holder in holders(module).items():
        for name, value in attributes_of(holder):
            if type(value) in SCALARS or is_plain(value, storages):
                yield path, name, value


class _Storages:
    """Tells whether a tensor shares its memory with a parameter or a buffer; looks them up at the first use."""

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


def _is_metric(part: nn.Module) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(part, torchmetrics.Metric | torchmetrics.MetricCollection)


def own_objects(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield the path and the object of each instance of the experiment's classes that a value is, or contains."""
    kind = type(value)
    if kind in DICTS or kind in (list, tuple, deque):
        items = value.items() if kind in DICTS else enumerate(value)
        if depth < 3 and not LEAVES.issuperset(map(type, value.values() if kind in DICTS else value)):
            for key, item in items:
                yield from own_objects(item, f"{path}.{key}", depth + 1)
    elif is_own(kind) and hasattr(value, "__dict__"):
        yield path, value


def _stateful(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, object]]:
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


def _derived_by_experiment(kind: type[object]) -> bool:
    """Return whether a class of the experiment extends a list, dict, set or deque."""
    return kind not in (*DICTS, *SEQUENCES) and issubclass(kind, list | dict | set | deque) and is_experiments(kind)
