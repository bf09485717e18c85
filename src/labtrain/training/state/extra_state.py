"""Saves the state of a model that no state dict holds.

========================== ===========================================================================================
saved                      because
========================== ===========================================================================================
`requires_grad`            code that unfreezes a backbone in epoch 5 does not do it again in a process of epoch 9
modes, `part.training`     the same, for modules in evaluation mode
buffers, persistent=False  a schedule or a moving average may lie in one; also those of a callback's averaged model
plain attributes           a counter, a list of losses: attributes.py
weights in lists           a teacher that the optimizer must not find; and weights in objects of libraries
accumulated gradients      with manual optimization, or an own `optimizer_zero_grad`, they may belong to steps that the
                           optimizer has not made yet
========================== ===========================================================================================

A checkpoint holds what differs from the model at the start of the training, before its first hook: `on_fit_start`. So
values that describe where a process runs, such as a path or a number of devices, belong to each process.
"""

import time
import types
from collections.abc import Iterator
from functools import partial
from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.tensor import DTensor

from labtrain.base.console import full_name
from labtrain.base.contracts import Options, State
from labtrain.base.errors import ConfigError
from labtrain.exact.attributes import (
    Snapshot,
    fingerprints,
    hidden_weights,
    holders,
    kept_by,
    restore,
    snapshot,
    unkept,
)
from labtrain.exact.checksums import two_sums
from labtrain.exact.plain_values import SCALARS, is_experiments
from labtrain.training.lightning import trainer_of
from labtrain.training.state.optimizers import optimizers_of, wrappers_of
from labtrain.training.state.snapshots import Look, look, unlike

CLOCKS = (time.time, time.monotonic, time.perf_counter)
NUMBERS_AND_TEXTS = {kind.__name__ for kind in SCALARS}
BEGUN_S = [clock() for clock in CLOCKS]
CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial)


class Unsaved:
    """Remembers a model's first state; made in each process before the first hook of the training.

    Args:
        module: the model.
        looks: whether to check everything reachable, to name state that is not saved.
    """

    def __init__(self, module: pl.LightningModule, *, looks: bool) -> None:
        self.module = module
        self.lost: set[str] = set()  # names of changed state that is not saved
        # Attributes whose first value differs in this process; the saved value wins.
        self.overruled: dict[str, str] = {}
        self.first_look = self._look() if looks else None
        self.trainable = _trainable(module)
        self.modes = _modes(module)
        self.buffers = {name: _sums(buffer) for name, buffer in _hidden_buffers(module)}
        self.weights = {name: _sums(tensor) for name, tensor in hidden_weights(module).items()}
        self.attributes = fingerprints(module)
        self.holders: set[str] | None = None

    def state(self) -> State:
        """Return what to save, as tensors and plain values, without empty keys.

        The tensors are the model's own: copy them before the next step.
        """
        found: State = {
            "trainable": _unlike(_trainable(self.module), self.trainable),
            "modes": _unlike(_modes(self.module), self.modes),
            "hidden_buffers": {
                name: None if buffer is None else buffer.detach()
                for name, buffer in _hidden_buffers(self.module)
                if name not in self.buffers or self.buffers[name] != _sums(buffer)
            },
            "hidden_weights": {
                name: tensor.detach()
                for name, tensor in hidden_weights(self.module).items()
                if self.weights.get(name) != _sums(tensor)
            },
            "attributes": (attributes := snapshot(self.module, unlike=self.attributes)),
            "began": {name: text for name in _names(attributes) if (text := self.attributes.get(name, ""))},
            "gradients": {
                name: _local(parameter.grad)
                for name, parameter in self.module.named_parameters()
                if parameter.grad is not None
            }
            if gradients_wait(self.module)
            else {},
        }
        return {key: values for key, values in found.items() if values}

    def begin(self) -> None:
        """Record which objects with attributes exist before the first step of this process."""
        if self.holders is None:
            self.holders = set(holders(self.module))
            if self.first_look is not None and (now := self._look()) is not None:
                self.first_look = now | self.first_look  # add what the first hooks made: a new process makes it too

    def restore(self, kept: State, *, device: torch.device, entering: bool) -> None:
        """Restore what `state` returned.

        Args:
            kept: from this model, by this process or an earlier one.
            device: the training's.
            entering: the next step follows: restore gradients too; all objects must exist.

        Raises:
            ConfigError: an attribute belongs to an object that this process does not have.
        """
        parameters, modules = dict(self.module.named_parameters()), _modules(self.module)
        for name, flag in kept.get("trainable", {}).items():
            if name in parameters:
                parameters[name].requires_grad_(flag)
        for name, flag in kept.get("modes", {}).items():
            if name in modules:
                modules[name].training = flag
        for name, saved in kept.get("hidden_buffers", {}).items():
            _put_buffer(modules, name, saved, device)
        weights = hidden_weights(self.module)
        for name, saved in kept.get("hidden_weights", {}).items():
            if name in weights and weights[name].shape == saved.shape:
                with torch.no_grad():
                    weights[name].copy_(saved)
        began = kept.get("began", {})
        self.overruled = {
            name: now.partition(" ")[2] if now.partition(" ")[0] in NUMBERS_AND_TEXTS else "another value"
            for name, now in self.attributes.items()
            if began.get(name, now) != now and not _is_time(now)
        }
        missing = [name for name in kept.get("hidden_weights", {}) if name not in weights]
        missing += restore(self.module, kept.get("attributes", {}), device=device)
        if missing and entering:
            raise ConfigError(
                f"{missing[0]} cannot be restored: its object is made during the training,"
                " and this process does not have it yet",
                hint="make it in __init__ or setup of the model; or resume=never",
            )
        for name, saved in kept.get("gradients", {}).items() if entering else ():
            parameter = parameters[name]
            gradient = saved.to(_local(parameter).device, copy=True)
            parameter.grad = (
                DTensor(gradient, parameter._spec, requires_grad=False) if isinstance(parameter, DTensor) else gradient
            )

    def newly_lost(self) -> list[str]:
        """Return the names of what has changed since the training began and is not saved; each name once."""
        now = self._look() if self.first_look is not None else None
        if self.first_look is None or now is None:
            return []
        found = sorted(set(unlike(self.first_look, now)) - self.lost)
        self.first_look = now | self.first_look
        self.lost |= set(found)
        return found

    def _look(self) -> Look | None:
        trainer = self.module.trainer
        known: list[object] = [*optimizers_of(trainer).values(), *wrappers_of(trainer).values()]  # trainer_state.py
        known += [each.scheduler for each in trainer.lr_scheduler_configs]
        beside: Options = {}
        for each in cast(list[pl.Callback], trainer.callbacks):  # type: ignore[attr-defined]
            if is_experiments(type(each)) and not is_overridden("state_dict", each):
                name = type(each).__name__
                beside[f"{name}#{len(beside)}" if name in beside else name] = each  # two callbacks may have one class
        # torch does not save a scheduler's functions, nor the state in them.
        for number, config in enumerate(trainer.lr_scheduler_configs):
            functions = {key: _functions(value) for key, value in vars(config.scheduler).items()}
            name = type(config.scheduler).__name__
            beside[f"{name}#{number}" if name in beside else name] = {
                key: each for key, each in functions.items() if each
            }
        return look(
            self.module,
            beside=beside,
            known=[*known, *hidden_weights(self.module).values()],
            kept=kept_by(self.module),
        )

    def new_objects(self) -> list[str]:
        """Return the names of objects with attributes that were made during the training."""
        return sorted(set(holders(self.module)) - self.holders) if self.holders is not None else []

    def unkept(self) -> Iterator[str]:
        """Yield a warning for each attribute whose state no checkpoint can hold."""
        for name, value in unkept(self.module):
            yield (
                f"{name} is a {full_name(type(value))}: no checkpoint holds its state, so a resumed"
                " training starts with a new one (save and load it in on_save_checkpoint and on_load_checkpoint)"
            )


