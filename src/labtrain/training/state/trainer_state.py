"""Saves what code changes outside of the model during the training.

================= ====================================================================================================
the Trainer       numbers and texts: `accumulate_grad_batches`, `gradient_clip_val`, `max_epochs`
the data module   plain attributes, like the model's (attributes.py); not those over one MiB
its datasets      numbers and texts, such as the difficulty of a curriculum, except counters of loads; what a
                  TensorDataset holds, up to one MiB
optimizers        plain attributes of any size; of torch's own optimizers, attributes that code has set
those they hold   the state too, as their `state_dict` has it, unless the Trainer saves it: SAM's base optimizer; and
                  optimizers that are attributes of the model
================= ====================================================================================================

A checkpoint holds only values that differ from the start of the training. So values from the configuration or the
machine belong to each process. A warning names what changed and cannot be saved.
"""

import copy
from collections.abc import Iterator

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import Dataset, TensorDataset

from labtrain.base.contracts import State
from labtrain.base.errors import ConfigError
from labtrain.checkpoints.structure import first_of_another_kind
from labtrain.data.combined import parts_of
from labtrain.exact.attributes import (
    RANDOM,
    attributes_of,
    fingerprints,
    plain_attributes,
    restore,
    snapshot,
)
from labtrain.exact.plain_values import SCALARS, is_experiments, is_own
from labtrain.training.lightning import train_loaders
from labtrain.training.state.optimizers import (
    TORCHS,
    held_values,
    in_place,
    inner_of,
    optimizers_of,
    shares_groups,
    wrappers_of,
)
from labtrain.training.state.snapshots import of_generator

KEY = "outside"  # in the checkpoint's resume point
MOST_BYTES = 2**20
LOOPS = {"max_epochs": "fit_loop", "min_epochs": "fit_loop", "max_steps": "epoch_loop", "min_steps": "epoch_loop"}
BY_ITSELF = frozenset({"should_stop"})  # Lightning itself changes these
INNER = "optimizers"  # in the saved state: those that the Trainer does not save


class Outside:
    """Remembers the state at the start of a training; made in each process after its loaders.

    Args:
        trainer: of the training.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self.settings = _settings(trainer)
        self.parts = {name: fingerprints(_shell(part, trainer)) for name, part in _parts(trainer)}
        self.marks = dict(_marks(trainer))

    def state(self) -> State:
        """Return what to save, without empty keys; the tensors are the training's own."""
        before = self.settings
        found: State = {
            name: snapshot(_shell(part, self.trainer), unlike=self.parts[name])
            for name, part in _parts(self.trainer)
            if name in self.parts
        }
        now = _settings(self.trainer)
        found["trainer"] = {name: value for name, value in now.items() if name not in before or before[name] != value}
        found[INNER] = {
            name: optimizer.state_dict()
            for name, optimizer in _unsaved(self.trainer)
            if name in self.parts and not _is_spread(optimizer)
        }
        return {name: values for name, values in found.items() if values}

    def restore(self, kept: State, *, entering: bool) -> None:
        """Restore what `state` returned.

        Args:
            kept: from this training, by this process or an earlier one.
            entering: the next step follows: all objects must exist.

        Raises:
            ConfigError: an attribute belongs to an object that this process does not have.
            ValueError: a saved setting of the Trainer has another type.
        """
        for name, value in kept.get("trainer", {}).items():
            now = getattr(_owner(self.trainer, name), name, None)
            if first_of_another_kind(value, now) is not None:
                raise ValueError(f"trainer.{name} cannot be {value!r}")
            # Before the start, only loop limits: GradientAccumulationScheduler then checks the other settings.
            if entering or name in LOOPS:
                setattr(_owner(self.trainer, name), name, value)
        self._restore_optimizers(kept.get(INNER, {}), entering=entering)
        for label, part in _parts(self.trainer):
            shell = _shell(part, self.trainer)
            missing = restore(shell, kept.get(label, {}), device=self.trainer.strategy.root_device)
            for name in kept.get(label, {}).get("", {}):
                _put(part, name, vars(shell)[name])
            if missing and entering:
                raise ConfigError(
                    f"{label}.{missing[0]} cannot be restored: its object is made during the"
                    " training, and this process does not have it yet",
                    hint="make it in __init__ or setup; or resume=never",
                )

    def _restore_optimizers(self, kept: State, *, entering: bool) -> None:
        optimizers = optimizers_of(self.trainer)
        missing = [name for name in kept if name not in optimizers]
        if missing and entering:
            raise ConfigError(
                f"the state of {missing[0]} cannot be restored: this optimizer is made during the training, and this"
                " process does not have it yet",
                hint="make it in configure_optimizers, or in __init__ or setup of the model; or resume=never",
            )
        with in_place(optimizers):
            for name, state in kept.items():
                if (optimizer := optimizers.get(name)) is not None:
                    state = copy.deepcopy(state)  # a load takes the tensors that it is given
                    if shares_groups(optimizer, self.trainer):  # which Lightning has loaded, with changed options
                        state["param_groups"] = optimizer.state_dict()["param_groups"]
                    optimizer.load_state_dict(state)

    def unkept(self) -> Iterator[str]:
        """Yield a warning for each attribute that has changed and that no checkpoint holds."""
        for name, mark in _marks(self.trainer):
            if mark != self.marks.get(name, mark):
                yield (
                    f"{name} was changed during the training, and no checkpoint holds it: a resumed training has"
                    " the initial value (save it in the state_dict of the data module or optimizer)"
                )
        for loader in train_loaders(self.trainer):
            if self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                break
            for each in parts_of(loader):
                yield from each.changed()
        for name, optimizer in _unsaved(self.trainer):
            if name not in self.parts or _is_spread(optimizer):
                yield (
                    f"no checkpoint holds the state of the optimizer {name}, since it was made during the training or"
                    " its state is spread over the ranks: a resumed training starts with a new one (make it in"
                    " configure_optimizers; or put its state into the state_dict of the optimizer that holds it)"
                )


