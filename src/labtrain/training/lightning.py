"""Lightning's private names, behind plain ones: the only file that a new Lightning can break.

Lightning 2.6 has no public API for any of this. tests/quick/training/test_lightning_contract.py checks each private
name and the arguments of each private method. No other file uses a private name.
"""

import dataclasses
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.trainer.call import _call_lightning_module_hook
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torchmetrics import Metric

from labtrain.base.contracts import State

DataFetcher = _DataFetcher
AnyLoop = _TrainingEpochLoop | _EvaluationLoop
ResultMeta = _Metadata
ResultCollection = _ResultCollection


# ------------------------------------------------------------------------------------------------------------- loaders


def train_loaders(trainer: pl.Trainer) -> Iterable[object]:
    """Return the loaders of the training, which may be combined to one; none before it has started."""
    return _flat(trainer.fit_loop._combined_loader)


def val_loaders(trainer: pl.Trainer) -> Iterable[object]:
    """Return the loaders of the validation inside a training."""
    return _flat(trainer.fit_loop.epoch_loop.val_loop._combined_loader)


def test_loaders(trainer: pl.Trainer) -> Iterable[object]:
    """Return the loaders of `trainer.test`."""
    return _flat(trainer.test_loop._combined_loader)


def eval_loaders(trainer: pl.Trainer) -> Iterable[object]:
    """Return the loaders of the validation or test that runs."""
    return _flat(evaluation_loop(trainer)._combined_loader)


def predict_loaders(trainer: pl.Trainer) -> Iterable[object]:
    """Return the loaders of `trainer.predict`."""
    return _flat(trainer.predict_loop._combined_loader)


def mode_of(combined: CombinedLoader) -> str:
    """Return how a CombinedLoader takes batches from its loaders."""
    return combined._mode


def _flat(combined: CombinedLoader | None) -> Iterable[object]:
    return combined.flattened if combined is not None else ()


# ---------------------------------------------------------------------------------------------------------- optimizers


def lightning_optimizers(strategy: pl.strategies.Strategy) -> list[LightningOptimizer]:
    """Return what a model's `optimizers()` gives: each counts its steps."""
    return strategy._lightning_optimizers


@contextmanager
def counted_step(trainer: pl.Trainer) -> Iterator[None]:
    """Count a block as a step of an optimizer in manual optimization, as `global_step` counts them."""
    loop = trainer.fit_loop.epoch_loop.manual_optimization
    loop._on_before_step()
    yield
    loop._on_after_step()


def toggled(module: pl.LightningModule) -> dict[str, bool]:
    """Return what `toggle_optimizer` keeps for `untoggle_optimizer`."""
    return module._param_requires_grad_state


def put_toggled(module: pl.LightningModule, state: dict[str, bool]) -> None:
    """Put back what `toggled` returned."""
    module._param_requires_grad_state = state


# --------------------------------------------------------------------------------------------------------------- loops


class TrainingEpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, in place of a trainer's own."""

    def __init__(self, trainer: pl.Trainer) -> None:
        replaced = trainer.fit_loop.epoch_loop
        super().__init__(trainer, min_steps=replaced.min_steps, max_steps=replaced.max_steps)
        self.val_loop = replaced.val_loop

    def is_accumulating(self) -> bool:
        """Return whether this batch leaves its gradients for the next one."""
        return self._should_accumulate()

    def is_last_step(self) -> bool:
        """Return whether this is the last step of the epoch, or of the training."""
        stopping = self.trainer.should_stop and self.trainer.fit_loop._can_stop_early
        return bool(stopping or self._is_training_done)

    def validation_is_due(self, data_fetcher: _DataFetcher) -> bool:
        """Return whether a validation follows this batch."""
        return self._should_check_val_fx(data_fetcher)

    @property
    def batches_that_stepped(self) -> int:
        """How often the optimizers stepped, as loggers count: over the whole training."""
        return self._batches_that_stepped

    @batches_that_stepped.setter
    def batches_that_stepped(self, number: int) -> None:
        self._batches_that_stepped = number

    def _broadcast_sigterm_tensor(self) -> None:
        """Do nothing: Lightning would ask rank 0 before each batch whether it got a SIGTERM."""


def evaluation_loop(trainer: pl.Trainer) -> _EvaluationLoop:
    """Return the loop of the validation or test that runs."""
    return trainer._evaluation_loop


