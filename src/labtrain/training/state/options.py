"""Applies changed options of optimizers, schedules and callbacks to a resumed training.

A checkpoint holds the options of its training, and loading it restores them: a new learning rate would be in the
receipt, and the old one in the optimizer. So a checkpoint also holds the first values of optimizers, schedulers and
callbacks. If a first value differs now, the configuration changed it:

================ ======================================================================================================
an option        has the new value, from the first new step on
a schedule       the new scheduler is stepped to the position of the old one, and gives the options from there
by a metric      (ReduceLROnPlateau) keeps its state; its own options, and the optimizer's, have the new values
a callback       EarlyStopping's patience: what only the configuration changed has the new value
================ ======================================================================================================

The result depends only on checkpoint and configuration: to resume again gives the same bits.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import ReduceLROnPlateau

from labtrain.base.console import full_name
from labtrain.base.contracts import State
from labtrain.base.errors import ConfigError
from labtrain.checkpoints.staging import unsavable
from labtrain.record.digests import PLACE, digest_tree
from labtrain.training.state.optimizers import inner_of, shares_groups
from labtrain.training.state.trainer_state import INNER
from labtrain.training.state.trainer_state import KEY as OUTSIDE

Say = Callable[[str], None]

PROBES = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 1000, 3000, 10_000, 30_000, 100_000, 1_000_000)
NOT_OPTIONS = ("params", "param_names")


def beginnings(trainer: pl.Trainer) -> State:
    """Return the first values of optimizers and schedulers, as plain values and tensors."""
    optimizers = [
        {"class": full_name(type(optimizer)), "groups": [_options(group) for group in optimizer.param_groups]}
        for optimizer in trainer.optimizers
    ]
    schedulers = [
        {
            "class": full_name(type(config.scheduler)),
            "interval": config.interval,
            "frequency": config.frequency,
            "optimizer": _optimizer_of(trainer, config.scheduler),
            "state": _savable(config.scheduler.state_dict()),
            "probes": _probes(config.scheduler),
        }
        for config in trainer.lr_scheduler_configs
    ]
    inner = {
        name: [_options(group) for group in optimizer.param_groups]
        for name, optimizer in inner_of(trainer).items()
        if not shares_groups(optimizer, trainer)
    }
    return copy.deepcopy({"optimizers": optimizers, "schedulers": schedulers, "inner": inner})


def beginnings_of_callbacks(trainer: pl.Trainer) -> State:
    """Return the states of the callbacks before the training: they may hold options."""
    found: State = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        try:
            state = callback.state_dict()
        except Exception:  # a callback may have no state before setup
            continue
        if options := {key: value for key, value in state.items() if type(value) in (bool, int, float, str)}:
            found[callback.state_key] = options
    return found


def adopt(checkpoint: State, trainer: pl.Trainer, now: State, *, say: Say) -> None:
    """Put the changed options into a checkpoint that was read, before it is loaded.

    Args:
        checkpoint: Lightning's dictionary; is changed.
        trainer: its optimizers and schedulers are new; its schedulers are stepped.
        now: the result of `beginnings`, with that of the callbacks under `callbacks`.
        say: called with each change.

    Raises:
        ConfigError: a state cannot be carried over; nothing has changed.
    """
    before = checkpoint[PLACE].get("initial")
    if before is None or "optimizer_states" not in checkpoint:  # written by an older labtrain
        return
    _adopt_callbacks(checkpoint.get("callbacks", {}), before.get("callbacks", {}), now.get("callbacks", {}), say)
    _adopt_inner(checkpoint[PLACE], before.get("inner", {}), now["inner"], say)
    if _same(
        {key: before[key] for key in ("optimizers", "schedulers")},
        {key: now[key] for key in ("optimizers", "schedulers")},
    ):
        return
    _check_optimizers(checkpoint, before, now)
    entered = _enter_schedules(checkpoint, trainer, before, now)
    step = checkpoint[PLACE]["global_step"]
    for index, (optimizer, saved) in enumerate(zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True)):
        _adopt_options(
            saved["param_groups"],
            [_options(group) for group in optimizer.param_groups],
            before["optimizers"][index]["groups"],
            now["optimizers"][index]["groups"],
            entered=index in entered,
            say=partial(_tell, say, step, type(optimizer).__name__),
        )
    for state, config in zip(checkpoint["lr_schedulers"], trainer.lr_scheduler_configs, strict=True):
        if _by_metric(config) and "_last_lr" in state:
            owner = _optimizer_of(trainer, config.scheduler)
            state["_last_lr"] = [group["lr"] for group in checkpoint["optimizer_states"][owner]["param_groups"]]


def _tell(say: Say, step: int, optimizer: str, text: str) -> None:
    say(f"from step {step} on, {text} ({optimizer})")


def _check_optimizers(checkpoint: State, before: State, now: State) -> None:
    hint = "resume=never, and labtrain.load_weights in the model to start with its weights"
    saved = checkpoint["optimizer_states"]
    if not len(saved) == len(before["optimizers"]) == len(now["optimizers"]):
        raise ConfigError(f"the checkpoint has {len(saved)} optimizers, the model {len(now['optimizers'])}", hint=hint)
    for old, new in zip(before["optimizers"], now["optimizers"], strict=True):
        if old["class"] != new["class"]:
            raise ConfigError(
                f"the checkpoint holds the state of {old['class']}, which does not fit {new['class']}", hint=hint
            )
        if len(old["groups"]) != len(new["groups"]):
            raise ConfigError(
                f"{old['class']} had {len(old['groups'])} groups of parameters, and has {len(new['groups'])} now",
                hint=hint,
            )


def _enter_schedules(checkpoint: State, trainer: pl.Trainer, before: State, now: State) -> set[int]:
    """Step each changed scheduler to the training's position; return the optimizers whose options it gives."""
    at, saved, states = checkpoint[PLACE], checkpoint["lr_schedulers"], []
    # Optimizers of schedulers that no longer exist.
    entered = {old["optimizer"] for old in before["schedulers"][len(now["schedulers"]) :]}
    for index, config in enumerate(trainer.lr_scheduler_configs):
        new = now["schedulers"][index]
        old = before["schedulers"][index] if index < len(before["schedulers"]) else None
        state = saved[index] if index < len(saved) else None
        if old is not None and state is not None and _same(old, new):
            states.append(state)
            continue
        name = type(config.scheduler).__name__
        if old is not None and (state is None or not old["state"].keys() <= state.keys()):
            raise ConfigError(
                f"{name} is changed, but the checkpoint holds another scheduler in its place",
                hint="restore the schedule (for example, StochasticWeightAveraging replaced it); or resume=never",
            )
        if _by_metric(config):
            if old is not None and state is not None and old["class"] == new["class"]:
                states.append({key: _carried(key, state, old["state"], new["state"]) for key in state})
            else:
                states.append(copy.deepcopy(config.scheduler.state_dict()))
            continue
        same_clock = old is not None and all(old[key] == new[key] for key in ("class", "interval", "frequency"))
        if same_clock and state is not None and isinstance(state.get("last_epoch"), int):
            steps = state["last_epoch"]
        else:
            steps = (at["global_step"] if config.interval == "step" else at["epoch"]) // config.frequency
        _step(trainer, config.scheduler, steps)
        entered.add(new["optimizer"])
        states.append(copy.deepcopy(config.scheduler.state_dict()))
    checkpoint["lr_schedulers"] = states
    return entered


