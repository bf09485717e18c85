"""Restores what code changes during a training: the model's tensors, optimizers, and their groups of parameters.

A resumed process has them as the configuration makes them, before it loads the checkpoint:

========================== ===========================================================================================
groups of parameters       are made as saved: for example, a backbone that was unfrozen and added to the optimizer
buffers                    that are new, None or have another shape are made as saved
parameters, other modules  (after pruning) no checkpoint holds the code that made them. The save warns, and the
                           resumed process refuses, unless `on_load_checkpoint` makes them there
another optimizer          the same: it belongs in configure_optimizers
========================== ===========================================================================================

Lightning 2.6: trainer/connectors/checkpoint_connector.py loads the states.
"""

import copy
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from labtrain.base.console import few, full_name, shown
from labtrain.base.contracts import State
from labtrain.base.credentials import as_references
from labtrain.base.errors import ConfigError, LabtrainError, in_words
from labtrain.checkpoints.structure import first_of_another_kind
from labtrain.record.digests import PLACE
from labtrain.record.sources import in_environment
from labtrain.training.lightning import CheckpointConnector, call_module_hook
from labtrain.training.state.optimizers import in_place, optimizers_of

KEY = "made"  # in the checkpoint's resume point: the training's tensors and groups, if they changed
IN_THE_MODEL = (
    "make it in __init__ or setup of the model; or in its on_load_checkpoint too, before the weights are loaded"
)
IN_OPTIMIZERS = "make it in configure_optimizers"
TORCH = Path(torch.__file__).parent
READING = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError)


def made_of(trainer: pl.Trainer) -> State:
    """Return the shapes of the model's tensors by name, and the optimizers' groups by parameter names."""
    module = trainer.lightning_module
    named = dict(module.named_parameters())
    names = {id(parameter): name for name, parameter in named.items()}
    return {
        "parameters": {name: list(parameter.shape) for name, parameter in named.items()},
        "buffers": {name: list(buffer.shape) for name, buffer in _buffers(module)},
        "optimizers": [
            {
                "class": full_name(type(optimizer)),
                "groups": [[names.get(id(each), "") for each in group["params"]] for group in optimizer.param_groups],
            }
            for optimizer in trainer.optimizers
        ],
    }


def lacks(before: State, now: State) -> tuple[str, str] | None:
    """Return what a resumed process would lack of a training, and a hint; None if it lacks nothing.

    Args:
        before: as the configuration makes it.
        now: as it is saved.
    """
    old, new = before["parameters"], now["parameters"]
    modules = {""}
    for name in (*old, *before["buffers"]):
        path = name.rpartition(".")[0]
        while path not in modules:
            modules.add(path)
            path = path.rpartition(".")[0]
    parts = [
        ("new parameters", [name for name in new if name not in old]),
        ("removed", [name for name in old if name not in new]),
        ("changed shape", [name for name in new if name in old and new[name] != old[name]]),
        ("buffers of new modules", [name for name in now["buffers"] if name.rpartition(".")[0] not in modules]),
    ]
    if changed := [f"{what}: {few(names)}" for what, names in parts if names]:
        return f"the model ({'; '.join(changed)})", IN_THE_MODEL
    kinds, others = ([each["class"] for each in made["optimizers"]] for made in (now, before))
    if kinds != others:
        return f"the optimizers ({few(kinds) or 'none'} instead of {few(others) or 'none'})", IN_OPTIMIZERS
    for made, began in zip(now["optimizers"], before["optimizers"], strict=True):
        if made["groups"] != began["groups"] and any("" in group for group in made["groups"]):
            return f"the groups of {made['class']} (a parameter that is not in the model)", IN_OPTIMIZERS
    return None


def cure(hint: str, made: State, state_dict: dict[str, object]) -> str:
    """Return the hint of `lacks`; or, if a hook removed parameters from the state dict, their names."""
    gone = [name for name in made["parameters"] if name not in state_dict]
    return f"an on_save_checkpoint has left out {few(gone)}" if gone else hint


def can_differ(module: pl.LightningModule) -> bool:
    """Return whether the model makes its parts when it is loaded, or allows missing weights."""
    return is_overridden("on_load_checkpoint", module) or not module.strict_loading