def epochs_done(trainer: pl.Trainer) -> int:
    """Return how many epochs of training are over."""
    return int(cast(Any, trainer.fit_loop.epoch_progress.current).processed)


def batches_begun(trainer: pl.Trainer) -> int:
    """Return how many batches the loop that runs has fetched: in this epoch, of this loader."""
    loop: Any = trainer._active_loop
    return int(getattr(loop, "epoch_loop", loop).batch_progress.current.ready)


def checks_validation_by_time(trainer: pl.Trainer) -> bool:
    """Return whether val_check_interval is a time."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def ignore_signals(trainer: pl.Trainer) -> None:
    """Keep Lightning from handling signals: it would end with exit code 0 after SIGTERM, and requeue a Slurm job."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def observe_ranks(observe: Callable[[list[subprocess.Popen[bytes]]], object]) -> None:
    """Let a function observe the ranks that Lightning starts; Lightning would kill rank 0 while that still saves."""
    subprocess_script._launch_process_observer = observe  # type: ignore[attr-defined, assignment]


# ----------------------------------------------------------------------------------------------------------- throughput


def peak_of_device(trainer: pl.Trainer) -> int | None:
    """Return the peak of one device in FLOP/s, in the dtype that the precision computes in.

    Lightning's table has it; None if the device or the dtype is not in the table.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a GPU that is not in Lightning's table
            return get_available_flops(trainer.strategy.root_device, _plugin_to_compute_dtype(trainer.precision_plugin))
    except Exception:  # a device name of another form, or a precision of the experiment's own
        return None


# -------------------------------------------------------------------------------------------------------------- logging


class LoggedValue(_ResultMetric):
    """The value logged under one name. Lightning moves it to its device in each `self.log`; here only if needed."""

    place: object = None
    # If steps return a weight (step_log.py): the sum of loss times weight, the sum of the weights, and the number of
    # steps in which the logged value differs from the loss.
    as_loss: Tensor | None = None

    def to(self, *place: object, **options: object) -> "LoggedValue":
        """Move its tensors and its metric, to a device as torch's `to` takes it."""
        if (place, options) != self.place:
            super().to(*place, **options)
            self.place = place, options
        return self

    def forward(self, value: Tensor | Metric, batch_size: int) -> None:
        """Log a value; its name is known while ranks exchange it."""
        global _being_logged
        _being_logged = self.meta.name
        try:
            super().forward(value, batch_size)
        finally:
            _being_logged = None

    @property
    def of_step(self) -> object:
        """The value of the last step, None without one."""
        return self._forward_cache

    @of_step.setter
    def of_step(self, value: object) -> None:
        self._forward_cache = value

    @property
    def updates(self) -> int:
        """How often it was logged since the last reset."""
        return self._update_count

    @updates.setter
    def updates(self, number: int) -> None:
        self._update_count = number

    def add(self, sums: Tensor, as_loss: Tensor | None) -> None:
        """Add a step to an average.

        Args:
            sums: of the values, already multiplied, and of their weights.
            as_loss: the same of the loss, and 1 if the values differ from it; None if the step returned no weight.
        """
        if as_loss is not None or self.as_loss is not None:
            before = self.as_loss
            if before is None:
                value = self.value.double()
                before = torch.stack([value, self.cumulated_batch_size.double(), torch.zeros_like(value)])
            self.as_loss = before + (torch.cat([sums, sums.new_zeros(1)]) if as_loss is None else as_loss)
        self.value, self.cumulated_batch_size = self.value + sums[0], self.cumulated_batch_size + sums[1]

    def compute(self) -> Tensor:
        """Return the value of the epoch: weighted as the loss if it was the loss in every step."""
        value = super().compute()
        if self.as_loss is None:
            return value
        total, weight, steps = self.as_loss.unbind()
        return torch.where(steps > 0, value, total / weight)

    def reset(self) -> None:
        """Begin an epoch."""
        super().reset()
        self.as_loss = None

    def put_metric_of_step(self, metric: Metric) -> None:
        """Take a torchmetrics.Metric, with its value of the last step."""
        self.value, self._forward_cache = metric, metric._forward_cache

    def forget_computed(self) -> None:
        """Compute it again when it is next asked for."""
        self._computed = None

    def nothing(self) -> Tensor:
        """Return the value that logging starts with."""
        return cast(Tensor, self._defaults["value"])

    def empty(self) -> None:
        """Reset it, without the 20 microseconds of torchmetrics' own reset."""
        self.has_reset, self._computed = True, None
        if self.is_tensor:
            self.value = self.nothing()
            if self.meta.is_mean_reduction:
                self.cumulated_batch_size = cast(Tensor, self._defaults["cumulated_batch_size"])


