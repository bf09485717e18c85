"""Finds state that a step or a training changes, and that neither a watcher nor a checkpoint sees.

step_changes.py restores plain attributes, buffers and weights before each shard, and extra_state.py saves them. But
code may also count in closures, globals and class attributes, draw from its own generators, and step an optimizer that
Lightning does not know. `look` takes a fingerprint of all that a model can reach; two looks show the changes.
"""

import array
import logging
import random
import re
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
import xxhash
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from labtrain.exact.attributes import PRIVATE, RANDOM, fingerprint
from labtrain.exact.plain_values import SCALARS, SIMPLE
from labtrain.record.digests import tensor_bytes
from labtrain.training.state.object_graph import label, reach

Values = TypeVar("Values", Tensor, np.ndarray)

MOST_OBJECTS = 300_000
MOST_BYTES, PIECES = 1 << 24, 1 << 10  # hash at most MOST_BYTES of a tensor or array, sampled in PIECES parts
# Private attributes of a module to compare; its other private attributes belong to torch and Lightning.
LOOKED_INTO = {"_parameters", "_buffers", "_modules", "_hparams", "_forward_hooks", "_forward_pre_hooks"}
NOT_LOOKED_INTO = (
    pl.Trainer, Strategy, Logger, logging.Logger, torch.utils.data.Dataset, torch.utils.data.DataLoader,
    pl.LightningDataModule,
)  # fmt: skip
# Objects of these libraries change for other reasons, or hold nothing that the training depends on.
NO_STATE = re.compile(
    r"(hydra|lightning|logging|matplotlib|queue|rich|tensorboard|tqdm|wandb|wrapt)(\.|_|$)"
    r"|torch\.(_|(amp|cuda|distributed|fx|jit|profiler|utils\.tensorboard)(\.|$))"
)
# Caches that fill at the first use.
CACHES = {"_flags_cache", "_value2member_map_", "_clear_cache"}
STATE = (nn.Module, torch.Generator, Tensor, dict, list)

Look = dict[str, object]  # by path: a fingerprint; for a list of numbers and texts its items; for a dict its keys


def look(
    module: nn.Module,
    *,
    beside: Mapping[str, object] | None = None,
    known: Iterable[object] = (),
    kept: Iterable[tuple[object, str]] = (),
) -> Look | None:
    """Return a fingerprint of everything that a model and its code can reach, by path; None if it is too much.

    Args:
        module: the model. The content of its parameters and buffers is left out.
        beside: other objects, by name; their non-integer numbers are left out: mostly times.
        known: objects that are left out, such as the training's optimizers.
        kept: attributes that are left out: their holder and name.
    """
    weights = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    parts = {id(part) for part in module.modules()}
    found: Look = {}
    for path, value, _ in reach({"": module, **(beside or {})}, _entrance(module, beside or {}, known, kept)):
        if id(value) in parts or id(value) in weights:
            found[path] = type(value).__qualname__
            continue
        for part, text in _prints(path, value):
            while part in found:
                part += "'"
            found[part] = text
        if len(found) > MOST_OBJECTS:
            return None
    return found


def _entrance(
    module: nn.Module, beside: Mapping[str, object], known: Iterable[object], kept: Iterable[tuple[object, str]]
) -> Callable[[object, object, object], bool]:
    """Return a function that decides whether `look` enters the value that a holder has under a name."""
    left_out = {id(each) for each in known}
    left_out |= {id(part) for part in module.modules() if isinstance(part, Metric | MetricCollection)}
    attributes, others = {(id(holder), name) for holder, name in kept}, set(map(id, beside.values()))

    def enter(holder: object, name: object, value: object) -> bool:
        if id(value) in left_out or isinstance(value, NOT_LOOKED_INTO):
            return False
        if attributes and type(name) is str and (id(holder), name) in attributes:
            return False
        if isinstance(holder, nn.Module) and name in PRIVATE:
            return name in LOOKED_INTO
        if isinstance(holder, Tensor) and str(name).startswith("_"):  # a DTensor's local part
            return False
        if (type(name) is str and name in CACHES) or (type(value) is float and id(holder) in others):
            return False
        return isinstance(value, STATE) or NO_STATE.match(type(value).__module__) is None

    return enter