def _names(attributes: Snapshot) -> list[str]:
    return [f"{path}.{name}" if path else name for path, found in attributes.items() for name in found]


def _is_time(text: str) -> bool:
    """Return whether the fingerprint of a number is a clock's reading in this process."""
    kind, _, number = text.partition(" ")
    spans_s = zip(BEGUN_S, (clock() for clock in CLOCKS), strict=True)
    return kind == "float" and any(begun_s <= float(number) <= now_s for begun_s, now_s in spans_s)


def _functions(value: object) -> list[object]:
    """Return the functions of a scheduler's attribute: a rate's lambdas."""
    return [each for each in (value if type(value) is list else [value]) if isinstance(each, CODE)]


def gradients_wait(module: pl.LightningModule) -> bool:
    """Return whether gradients may stay from one step to the next: by default Lightning clears them."""
    return not module.automatic_optimization or is_overridden("optimizer_zero_grad", module)


def _trainable(module: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def _modes(module: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in module.named_modules()}


def _unlike(now: dict[str, bool], before: dict[str, bool]) -> dict[str, bool]:
    return {name: flag for name, flag in now.items() if before.get(name) is not flag}


def _modules(module: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a model, and of modules that callbacks have, such as an averaged model, by name."""
    found = dict(module.named_modules())
    trainer = trainer_of(module)
    for callback in trainer.callbacks if trainer is not None else ():  # type: ignore[attr-defined]
        for name, value in vars(callback).items():
            if isinstance(value, nn.Module) and value is not module:
                prefix = f"{type(callback).__name__}.{name}"
                while prefix in found:  # two callbacks of one class
                    prefix += "'"
                found |= dict(value.named_modules(prefix=prefix))
    return found


def _hidden_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the buffers that are in no state dict, by name."""
    for path, part in _modules(module).items():
        for name in sorted(part._non_persistent_buffers_set):
            yield f"{path}.{name}" if path else name, part._buffers.get(name)


def _sums(buffer: torch.Tensor | None) -> tuple[object, ...]:
    """Return numbers that identify a tensor."""
    if buffer is None:
        return ()
    return tuple(buffer.shape), buffer.dtype, *two_sums([(0, buffer)]).tolist()


def _put_buffer(modules: dict[str, nn.Module], name: str, saved: torch.Tensor | None, device: torch.device) -> None:
    path, _, last = name.rpartition(".")
    if path not in modules:
        return
    now = modules[path]._buffers.get(last)
    if saved is None or now is None or now.shape != saved.shape or now.dtype != saved.dtype or now.is_sparse:
        moved = None if saved is None else saved.to(device if now is None else now.device, copy=True)
        modules[path].register_buffer(last, moved, persistent=False)
    else:
        with torch.no_grad():
            now.copy_(saved)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or this rank's part of one that is spread over the ranks."""
    found: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found.detach()
