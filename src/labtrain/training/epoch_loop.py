"""Save and resume points in the training loop.

labtrain saves at one place in a step. The optimizer step is done and logged. A validation that is due, the schedulers
that wait for it, and the end of the epoch come after it. Lightning has no hook there, so `EpochLoop` extends two
methods of its training epoch loop. A checkpoint holds the state at that place and nothing else. So the checkpoint of a
step has the same content, whatever happened to the training later. A resumed training runs the pending validation and
the epoch's end exactly as the first time, also after the last batch of an epoch.

labtrain does not save Lightning's own loop state. Its restart stages sometimes skip an epoch or count a step twice.
Here `restore`, and the one `advance` that runs no batch, set the counters to their saved values.

Lightning 2.6: loops/training_epoch_loop.py, loops/fit_loop.py, connectors/logger_connector, through lightning.py.
"""

import dataclasses
import signal
from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from labtrain.base.contracts import State
from labtrain.base.errors import ConfigError
from labtrain.base.signals import Stopped, Wishes
from labtrain.checkpoints.format import is_spread
from labtrain.data.sharded import Loader
from labtrain.data.stream import Stream
from labtrain.exact.determinism import seed_place
from labtrain.exact.metric_states import hold, metrics_of, release
from labtrain.record.digests import PLACE
from labtrain.training.guard import Guard
from labtrain.training.lightning import (
    DataFetcher,
    LoggedValues,
    TrainingEpochLoop,
    checkpoint_connector,
    fields_of,
    new_entry,
    put_results,
    restore_metrics,
    results_of,
    train_loaders,
)
from labtrain.training.sharded.gathering import leave_own, made_whole
from labtrain.training.sharded.step_log import global_already, is_global
from labtrain.training.sharded.strategy import Exact
from labtrain.training.state.counters import kinds_of
from labtrain.training.state.extra_state import Unsaved
from labtrain.training.state.rebuild import Connector
from labtrain.training.state.trainer_state import KEY, Outside