def unlike(then: Look, now: Look) -> list[str]:
    """Return the names of what changed between two looks. Containers that only grew, and new objects, do not count."""
    found = [path for path in then if path in now and not _is_same(then[path], now[path])]
    names = dict.fromkeys(re.sub(r"(^|\.)_(modules|parameters|buffers)\.", r"\1", path).rstrip("' ") for path in found)
    return [
        name.replace("_hparams.", "hparams.")
        for name in names
        if not any(name.startswith(f"{each}.") for each in names)
    ]


def _is_same(then: object, now: object) -> bool:
    if isinstance(then, tuple) and isinstance(now, tuple):
        now = now[: len(then)]
    if isinstance(then, frozenset) and isinstance(now, frozenset):
        return then <= now
    return bool(then == now)


def _prints(path: str, value: object) -> Iterator[tuple[str, object]]:
    kind = type(value)
    if kind in SCALARS:
        yield path, repr(value)
    elif isinstance(value, Tensor):
        yield path, _of_tensor(value)
    elif isinstance(value, np.ndarray | bytearray | array.array):
        yield path, _of_array(value if isinstance(value, np.ndarray) else np.frombuffer(value, np.uint8))
    elif isinstance(value, RANDOM):
        yield path, of_generator(value)
    elif isinstance(value, dict):
        yield path, len(value) if path.endswith("_hooks") else frozenset(map(label, value))
    elif isinstance(value, list | tuple | deque):
        simple = isinstance(value, list) and SIMPLE.issuperset(map(type, value))
        yield path, tuple(value) if simple else kind.__qualname__
    elif isinstance(value, set | frozenset):
        yield path, repr(sorted(f"{label(item)}" for item in value))
    elif isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodDescriptorType | type):
        yield path, f"{value.__module__ if hasattr(value, '__module__') else ''}.{value.__qualname__}"
    elif isinstance(value, types.GeneratorType):
        yield path, str(value.gi_frame.f_lasti if value.gi_frame else None)
    elif hasattr(value, "__dict__") or hasattr(value, "__slots__"):
        yield path, kind.__qualname__
    else:
        yield path, fingerprint(value) or kind.__qualname__


def _of_tensor(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_meta:
        return str(tensor.shape)
    pieces = [tensor_bytes(piece) for piece in _pieces(tensor.detach())]
    return f"{tensor.dtype} {tuple(tensor.shape)} {_hash(pieces)}"


def _of_array(values: np.ndarray) -> str:
    if values.dtype.hasobject:
        return str(fingerprint(values.tolist()))
    return f"{values.dtype} {values.shape} {_hash([piece.tobytes() for piece in _pieces(values)])}"


def _pieces(values: Values) -> list[Values]:
    """Return the parts of a tensor or an array that are hashed: all of it, or parts at even distances."""
    if values.nbytes <= MOST_BYTES:
        return [values]
    flat = values.reshape(-1)
    length = MOST_BYTES // PIECES // (values.nbytes // len(flat))
    return [flat[at : at + length] for at in range(0, len(flat), -(-len(flat) // PIECES))]


def _hash(pieces: Iterable[bytes | memoryview]) -> str:
    state = xxhash.xxh3_128()
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()


def of_generator(generator: object) -> str:
    """Return a text that identifies the state of a generator of random numbers."""
    if isinstance(generator, torch.Generator):
        return _of_tensor(generator.get_state())
    if isinstance(generator, random.Random):
        state: object = generator.getstate()
    elif isinstance(generator, np.random.RandomState):
        state = [part.tolist() if isinstance(part, np.ndarray) else part for part in generator.get_state(legacy=True)]
    else:
        bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
        assert isinstance(bits, np.random.BitGenerator)
        state = bits.state
    return _hash([repr(state).encode()])