def _step(trainer: pl.Trainer, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    name = type(scheduler).__name__
    if is_overridden("lr_scheduler_step", trainer.lightning_module):
        raise ConfigError(
            f"{name} is changed, but the model has its own lr_scheduler_step: labtrain cannot find the schedule's step",
            hint="restore the schedule; or resume=never",
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns about an optimizer that has made no step
            for _ in range(steps):
                scheduler.step()
    except Exception as error:
        raise ConfigError(
            f"the new {name} cannot continue at step {steps}, where the run resumes: {' '.join(str(error).split())}",
            hint="use a longer schedule (trainer.max_epochs, trainer.max_steps); or resume=never",
        ) from error


def _adopt_inner(at: State, before: State, now: State, say: Say) -> None:
    """Set the options of the optimizers that the Trainer does not have."""
    saved: State = at.get(OUTSIDE, {}).get(INNER, {})
    for name in saved.keys() & before.keys() & now.keys():
        tell = partial(_tell, say, at["global_step"], name)
        _adopt_options(saved[name]["param_groups"], now[name], before[name], now[name], entered=False, say=tell)


def _adopt_options(
    saved: list[State],
    entered_at: list[State],
    before: list[State],
    now: list[State],
    *,
    entered: bool,
    say: Say,
) -> None:
    """Set the options of the first groups; a callback may have added more since."""
    told: dict[str, None] = {}
    for group, there, old, new in zip(saved, entered_at, before, now, strict=False):
        for key, value in there.items():
            changed = key not in old or not _same(old[key], new.get(key))
            if entered:
                changed |= not _same(value, new.get(key)) or key not in group or not _same(group[key], old.get(key))
            if changed and not _same(group.get(key), value):
                told[f"{key} is {_shown(value)}, and was {_shown(group.get(key))}"] = None
                group[key] = value
        for key in old.keys() - new.keys() if entered else ():
            group.pop(key, None)
    for text in told:
        say(text)


def _adopt_callbacks(saved: State, before: State, now: State, say: Say) -> None:
    for name, state in saved.items():
        old, new = before.get(name, {}), now.get(name, {})
        for key in old.keys() & new.keys() & state.keys() if isinstance(state, dict) else ():
            carried = _carried(key, state, old, new)
            if not _same(carried, state[key]):
                say(f"{name.partition('{')[0]}: {key} is {carried}, and was {state[key]}")
                state[key] = carried


def _carried(key: str, state: State, before: State, now: State) -> object:
    """Return a state's value; the new one if only the configuration has changed it."""
    if key in before and key in now and not _same(before[key], now[key]) and _same(state[key], before[key]):
        return now[key]
    return state[key]


def _by_metric(config: LRSchedulerConfig) -> bool:
    return bool(config.reduce_on_plateau) or isinstance(config.scheduler, ReduceLROnPlateau)


def _options(group: State) -> State:
    return {key: value for key, value in group.items() if key not in NOT_OPTIONS and not any(unsavable(value))}


def _savable(state: State) -> State:
    return {key: value for key, value in state.items() if not any(unsavable(value))}


def _probes(scheduler: object) -> list[object]:
    """Return the values of a schedule's functions at some steps: a state does not hold functions (LambdaLR)."""
    found: list[object] = []
    for part in [scheduler, *getattr(scheduler, "_schedulers", [])]:
        for function in getattr(part, "lr_lambdas", []):
            for step in PROBES:
                try:
                    found.append(float(function(step)))
                except Exception as error:  # for example a table that ends
                    found.append(type(error).__name__)
                    break
    return found


def _optimizer_of(trainer: pl.Trainer, scheduler: object) -> int:
    owner = getattr(scheduler, "optimizer", None)
    return next((index for index, optimizer in enumerate(trainer.optimizers) if optimizer is owner), 0)


def _same(one: object, other: object) -> bool:
    return digest_tree(one) == digest_tree(other)


def _shown(value: object) -> str:
    return (
        f"{value:.6g}" if isinstance(value, float) else str(value.item() if isinstance(value, torch.Tensor) else value)
    )