@contextmanager
def fitting() -> Iterator[None]:
    """Turn errors from loading optimizers and schedulers into an error for people.

    Raises:
        ConfigError: with the reason.
    """
    try:
        yield
    except READING as error:
        raise _unfit(in_words(error)) from error


def explain_step(error: BaseException) -> ConfigError | None:
    """Turn an error of torch.optim in the first step after a resume into an error for people; None for other errors.

    An optimizer loads tensors of any shape, and fails when it uses them.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__) if isinstance(error, Exception) else []):
        if Path(frame.filename).is_relative_to(TORCH / "optim"):
            return _unfit(in_words(error))
        if not Path(frame.filename).is_relative_to(TORCH):
            break
    return None


def _unfit(why: str) -> ConfigError:
    return ConfigError(
        f"the state of optimizers and schedulers in the checkpoint does not fit the model: {why}",
        hint="restore the model; or resume=never, and labtrain.load_weights in the model to start with its weights",
    )


class Connector(CheckpointConnector):
    """Lightning's connector, which first rebuilds the saved tensors and groups, or refuses.

    Args:
        trainer: of the training.
        resumed: the folder of the checkpoint that it resumes from.
        initialise: called once, with the model that the first training or evaluation gets.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        resumed: Path | None = None,
        initialise: Callable[[pl.Trainer], None] | None = None,
    ) -> None:
        super().__init__(trainer)
        self.resumed, self.initialise = resumed, initialise
        # Whether on_load_checkpoint changed the number of states, so that new ones are allowed.
        self.changed_by_hook = False

    def begin(self) -> None:
        initialise, self.initialise = self.initialise, None
        if initialise is not None:
            initialise(self.trainer)

    @contextmanager
    def putting_back(self) -> Iterator[None]:
        """Turn errors from restoring a state into an error for people; errors of the experiment's code stay.

        Raises:
            LabtrainError: names the checkpoint and the function that failed.
        """
        try:
            yield
        except (*READING, MisconfigurationException) as error:
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
            files = [frame.f_code.co_filename for frame in frames]
            is_own = any(not file.startswith("<") and not in_environment(file) for file in files)
            # Out of memory, or a failed exchange with other ranks: the checkpoint is not the cause.
            elsewhere = isinstance(error, RuntimeError) and (type(error) is not RuntimeError or "gloo" in str(error))
            if is_own or elsewhere or self.resumed is None:
                raise
            raise LabtrainError(
                f"cannot restore {shown(self.resumed)}: {in_words(error)} ({frames[-1].f_code.co_qualname})",
                hint="ask who wrote it; without this checkpoint the same command resumes from the one before it;"
                " resume=never starts from the beginning",
            ) from error

    def restore_training_state(self) -> None:
        with self.putting_back():
            super().restore_training_state()

    def check_states(self) -> None:
        """Refuse states of more or fewer optimizers and schedulers than the model has: Lightning loads what both have.

        Call it when all of them exist: callbacks make some when an epoch starts.

        Raises:
            ConfigError: with both numbers.
        """
        saved = _numbers(self.loaded)
        made = [len(self.trainer.optimizers), len(self.trainer.lr_scheduler_configs)]
        if saved != made and not self.changed_by_hook:
            both = [f"{optimizers} optimizers and {schedulers} schedulers" for optimizers, schedulers in (saved, made)]
            raise _unfit(f"it has {both[0]}, the model has {both[1]}")

    def restore_model(self) -> None:
        if not self.loaded:
            return
        module, before = self.trainer.lightning_module, _numbers(self.loaded)
        call_module_hook(self.trainer, "on_load_checkpoint", self.loaded)
        self.changed_by_hook |= _numbers(self.loaded) != before
        made = self.loaded.get(PLACE, {}).get(KEY)
        if made is not None:
            now = {**made_of(self.trainer), "optimizers": made["optimizers"]}  # the optimizers do not exist yet
            _refuse(lacks(now, made), made, self.loaded["state_dict"])
            _put_buffers(module, made["buffers"], self.loaded["state_dict"])
        try:
            self.trainer.strategy.load_model_state_dict(self.loaded, strict=module.strict_loading)
        except RuntimeError as error:
            first, _, rest = str(error).partition("\n")
            if "loading state_dict" not in first:
                raise
            raise ConfigError(
                f"the checkpoint's weights do not fit into {type(module).__name__}: {' '.join(rest.split())}",
                hint="restore the model; or resume=never, and labtrain.load_weights in the model to start with the"
                " weights that fit",
            ) from error

    def restore_callbacks(self) -> None:
        loaded = self.loaded or {}
        for holder in (loaded, loaded.get(PLACE, {}).get("initial", {})):
            if "callbacks" in holder:  # saved with references such as ${oc.env:X}
                holder["callbacks"] = as_references(holder["callbacks"], back=True)
        super().restore_callbacks()

    def restore_optimizers_and_schedulers(self) -> None:
        with fitting():
            super().restore_optimizers_and_schedulers()

    def restore_optimizers(self) -> None:
        made = self.loaded.get(PLACE, {}).get(KEY) if self.loaded else None
        if made is not None:
            _refuse(lacks(made_of(self.trainer), made), made, self.loaded["state_dict"])
            parameters = dict(self.trainer.lightning_module.named_parameters())
            for optimizer, saved in zip(self.trainer.optimizers, made["optimizers"], strict=True):
                _regroup(optimizer, saved["groups"], parameters)
        with in_place(optimizers_of(self.trainer)):
            super().restore_optimizers()

    def restore_lr_schedulers(self) -> None:
        made = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for scheduler, saved in zip(made, self.loaded["lr_schedulers"], strict=False):
            # Loading accepts any type, and a later step would fail.
            if (name := first_of_another_kind(saved, scheduler.state_dict())) is not None:
                raise ValueError(f"{name} of {type(scheduler).__name__} has another type")
        # A load may change what it is given, as CyclicLR's does, and a resume in mid-epoch loads twice.
        kept = self.loaded["lr_schedulers"]
        self.loaded["lr_schedulers"] = copy.deepcopy(kept)
        super().restore_lr_schedulers()
        self.loaded["lr_schedulers"] = kept