_being_logged: str | None = None


def being_logged() -> str | None:
    """Return the name of the value that `self.log` is handling."""
    return _being_logged


class LoggedValues(_ResultCollection):
    """What a loop has logged, by Lightning's key; each value is a LoggedValue."""

    def __setitem__(self, key: str, entry: _ResultMetric) -> None:
        entry.__class__ = LoggedValue
        super().__setitem__(key, entry)


def new_entry(
    meta: ResultMeta | Mapping[str, Any],
    *,
    is_tensor: bool,
    reduce: Callable[..., object],
    should: bool = True,
    rank_zero_only: bool = False,
) -> LoggedValue:
    """Return an entry for a name without logged values.

    Args:
        meta: Lightning's description of it, or the fields of one.
        is_tensor: else it is a torchmetrics.Metric.
        reduce: over the ranks.
        should: whether to reduce.
        rank_zero_only: whether only rank 0 logs it.
    """
    meta = dataclasses.replace(meta) if isinstance(meta, ResultMeta) else ResultMeta(**meta)
    meta.sync = _Sync(fn=reduce, _should=should, rank_zero_only=rank_zero_only)
    return LoggedValue(meta, is_tensor)


def without_sync(meta: ResultMeta) -> ResultMeta:
    """Return a description that is equal on all ranks."""
    return dataclasses.replace(meta, _sync=None)


def fields_of(meta: ResultMeta) -> dict[str, object]:
    """Return the fields of a description that are plain values: all but its two functions."""
    names = (part.name for part in dataclasses.fields(meta))
    return {name: getattr(meta, name) for name in names if name not in ("_sync", "reduce_fx")}


def active_results(trainer: pl.Trainer) -> ResultCollection | None:
    """Return what the loop that runs has logged; None outside of all loops."""
    return trainer._results


def results_of(loop: AnyLoop) -> ResultCollection:
    """Return what a loop has logged."""
    return loop._results


def put_results(loop: AnyLoop, results: ResultCollection) -> None:
    """Let a loop log into another collection."""
    loop._results = results


def logger_connector(trainer: pl.Trainer) -> object:
    """Return the part of the trainer that keeps metrics."""
    return trainer._logger_connector


def before_epoch_metrics(trainer: pl.Trainer, call: Callable[[], None]) -> None:
    """Call a function before Lightning computes the values logged for the end of an epoch."""
    connector = trainer._logger_connector
    end = type(connector).on_epoch_end

    def on_epoch_end() -> None:
        call()
        end(connector)

    connector.on_epoch_end = on_epoch_end  # type: ignore[method-assign]


def restore_metrics(trainer: pl.Trainer, metrics: Mapping[str, Tensor], *, first_batch: bool) -> None:
    """Put `trainer.callback_metrics` back, in a training step. In an epoch's first one Lightning empties its sums."""
    connector = trainer._logger_connector
    connector._first_loop_iter = first_batch
    connector._current_fx = "training_step"
    connector._callback_metrics.update(metrics)


@contextmanager
def keep_logging_hook(trainer: pl.Trainer) -> Iterator[None]:
    """Let hooks log in a block: the next `self.log` of the code around it does not reset its values."""
    connector = trainer._logger_connector
    before = connector._current_fx
    yield
    connector._current_fx = before


def silence_loggers(trainer: pl.Trainer) -> None:
    """Replace each of the trainer's loggers with one that writes nothing."""
    trainer._loggers = mute_loggers(len(trainer._loggers))


def mute_loggers(number: int) -> list[Logger]:
    """Return loggers that write nothing, for code that uses its loggers."""
    return [DummyLogger() for _ in range(number)]


class QuietWriter(ExperimentWriter):
    """Lightning's CSV writer, which starts a new file, without the warning about existing files."""

    def _check_log_dir_exists(self) -> None:
        Path(self.metrics_file_path).unlink(missing_ok=True)


def experiment_of(logger: CSVLogger | WandbLogger) -> object:
    """Return what a logger writes into; None until it is first used."""
    return logger._experiment