def _unsaved(trainer: pl.Trainer) -> Iterator[tuple[str, Optimizer]]:
    """Yield each optimizer with a state that is not in those of the Trainer's optimizers, with its name."""
    inner = inner_of(trainer)
    saved = set().union(*(_tensors(each.state_dict()) for each in trainer.optimizers if inner))
    for name, optimizer in inner.items():
        if not ((mine := _tensors(optimizer.state)) and mine <= saved):
            yield name, optimizer


def _is_spread(optimizer: Optimizer) -> bool:
    return any(isinstance(each, DTensor) for each in held_values(optimizer))


def _settings(trainer: pl.Trainer) -> State:
    settings = {
        name: value
        for name, value in vars(trainer).items()
        if type(value) in SCALARS and not name.startswith("_") and name not in BY_ITSELF
    }
    return settings | {name: getattr(_owner(trainer, name), name) for name in LOOPS}


def _owner(trainer: pl.Trainer, name: str) -> object:
    return {"fit_loop": trainer.fit_loop, "epoch_loop": trainer.fit_loop.epoch_loop}.get(LOOPS.get(name, ""), trainer)


def _parts(trainer: pl.Trainer) -> Iterator[tuple[str, object]]:
    """Yield the data module, its datasets, and each optimizer, with their names here."""
    if (data := getattr(trainer, "datamodule", None)) is not None:
        yield "data", data
    for loader in train_loaders(trainer):
        dataset, name = getattr(loader, "dataset", None), "dataset"
        while isinstance(dataset, Dataset) and not hasattr(dataset, "state_dict"):
            if is_experiments(type(dataset)) or type(dataset) is TensorDataset:
                yield name, dataset
            # The dataset in a Subset, or in a user's wrapper.
            dataset, name = getattr(dataset, "dataset", None), f"{name}.dataset"
    yield from optimizers_of(trainer).items()
    yield from wrappers_of(trainer).items()


def _put(part: object, name: str, value: object) -> None:
    """Set an attribute; the tensors of a TensorDataset in place, since other objects may have them too."""
    before = vars(part).get(name)
    if type(part) is TensorDataset and isinstance(value, tuple) and isinstance(before, tuple):
        alike = [(now.shape, now.dtype) == (new.shape, new.dtype) for now, new in zip(before, value, strict=True)]
        if all(alike):
            for now, new in zip(before, value, strict=True):
                now.copy_(new)
            return
    vars(part)[name] = value


def _shell(part: object, trainer: pl.Trainer) -> nn.Module:
    """Return a module with the attributes of another object; without tensors of the model."""
    shell, model = nn.Module(), trainer.lightning_module
    left_out = _counts(trainer) if isinstance(part, Dataset) else ()
    vars(shell).update({name: value for name, value in _own(part) if name not in left_out and _is_kept(part, value)})
    vars(shell).update(parameters=model.parameters, buffers=model.buffers)
    return shell


def _own(part: object) -> list[tuple[str, object]]:
    left_out = TORCHS if isinstance(part, Optimizer) else {"trainer"}
    torchs = type(part).__module__.partition(".")[0] == "torch"
    return [
        (name, value)
        for name, value in vars(part).items()
        if name not in left_out and not (torchs and name.startswith("_"))
    ]


def _is_kept(part: object, value: object) -> bool:
    if isinstance(part, Dataset) and type(part) is not TensorDataset:
        return type(value) in SCALARS
    return isinstance(part, Optimizer) or _size(value) <= MOST_BYTES


def _counts(trainer: pl.Trainer) -> set[str]:
    """Return the names of dataset attributes that count loads: each process has a different number."""
    loaders = train_loaders(trainer)
    return {name.rpartition(".")[2] for loader in loaders for name in getattr(loader, "counts", ())}


def _marks(trainer: pl.Trainer) -> Iterator[tuple[str, object]]:
    """Yield a mark for each attribute that is not saved, by name: it changes with the attribute."""
    for label, part in _parts(trainer):
        if type(part) is TensorDataset and _size(part.tensors) > MOST_BYTES:
            yield f"{label}.tensors", [(each.data_ptr(), each._version) for each in part.tensors]
        if isinstance(part, Dataset):
            continue
        plain = plain_attributes(_shell(part, trainer))
        for name, value in _own(part):
            if name in plain or is_own(type(value)) or callable(value):
                continue
            if isinstance(value, torch.Tensor):
                yield f"{label}.{name}", (value.data_ptr(), value._version, value.shape)
            else:
                yield f"{label}.{name}", of_generator(value) if isinstance(value, RANDOM) else id(value)


def _size(value: object, depth: int = 0) -> int:
    """Return about how many bytes a value holds; 0 unless it is a container or an object of the experiment."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return int(value.nbytes)
    if isinstance(value, str | bytes):
        return len(value)
    if depth > 4:
        return 0
    if isinstance(value, list | tuple | set | frozenset | dict):
        items = list(value.values()) if isinstance(value, dict) else list(value)
        return 8 * len(items) + sum(_size(item, depth + 1) for item in items[: MOST_BYTES // 8])
    return sum(_size(item, depth + 1) for _, item in attributes_of(value)) if is_own(type(value)) else 0


def _tensors(node: object) -> set[int]:
    """Return the addresses of the tensors of a state."""
    if isinstance(node, torch.Tensor):
        return {node.data_ptr()}
    items = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    return set().union(*map(_tensors, items))
