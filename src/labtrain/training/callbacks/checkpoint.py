"""Checkpoints of a training: what `EpochLoop` saves, which are kept, and how they are read."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy

from labtrain.base.console import few
from labtrain.base.contracts import CheckpointConfig, State
from labtrain.base.credentials import as_references, without_secrets
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.signals import in_main_thread, outlive_parent
from labtrain.checkpoints.format import is_spread, load_folder
from labtrain.checkpoints.saver import Saver
from labtrain.checkpoints.staging import described, unsavable
from labtrain.exact.attributes import fingerprint, items_of_lists, plain_attributes
from labtrain.exact.checksums import first_unlike, unlike_names
from labtrain.exact.determinism import run_mode
from labtrain.record.digests import PLACE, WEIGHT_DTYPE_NAMES, state_digest
from labtrain.record.ranks import Beacon, find_ranks
from labtrain.stores.layout import kept, link_to
from labtrain.stores.store import Manifest
from labtrain.training.callbacks.heart import TEST, TRAIN, VALIDATION, Heart
from labtrain.training.callbacks.kept import OUTLIVES_S, Kept
from labtrain.training.epoch_loop import EpochLoop
from labtrain.training.lightning import checkpoint_connector
from labtrain.training.loggers import log_positions
from labtrain.training.sharded.strategy import Exact
from labtrain.training.state.extra_state import CLOCKS, CODE, Unsaved
from labtrain.training.state.options import adopt, beginnings, beginnings_of_callbacks
from labtrain.training.state.rebuild import KEY, can_differ, cure, fitting, lacks, made_of
from labtrain.training.state.trainer_state import Outside

HYPERPARAMETERS = {  # the key in Lightning's checkpoint dictionary, and the object that it belongs to
    pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY: "lightning_module",
    pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY: "datamodule",
}
WEIGHT_DTYPES = frozenset(getattr(torch, name) for name in WEIGHT_DTYPE_NAMES)


class Checkpoints(pl.Callback):
    """Saves the training's state when the epoch loop asks, and restores it on a resume.

    Args:
        run_dir: the run's folder.
        place: where its checkpoints are: a folder or a URL.
        run_id: written in each manifest.
        options: the keys of `checkpoint` in the configuration.
        say: called with each warning, which is printed and goes into the receipt.
        keeps: keep a copy of the newest state in memory, for the case that a rank dies.
        resumed: the name and the manifest that this training resumes from, if it is in this place.
    """

    def __init__(
        self,
        run_dir: Path,
        place: str,
        *,
        run_id: str,
        options: CheckpointConfig,
        say: Callable[[str], None],
        heart: Heart,
        keeps: bool = False,
        resumed: tuple[str, Manifest] | None = None,
    ) -> None:
        self.heart, self.keeps = heart, keeps
        self.run_id, self.say = run_id, say
        self.stepped = False
        self.initial: dict[str, object] = {}  # first values of optimizers, schedulers and callbacks
        self.made: dict[str, object] = {}  # tensors and parameter groups, as the configuration makes them
        self.monitor, self.keep_best = options["monitor"], options["keep_best"]
        keep = partial(
            kept,
            last=options["keep_last"],
            best=options["keep_best"],
            every=options["keep_every_n_steps"],
            mode=options["mode"],
        )
        self.saver = Saver(run_dir, place, run_id=run_id, keep=keep, spool_bytes=options["spool_bytes"])
        self.saver.before = link_to(*resumed) if resumed else None
        self.kept = Kept(self.saver, run_dir)
        self.beacon = Beacon.find()
        self.newest = (resumed[0], int(resumed[1]["step"])) if resumed else None
        self.validated = False  # whether this process has validated
        self.alike: Alike | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop if the ranks would resume from different checkpoints, before they load anything together."""
        if stage != "fit":
            return
        # Lightning runs finders first, and they change values that this method records.
        trainer.callbacks = [self, *(each for each in trainer.callbacks if each is not self)]  # type: ignore[attr-defined]
        _leave_rates(trainer)
        self.initial = {"callbacks": beginnings_of_callbacks(trainer)}
        step = self.newest[1] if self.newest else 0
        if (first := trainer.strategy.broadcast(step)) != step:
            raise LabtrainError(
                f"rank {trainer.global_rank} resumes from step {step}, rank 0 from {first}: they see different"
                " checkpoints",
                hint="set paths.runs to a folder that all nodes share",
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        loop = loop_of(trainer)
        if PLACE not in checkpoint:  # Lightning's tuner restores its own checkpoint, which has no resume point
            return
        if "optimizers" in self.initial and loop.loaded is None:  # not for a sharded checkpoint, which is loaded later
            with fitting():
                adopt(checkpoint, trainer, self.initial, say=self.say)
        loop.loaded = checkpoint

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.initial |= beginnings(trainer)
        self.made = made_of(trainer)
        if (loaded := loop_of(trainer).loaded) is not None:
            with fitting():
                adopt(loaded, trainer, self.initial, say=self.say)
        unsaved = loop_of(trainer).unsaved = Unsaved(pl_module, looks=run_mode() != "off")
        if run_mode() == "off":
            return
        for sentence in unsaved.unkept():
            self.say(sentence)
        if trainer.world_size > 1 and isinstance(trainer.strategy, Exact):
            self.alike = Alike(trainer.strategy, pl_module, say=self.say)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check_savable(trainer)
        loop_of(trainer).outside = Outside(trainer)
        if loop_of(trainer).loaded is not None:
            loop_of(trainer).restore()
            unsaved = loop_of(trainer).unsaved
            if unsaved is not None and unsaved.lost:
                self.say(
                    f"the training changed {few(sorted(unsaved.lost))}, which its checkpoint does not hold:"
                    " the resumed training starts with the values from __init__"
                )
            for name, value in unsaved.overruled.items() if unsaved is not None else ():
                self.say(
                    f"{name} starts as {value} in the code, but the training had changed it: it resumes with"
                    " the value in the checkpoint (to start with the new value: resume=never)"
                )
        if is_spread(pl_module.state_dict()):
            # For the writers, separate from the loop's exchanges.
            self.saver.spread_over(dist.new_group(backend="gloo"))
        on_cpus = isinstance(trainer.strategy, Exact) and trainer.strategy.root_device.type == "cpu"
        keeps = self.keeps and on_cpus and trainer.world_size > 1
        if keeps:
            self._begin_to_keep(trainer)
        started = getattr(trainer.strategy.launcher, "procs", [])
        self.beacon.begin(self.newest[1] if self.newest else 0, heir=started[-1].pid if keeps and started else 0)
        self.heart.start(trainer, self.beacon)

    def _begin_to_keep(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            loop_of(trainer).wishes.can_keep = self.kept.due
        is_last = trainer.global_rank == trainer.world_size - 1
        self.kept.copies = trainer.is_global_zero or is_last
        if is_last and find_ranks() is None and in_main_thread():
            outlive_parent(OUTLIVES_S)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self.heart.beat(TRAIN)
        unsaved = loop_of(trainer).unsaved
        if unsaved is not None:
            unsaved.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.heart.done(trainer.global_step)
        if trainer.is_global_zero:
            self.saver.check()
            self.beacon.advance(trainer.global_step)
        if not self.stepped and trainer.global_step:
            self.stepped = True
            self.check_savable(trainer, stepped=True)  # check again: optimizers create their state in the first step

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.heart.beat(VALIDATION)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.heart.beat(TEST)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.heart.beat(TRAIN)
        if not trainer.sanity_checking:
            self.validated = True
            self.score(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.heart.beat(TRAIN)
        self.score(trainer)
        found = trainer.callback_metrics
        told = self.validated or not trainer.enable_validation
        if self.monitor is not None and self.monitor not in found and told:
            wrong = f"checkpoint.monitor={self.monitor}: no such metric"
            logged = f"logged metrics: {', '.join(sorted(found)) or 'none'}"
            if self.keep_best:
                raise LabtrainError(f"{wrong}; {logged}", hint="checkpoint.keep_best=0, or the name of a logged metric")
            self.say(f"{wrong}, so no best value is recorded; {logged}")

    def save(self, trainer: pl.Trainer, *, required: bool) -> None:
        """Save the training's current state, on every rank: rank 0 writes, or each rank its part if it is spread.

        Args:
            trainer: the trainer.
            required: wait for the previous save; and for this one, if the training stops. If False and the
                previous save is still being written, this save is made later.
        """
        wishes = loop_of(trainer).wishes
        if not required and not self.keep_best and trainer.strategy.broadcast(self.saver.busy):
            wishes.owed = trainer.is_global_zero
            return
        self._compare_ranks(trainer)
        self._say_lost(trainer)
        state, manifest = self._state(trainer)
        self._say_unkept(trainer)
        with self.heart.saving():
            if trainer.is_global_zero or self.saver.group is not None:
                self.newest = self.saver.save(state, manifest), trainer.global_step
            wishes.keep_time()
            if wishes.agreed_stop:
                self.saver.wait()
                # Otherwise a rank that exits early makes the launcher kill rank 0.
                trainer.strategy.barrier("labtrain.checkpoint")

    def keep(self, trainer: pl.Trainer) -> None:
        """Copy the training's current state into memory; called on every rank."""
        with self.kept.timed():
            state, manifest = self._state(trainer)
            manifest["scores"] = dict(self.saver.scores)
            self.kept.put(state, trainer.strategy.broadcast(manifest))

    def _state(self, trainer: pl.Trainer) -> tuple[State, Manifest]:
        """Return the state that a checkpoint holds and, on rank 0, its manifest; called on every rank."""
        state = dump(trainer)
        state[PLACE] = loop_of(trainer).place() | {
            "initial": {**self.initial, "callbacks": as_references(self.initial["callbacks"])}
        }
        self._keep_made(trainer, state)
        manifest: Manifest = {"step": trainer.global_step}
        if trainer.is_global_zero:
            manifest |= {
                "run_id": self.run_id,
                "epoch": state[PLACE]["epoch"],
                "batch": state[PLACE]["batch"],
                "metrics": as_floats(trainer.callback_metrics),
                "logs": log_positions(trainer.loggers),
            }
        return state, manifest

    def _say_lost(self, trainer: pl.Trainer) -> None:
        unsaved = loop_of(trainer).unsaved
        if unsaved is not None and (lost := unsaved.newly_lost()):
            self.say(
                f"the training changes {few(lost)}, which no checkpoint holds: a resumed training starts with"
                " the values from __init__ (keep a number, a tensor or a list in an attribute of the model, or save and"
                " load it in on_save_checkpoint and on_load_checkpoint; a callback in state_dict and load_state_dict)"
            )

    def _keep_made(self, trainer: pl.Trainer, state: State) -> None:
        """Record the training's tensors and groups in a state, if they changed; warn if it then cannot be resumed."""
        if (made := made_of(trainer)) != self.made:
            state[PLACE][KEY] = made
            lacking = None if can_differ(trainer.lightning_module) else lacks(self.made, made)
            if lacking is not None:
                hint = cure(lacking[1], made, state["state_dict"])
                self.say(f"checkpoints from now on cannot be resumed: code has changed {lacking[0]}; {hint}")

    def _say_unkept(self, trainer: pl.Trainer) -> None:
        outside, unsaved = loop_of(trainer).outside, loop_of(trainer).unsaved
        for sentence in outside.unkept() if outside is not None and run_mode() != "off" else ():
            self.say(sentence)
        for name in unsaved.new_objects() if unsaved is not None else ():
            self.say(
                f"{name} was made during the training: a resumed training does not have it when it starts, so its"
                " attributes cannot be restored (make it in __init__ or setup)"
            )

    def check_savable(self, trainer: pl.Trainer, *, stepped: bool = False) -> None:
        """Make the state that a save would write, and check that a checkpoint can hold it.

        Raises:
            ConfigError: names the value that it cannot hold, and the line to write.
        """
        try:
            state = dump(trainer, optimizers=stepped or not is_spread(trainer.lightning_module.state_dict()))
        except Exception:  # a hook may need state that exists only later; the first save reports its error
            return
        found = list(unsavable({key: value for key, value in state.items() if key != "state_dict"}))
        for key, owner in HYPERPARAMETERS.items():
            if names := list(dict.fromkeys(str(path[1]) for path, _ in found if path[0] == key and len(path) > 1)):
                kinds = ", ".join(f"{path[1]} is a {described(value)}" for path, value in found if path[0] == key)
                raise ConfigError(
                    f"save_hyperparameters in {type(getattr(trainer, owner)).__name__} saves values that"
                    f" a checkpoint cannot hold: {kinds}",
                    hint=f"self.save_hyperparameters(ignore={json.dumps(names)}), and self.{names[-1]} = {names[-1]}"
                    f" instead of self.hparams.{names[-1]}",
                )
            if any(path == (key,) for path, _ in found):
                raise ConfigError(
                    f"the hyperparameters of {type(getattr(trainer, owner)).__name__} are a {described(state[key])}",
                    hint="self.save_hyperparameters(OmegaConf.to_container(cfg, resolve=True))",
                )
        for path, value in found:
            raise ConfigError(
                f"{'.'.join(map(str, path))} is a {described(value)}: a checkpoint can hold only tensors, numbers,"
                " strings, lists and dicts",
                hint=f"leave it out of {_whose(path)}",
            )
        for name, tensor in state["state_dict"].items():
            if not isinstance(tensor, torch.Tensor):
                raise ConfigError(
                    f"{name} of the model's state_dict is a {described(tensor)}: expected a tensor",
                    hint="use register_buffer or a plain attribute of the model: checkpoints hold both",
                )
            if tensor.dtype not in WEIGHT_DTYPES:
                raise ConfigError(
                    f"{name} of the model's state_dict is of {tensor.dtype}, which safetensors does not support",
                    hint="keep its real and imaginary parts: torch.view_as_real"
                    if tensor.is_complex()
                    else "tensor.float()",
                )

    def finish(self, trainer: pl.Trainer, weights_digest: str, *, resumed: Path | None) -> str | None:
        """Save the final weights, if they changed after the last save; called on every rank.

        For example, a callback may replace them by averaged weights. Such a checkpoint cannot be resumed.

        Args:
            trainer: at its end.
            weights_digest: of its model.
            resumed: the folder of the checkpoint that the training resumed from.

        Returns:
            the digest of the last saved state; None if nothing is saved, or the state is spread over the ranks.
        """
        self._compare_ranks(trainer)
        saver, spread = self.saver, self.saver.group is not None

        def agreed(rank_zeros: bool) -> bool:
            return trainer.strategy.broadcast(rank_zeros) if spread else rank_zeros

        saver.wait()
        if self.newest is None or not (trainer.is_global_zero or spread):
            return None
        manifest = saver.manifests.get(self.newest[0], {"step": self.newest[1]})  # only rank 0 has the manifests
        if agreed(manifest.get("weights_digest") == weights_digest):
            state = saver.staged
            # The training was complete, and only the delivery was missing.
            if state is None and resumed is not None and not spread:
                state = load_folder(resumed)
            return state_digest(state) if state is not None and not spread else None
        state = {"state_dict": trainer.strategy.lightning_module_state_dict()}
        ended = [other for other in saver.manifests.values() if other.get("finished")]
        if not agreed(any(other.get("weights_digest") == weights_digest for other in ended)):
            saver.save(state, manifest, finished=True)
            saver.wait()
        return None if spread else state_digest(state)

    def _compare_ranks(self, trainer: pl.Trainer) -> None:
        check_ranks(trainer)
        if self.alike is not None:
            self.alike.compare(trainer.global_step)

    def score(self, trainer: pl.Trainer) -> None:
        """Record the monitored metric for the checkpoint that was saved before the validation."""
        if self.newest is None or self.newest[1] != trainer.global_step or not trainer.is_global_zero:
            return
        if self.keep_best and self.monitor in trainer.callback_metrics:
            self.saver.score(self.newest[0], float(trainer.callback_metrics[self.monitor]))


def _leave_rates(trainer: pl.Trainer) -> None:
    """Skip the search for a learning rate until the training has resumed: the checkpoint holds the earlier result."""

    def find(search: Callable[..., None], *arguments: object) -> None:
        if loop_of(trainer).loaded is None:
            search(*arguments)

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, pl.callbacks.LearningRateFinder):
            callback.lr_find = partial(find, callback.lr_find)  # type: ignore[method-assign]


class Alike:
    """Compares the plain attributes that were equal on all ranks when the training began; made on every rank.

    Skips lists that have grown, which belong to a rank, and readings of a clock.

    Args:
        strategy: of the training.
        module: its model.
        say: called with each warning.
    """

    def __init__(self, strategy: Exact, module: pl.LightningModule, *, say: Callable[[str], None]) -> None:
        self.strategy, self.module, self.say = strategy, module, say
        self.begun_s = [clock() for clock in CLOCKS]
        self.items = {name: items_of_lists(value) for name, value in plain_attributes(module).items()}
        self.known: set[str] = set()
        self.known |= set(unlike_names(self._texts(), self._device))

    def compare(self, step: int) -> None:
        """Warn once of each attribute that differs between the ranks; called on every rank."""
        unlike = unlike_names(self._texts(), self._device)
        self.known |= set(unlike)
        if unlike:
            one = len(unlike) == 1
            self.say(
                f"{', '.join(unlike)} {'was' if one else 'were'} the same on all ranks when the training began, but"
                f" {'differs' if one else 'differ'} between ranks at step {step}: results computed from"
                f" {'it' if one else 'them'} depend on the number of devices (set the same value on every rank: look"
                " for global_rank, and for hooks that use this rank's batch or outputs)"
            )

    def _texts(self) -> dict[str, str]:
        found, grown = plain_attributes(self.module), self.strategy.grown()
        left_out = self.known | {
            name
            for name, value in found.items()
            if name in grown or items_of_lists(value) > self.items.get(name, 0) or self._is_time(value)
        }
        return {name: "" if name in left_out else fingerprint(value) or "" for name, value in found.items()}

    def _is_time(self, value: object) -> bool:
        spans_s = zip(self.begun_s, (clock() for clock in CLOCKS), strict=True)
        return type(value) is float and any(begun_s <= value <= now_s for begun_s, now_s in spans_s)

    @property
    def _device(self) -> torch.device:
        return self.strategy.root_device


def check_ranks(trainer: pl.Trainer) -> None:
    """Compare the weights of all ranks, if each has all of them; called on every rank.

    Raises:
        LabtrainError: they differ, so a checkpoint would hold those of rank 0 only.
    """
    if trainer.world_size == 1 or not isinstance(trainer.strategy, DDPStrategy):
        return
    named: list[tuple[str, torch.Tensor]] = [*trainer.lightning_module.named_parameters()]
    if isinstance(trainer.strategy, Exact):  # otherwise each rank has its own BatchNorm statistics
        named += list(trainer.lightning_module.named_buffers())
    if (name := first_unlike(named)) is not None:
        raise LabtrainError(
            f"{name} differs between the ranks after step {trainer.global_step}: code changed it on some ranks only",
            hint="change weights alike on every rank: in hooks, look for global_rank, rank_zero_only, random numbers,"
            " and this rank's batch, outputs or part of a loader",
        )


def dump(trainer: pl.Trainer, *, optimizers: bool = True) -> State:
    """Return Lightning's checkpoint dictionary without its loops, and without the functions of schedulers.

    Args:
        trainer: the trainer.
        optimizers: include their states. For spread parameters without a state, a step makes one.
    """
    state: dict[str, object] = checkpoint_connector(trainer).dump_checkpoint(weights_only=not optimizers)
    del state["loops"]
    for key in HYPERPARAMETERS:  # not saved: labtrain makes the model from the configuration
        if key in state:
            state[key] = without_secrets(state[key])
    for key in ("lr_schedulers", "callbacks"):
        if key in state:
            state[key] = _without_code(state[key], scheduler=key == "lr_schedulers")
    if "callbacks" in state:  # a callback's key includes its options: EarlyStopping{'monitor': ...}
        state["callbacks"] = as_references(state["callbacks"])
    return state


def _without_code(node: object, *, scheduler: bool) -> object:
    """Return a state without the functions that schedulers hold: their constructors set them again.

    For example SWALR's `anneal_func` in torch 2.9. A scheduler loads its state by updating its `__dict__`.
    """
    if type(node) is dict:
        scheduler = scheduler or {"last_epoch", "base_lrs"} <= node.keys()
        kept = {key: value for key, value in node.items() if not (scheduler and isinstance(value, CODE))}
        return {key: _without_code(value, scheduler=scheduler) for key, value in kept.items()}
    if type(node) is list:
        return [_without_code(item, scheduler=scheduler) for item in node]
    return node


def _whose(path: tuple[object, ...]) -> str:
    """Return what made this part of a state."""
    if path[0] == "callbacks":
        return f"state_dict or on_save_checkpoint of the callback {str(path[1]).partition('{')[0]}"
    if path[0] in ("optimizer_states", "lr_schedulers"):
        return f"the state_dict of the {'optimizer' if path[0] == 'optimizer_states' else 'scheduler'}"
    return "on_save_checkpoint of the model or the data module, or of the data module's state_dict"


def as_floats(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return metrics as numbers, by name."""
    return {name: float(value) for name, value in sorted(metrics.items())}


def loop_of(trainer: pl.Trainer) -> EpochLoop:
    """Return the training's epoch loop, which is labtrain's."""
    assert isinstance(trainer.fit_loop.epoch_loop, EpochLoop)
    return trainer.fit_loop.epoch_loop


class FolderIO(TorchCheckpointIO):
    """Lets the Trainer load a checkpoint folder; a file is Lightning's own format."""

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., object] | None = None, weights_only: bool | None = None
    ) -> dict[str, object]:
        if Path(path).is_dir():
            return load_folder(Path(path))
        return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)