def put_experiment(logger: CSVLogger, experiment: ExperimentWriter) -> None:
    """Let a logger write into an experiment that was made for it."""
    logger._experiment = experiment


def is_offline(logger: WandbLogger) -> bool:
    """Return whether W&B keeps the run on this machine."""
    return bool(logger._offline)


def trainer_of(module: torch.nn.Module) -> pl.Trainer | None:
    """Return the trainer of a model; None before a training, and for a module that is not Lightning's."""
    return module._trainer if isinstance(module, pl.LightningModule) else None


def is_begun(logger: MLFlowLogger) -> bool:
    """Return whether an MLflow logger has its run."""
    return bool(logger._initialized)


def mlflow_of(logger: MLFlowLogger) -> tuple[Any, str]:
    """Return a logger's client, without beginning a run, and the name of its experiment."""
    return logger._mlflow_client, logger._experiment_name


def take_up(logger: MLFlowLogger, run_id: str) -> None:
    """Let a logger continue a run that MLflow has."""
    logger._run_id = run_id


# ---------------------------------------------------------------------------------------------------------- checkpoints


class CheckpointConnector(_CheckpointConnector):
    """The part of the trainer that loads and restores a checkpoint."""

    @property
    def loaded(self) -> State:
        """The checkpoint that is being restored; empty if there is none."""
        return self._loaded_checkpoint

    @loaded.setter
    def loaded(self, checkpoint: dict[str, object]) -> None:
        self._loaded_checkpoint = checkpoint

    def putting_back(self) -> AbstractContextManager[None]:
        """Return the context manager around each step of a restore."""
        return nullcontext()

    def begin(self) -> None:
        """Prepare the model, when all its parts exist and no checkpoint has been restored."""

    def _restore_modules_and_callbacks(
        self, checkpoint_path: str | Path | None = None, weights_only: bool | None = None
    ) -> None:
        self.begin()
        with self.putting_back():
            super()._restore_modules_and_callbacks(checkpoint_path, weights_only)


def checkpoint_connector(trainer: pl.Trainer) -> _CheckpointConnector:
    """Return the part of the trainer that saves and loads checkpoints."""
    return trainer._checkpoint_connector


def put_checkpoint_connector(trainer: pl.Trainer, connector: CheckpointConnector) -> None:
    """Let a trainer load its checkpoint by another connector."""
    trainer._checkpoint_connector = connector


def call_module_hook(trainer: pl.Trainer, hook: str, *arguments: object) -> object:
    """Call a hook of the model as Lightning does."""
    return _call_lightning_module_hook(trainer, hook, *arguments)


# ---------------------------------------------------------------------------------------------------------- the module


def broadcast_module(module: torch.nn.Module, left_out: Iterable[str]) -> None:
    """Send rank 0's parameters and buffers to all ranks.

    Args:
        module: the model.
        left_out: names of buffers that are not sent, beside those that the model itself leaves out.
    """
    kept: Any = module  # users of DistributedDataParallel set this attribute
    kept._ddp_params_and_buffers_to_ignore = [*getattr(module, "_ddp_params_and_buffers_to_ignore", []), *left_out]
    _sync_module_states(module)


def prepare_batch(module: pl.LightningModule, batch: object, dataloader_idx: int) -> object:
    """Call on_before_batch_transfer of model or data module, as Lightning does before a batch is moved."""
    return type(module)._on_before_batch_transfer(module, batch, dataloader_idx)


def put_off_preparing(module: pl.LightningModule, is_later: Callable[[object], bool]) -> None:
    """Keep Lightning from preparing batches for which `is_later` is true: `prepare_batch` then gets their parts."""
    module._on_before_batch_transfer = (  # type: ignore[method-assign]
        lambda batch, dataloader_idx=0: batch if is_later(batch) else prepare_batch(module, batch, dataloader_idx)
    )


def prepare_again(module: pl.LightningModule) -> None:
    """Undo `put_off_preparing`."""
    vars(module).pop("_on_before_batch_transfer", None)


def begin_hook(module: pl.LightningModule, name: str) -> None:
    """Let `self.log` know which hook it is called in."""
    module._current_fx_name = name


def halves_to_float(modules: Iterator[torch.nn.Module]) -> None:
    """Let `self.dtype` be float32 where it is float16 or bfloat16."""
    for part in modules:
        if getattr(part, "_dtype", None) in (torch.float16, torch.bfloat16):
            part._dtype = torch.float32  # type: ignore[assignment]