def _numbers(loaded: State) -> list[int]:
    return [len(loaded.get(key, [])) for key in ("optimizer_states", "lr_schedulers")]


def _refuse(lacking: tuple[str, str] | None, made: State, state_dict: dict[str, object]) -> None:
    if lacking is not None:
        raise ConfigError(
            f"the checkpoint cannot be loaded: code changed {lacking[0]} before the save, but not in this process",
            hint=f"resume=never; for the next run: {cure(lacking[1], made, state_dict)}",
        )


def _regroup(optimizer: torch.optim.Optimizer, names: list[list[str]], parameters: State) -> None:
    """Give an optimizer the groups of parameters that it had; their options are loaded after that."""
    groups = optimizer.param_groups
    wanted = [[parameters[name] for name in group if name in parameters] for group in names]
    if [len(group) for group in wanted] != [len(group) for group in names]:
        return  # parameters outside the model, which keep their groups
    if [[*map(id, group["params"])] for group in groups] == [[*map(id, group)] for group in wanted]:
        return
    options = [dict(group) for group in groups[: len(wanted)]]
    options += [dict(optimizer.defaults) for _ in wanted[len(options) :]]
    groups[:] = [{**option, "params": group} for option, group in zip(options, wanted, strict=True)]


def _buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that a state dict holds, by name."""
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _put_buffers(module: torch.nn.Module, shapes: dict[str, list[int]], saved: State) -> None:
    """Make the model's buffers as saved, if their shapes differ."""
    modules, now = dict(module.named_modules()), dict(_buffers(module))
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    for name in now.keys() - shapes.keys():
        path, _, last = name.rpartition(".")
        modules[path]._buffers[last] = None
    for name, shape in shapes.items():
        path, _, last = name.rpartition(".")
        if path in modules and name in saved and (name not in now or list(now[name].shape) != shape):
            modules[path].register_buffer(last, saved[name].to(device, copy=True))