class EpochLoop(TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, which can stop and resume after any optimizer step.

    Args:
        trainer: this loop replaces its loop of the same kind.
        save: called on every rank to save the training. Its argument: True to save now, False if it may wait.
        keep: called on every rank to copy the training's state into memory.
        every_n_steps: also save every N steps. The loop always saves before each validation, at the end of each epoch
            and at the end of the training.
        wishes: the signals and timers of this process.
        stop_at: the step after which the loop saves and stops; 0: never.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        *,
        save: Callable[[bool], None],
        keep: Callable[[], object] = bool,
        every_n_steps: int | None,
        wishes: Wishes,
        stop_at: int = 0,
    ) -> None:
        super().__init__(trainer)
        put_results(self, LoggedValues(training=True))
        put_results(self.val_loop, LoggedValues(training=False))
        self.save, self.keep, self.wishes = save, keep, wishes
        self.every_n_steps, self.stop_at = every_n_steps, stop_at
        self.loaded: State | None = None  # the checkpoint to resume from, until that is done
        self.unsaved: Unsaved | None = None  # from the start of the training on
        self.outside: Outside | None = None
        self.epoch_without_outputs: int | None = None  # a resumed epoch whose checkpoint lacks the lists of outputs
        self._entering = False

    # ------------------------------------------------------------------------------------------------------ saving

    def on_advance_end(self, data_fetcher: DataFetcher) -> None:
        if not self._entering and not self.is_accumulating() and is_searched(self.trainer):
            self._exchange()
            if self.wishes.agreed_stop:
                raise Stopped(self.wishes.agreed_stop, saved=False)
        elif not self._entering and not self.is_accumulating():
            self._agree()
            if self.wishes.agreed_stop or self.is_last_step():
                self.save(True)
            elif self.wishes.agreed_save or self._due(data_fetcher):
                self.save(False)
            elif self.wishes.agreed_keep:
                self.keep()
            if self.wishes.agreed_stop:
                raise Stopped(self.wishes.agreed_stop)
        self._entering = False
        seed_place("boundary", self.trainer.current_epoch, self.batch_idx)
        super().on_advance_end(data_fetcher)

    def _due(self, data_fetcher: DataFetcher) -> bool:
        every = self.every_n_steps
        return (every is not None and self.global_step % every == 0) or self.validation_is_due(data_fetcher)

    def _agree(self) -> None:
        """Exchange the wishes of all ranks. Exact ranks have exchanged them with the step."""
        self._exchange()
        if self.stop_at and self.global_step == self.stop_at:
            self.wishes.agreed_stop = signal.SIGTERM

    def _exchange(self) -> None:
        if isinstance(self.trainer.strategy, Exact) and self.trainer.world_size > 1:
            return
        stop, save = self.wishes.numbers()
        if self.trainer.world_size > 1:
            both = torch.tensor([stop, save], device=self.trainer.strategy.root_device)
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
            stop, save = both.tolist()
        self.wishes.agree(stop, save)

    def place(self) -> State:
        """Return the training's position, as plain values and tensors."""
        trainer, fit = self.trainer, self.trainer.fit_loop
        mine = {"logged": self._logged(), "metrics": self._metric_states(), **self._loader_state()}
        if self.unsaved is not None and isinstance(trainer.strategy, Exact):
            with made_whole(trainer, trainer.strategy.grown()) as outputs:
                mine |= self.unsaved.state() | {"outputs": outputs}
        elif self.unsaved is not None:
            mine |= self.unsaved.state()
        ranks, outside = [mine], self.outside.state() if self.outside is not None else {}
        if trainer.world_size > 1 and not isinstance(trainer.strategy, Exact):
            kept = trainer.lightning_module.state_dict(keep_vars=True)
            buffers = trainer.lightning_module.named_buffers()
            mine["buffers"] = {name: buffer.cpu() for name, buffer in buffers if name in kept}
            ranks = [{}] * trainer.world_size  # each rank has sums and buffers of its own
            dist.all_gather_object(ranks, _moved(mine, torch.device("cpu")))
        return {
            "epoch": fit.epoch_progress.current.processed,
            "batch": self.batch_progress.current.completed,
            "batches": self.batch_progress.total.completed,
            "is_last_batch": self.batch_progress.is_last_batch,
            "global_step": self.global_step,
            "scheduler_steps": self.scheduler_progress.total.completed,
            "batches_that_stepped": self.batches_that_stepped,
            "callback_metrics": {name: value.cpu() for name, value in trainer.callback_metrics.items()},
            "exact": isinstance(trainer.strategy, Exact),
            "ranks": ranks,
            **({"counters": counters} if (counters := self._counters()) else {}),
            **({KEY: outside} if outside else {}),
            **({"lost": sorted(self.unsaved.lost)} if self.unsaved is not None and self.unsaved.lost else {}),
        }

    def _counters(self) -> State:
        strategy = self.trainer.strategy
        return strategy.counters.state() if isinstance(strategy, Exact) else {}

    def _logged(self) -> list[State]:
        entries = []
        for key, entry in results_of(self).items():
            sync, cache = entry.meta.sync, entry.of_step
            entries.append(
                {
                    "key": key,
                    "meta": fields_of(entry.meta) | {"reduce_fx": entry.meta.reduce_fx.__name__},
                    "sync": [is_global(entry), sync.should, sync.rank_zero_only],
                    "is_tensor": entry.is_tensor,
                    "value": entry.value if entry.is_tensor else None,
                    "weight": getattr(entry, "cumulated_batch_size", None) if entry.is_tensor else None,
                    "cache": cache if isinstance(cache, torch.Tensor) else None,
                    "updates": entry.updates,
                    "has_reset": entry.has_reset,
                    **({} if entry.as_loss is None else {"as_loss": entry.as_loss}),
                }
            )
        return entries

    def _metric_states(self) -> State:
        states: State = {}
        for name, metric in metrics_of(self.trainer.lightning_module).items():
            held = hold(metric)
            del held["_forward_cache"], held["_computed"]
            states[name] = held
        return states

    def _loader_state(self) -> State:
        for loader in train_loaders(self.trainer):
            if isinstance(loader, Stream):
                state = loader.state_after(self.batch_progress.current.completed)
                return {"loader": state, "exhausted": loader.exhausted}
        return {"loader": None}

    # ---------------------------------------------------------------------------------------------------- resuming

    def restore(self) -> None:
        """Set the counters to the values of the loaded checkpoint, before the first hook of the training."""
        with _connector(self.trainer).putting_back():
            self._restore()

    def _restore(self) -> None:
        assert self.loaded is not None
        at, fit = self.loaded[PLACE], self.trainer.fit_loop
        for progress, done in (
            (fit.epoch_progress.total, at["epoch"]),
            (fit.epoch_progress.current, at["epoch"]),
            (self.batch_progress.total, at["batches"]),
            (self.batch_progress.current, at["batch"]),
            (self.scheduler_progress.total, at["scheduler_steps"]),
        ):
            _put(progress, done)
        self.batch_progress.is_last_batch = at["is_last_batch"]
        self.batches_that_stepped = at["batches_that_stepped"]
        self._put_global_step(at["global_step"] - 1)  # the end of the last step comes later: max_steps must not skip it
        self._restore_unsaved(at, entering=False)

    def placed(self, loader: object) -> object:
        """Return a training loader that starts at the position of the loaded checkpoint; wrap one with a state."""
        with _connector(self.trainer).putting_back():
            return self._placed(loader)

    def _placed(self, loader: object) -> object:
        at = self.loaded[PLACE] if self.loaded is not None else None
        if at is None or not isinstance(loader, Loader):
            return loader
        if not isinstance(loader, Stream):
            loader.start_at(at["epoch"], at["batch"])
            return loader
        mine = self._of_this_rank(at)
        if mine is None:
            raise ConfigError(
                f"the checkpoint holds the data's state for {len(at['ranks'])} ranks, this training has"
                f" {self.trainer.world_size}: the next samples of each rank are unknown",
                hint=f"trainer.devices={len(at['ranks'])}, or resume=never",
            )
        ended, exhausted = at["is_last_batch"], mine.get("exhausted", True)
        loader.start_at(at["epoch"], at["batch"], state=mine["loader"], ended=ended, exhausted=exhausted)
        return loader

    def _of_this_rank(self, at: State) -> State | None:
        """Return what this rank held; None if other ranks held it: without shards, each rank has its own sums."""
        exact = isinstance(self.trainer.strategy, Exact)
        ranks: list[State] = at["ranks"]
        if at["exact"] != exact or (not exact and len(ranks) != self.trainer.world_size):
            return None
        return ranks[0 if exact else self.trainer.global_rank]

    def _restore_unsaved(self, at: State, *, entering: bool) -> None:
        """Restore what no state dict holds; take rank 0's if the ranks differ from those that saved it."""
        mine, device = self._of_this_rank(at), self.trainer.strategy.root_device
        kept: State = at["ranks"][0] if mine is None else mine
        if mine is None and kept.get("gradients") and is_spread(self.trainer.lightning_module.state_dict()):
            raise ConfigError(
                f"the checkpoint holds accumulated gradients of {len(at['ranks'])} ranks, this training has"
                f" {self.trainer.world_size}",
                hint=f"trainer.devices={len(at['ranks'])}, or resume=never",
            )
        assert self.unsaved is not None
        assert self.outside is not None
        self.unsaved.restore(kept, device=device, entering=entering)
        self.unsaved.lost |= set(at.get("lost", []))
        self.outside.restore(at.get(KEY, {}), entering=entering)
        leave_own(self.trainer, kept.get("outputs", []))
        if isinstance(self.trainer.strategy, Exact):
            self.trainer.strategy.kinds.update(kinds_of(at.get("counters", {})))
            # In this process no step may follow that shows it.
            self.trainer.strategy.know_grown({path[0] for path in kept.get("outputs", [])})
        self.epoch_without_outputs = None if kept.get("outputs") else at["epoch"]

    def reset(self) -> None:
        if self.loaded is None:
            super().reset()

    @property
    def done(self) -> bool:
        return self.loaded is None and super().done

    def advance(self, data_fetcher: DataFetcher) -> None:
        if self.loaded is None:
            super().advance(data_fetcher)
        else:
            with _connector(self.trainer).putting_back():
                self._enter()

    def _enter(self) -> None:
        """Resume at the checkpoint's place, instead of training its batch again.

        The state was loaded before, but hooks have run since, such as on_train_epoch_start for the second time in this
        epoch. They had made their changes before the save, so the state is loaded once more.
        """
        loaded, trainer = cast(State, self.loaded), self.trainer
        self._entering = True
        at = loaded[PLACE]
        connector = _connector(trainer)
        connector.loaded = loaded
        connector.restore_model()
        connector.restore_callbacks()
        connector.restore_precision_plugin_state()
        connector.check_states()
        connector.restore_optimizers_and_schedulers()
        connector.loaded, self.loaded = {}, None
        self._put_global_step(at["global_step"])
        self._restore_unsaved(at, entering=True)
        mine, device = self._of_this_rank(at), trainer.strategy.root_device
        if mine is not None:
            self._restore_metrics(mine["metrics"], device)
            for name, value in mine.get("buffers", {}).items():
                trainer.lightning_module.get_buffer(name).copy_(value)
            self._restore_logged(mine["logged"])
        metrics = {key: value.to(device) for key, value in at["callback_metrics"].items()}
        restore_metrics(trainer, metrics, first_batch=at["batch"] == 1)

    def _restore_metrics(self, states: State, device: torch.device) -> None:
        parts = metrics_of(self.trainer.lightning_module)
        for name, state in states.items():
            values = {key: _moved(value, device) for key, value in state.items()}
            release(parts[name], values | {"_computed": None, "_forward_cache": None})

    def stand_at(self, at: State, *, over: bool) -> None:
        """Set epoch and step, and restore what no state dict holds, for an evaluation outside of a training.

        Args:
            at: the position in a checkpoint.
            over: the training is over; else its last validation follows.
        """
        fit, device = self.trainer.fit_loop, torch.device("cpu")  # the strategy moves the model later
        for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
            _put(progress, at["epoch"] + over)
        self._put_global_step(at["global_step"])
        kept: State = self._of_this_rank(at) or at["ranks"][0]
        Unsaved(self.trainer.lightning_module, looks=False).restore(kept, device=device, entering=False)
        Outside(self.trainer).restore(at.get(KEY, {}), entering=False)
        if isinstance(self.trainer.strategy, Exact):
            self.trainer.strategy.kinds.update(kinds_of(at.get("counters", {})))
        names = metrics_of(self.trainer.lightning_module).keys()
        self._restore_metrics({name: kept["metrics"][name] for name in names & kept["metrics"].keys()}, device)

    def _restore_logged(self, entries: list[State]) -> None:
        strategy, device = self.trainer.strategy, self.trainer.strategy.root_device
        for saved in entries:
            combined, should, rank_zero_only = saved["sync"]
            entry = new_entry(
                saved["meta"],
                is_tensor=saved["is_tensor"],
                reduce=global_already if combined else strategy.reduce,
                should=should,
                rank_zero_only=rank_zero_only,
            )
            if saved["is_tensor"]:
                entry.value = saved["value"].to(device)
                if saved["weight"] is not None:
                    entry.cumulated_batch_size = saved["weight"].to(device)
                if "as_loss" in saved:
                    entry.as_loss = saved["as_loss"].to(device)
            else:
                entry.value = self.trainer.lightning_module.get_submodule(entry.meta.metric_attribute or "")
            entry.of_step = _moved(saved["cache"], device)
            entry.updates, entry.has_reset = saved["updates"], saved["has_reset"]
            results_of(self)[saved["key"]] = entry

    def _put_global_step(self, done: int) -> None:
        optimizer = self.automatic_optimization.optim_progress.optimizer
        manual = self.manual_optimization.optim_step_progress.total
        for progress in (optimizer.step.total, optimizer.zero_grad.total, manual):
            _put(progress, done)


def _connector(trainer: pl.Trainer) -> Connector:
    return cast(Connector, checkpoint_connector(trainer))


def is_searched(trainer: pl.Trainer) -> bool:
    """Return whether Lightning's finder of a learning rate or batch size is training; it restores everything later.

    It removes the callbacks meanwhile (tuner/lr_finder.py).
    """
    return not any(isinstance(callback, Guard) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _put(progress: Any, done: int) -> None:
    for part in dataclasses.fields(progress):
        setattr(progress, part.name, done)


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value
