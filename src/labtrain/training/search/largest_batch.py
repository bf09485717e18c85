"""The largest data.batch_size that fits, by Lightning's Tuner: the search of `labtrain batch-size`."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.tuner.tuning import Tuner

from labtrain.base.contracts import Options
from labtrain.base.errors import ConfigError, DeviceError
from labtrain.record.identity import Config, shards_in_use
from labtrain.training.search.tuner import say, searching

SAID = ("Batch size", "The batch size", "Reached", "Applying")  # beginnings of Lightning's messages about the search


def largest(config: Config, *, mode: str, max_trials: int, steps: int) -> int:
    """Train for some steps with one size after another, report the progress, and return the largest that fits.

    Raises:
        LabtrainError: it cannot be trained, or not even one sample a shard fits.
    """
    shards = shards_in_use(config)
    smallest = max(2, shards or 1)
    config["data"]["batch_size"] = smallest
    with searching(config, said=SAID) as search:
        datamodule, trainer = _sized(search.datamodule), search.trainer
        if search.accelerator == "cpu":
            say("a CPU does not report full memory: the search ends at the size of the data, 8192 or --max-trials")
        fitted = _noting_sizes(trainer, datamodule)
        options: Options = {"mode": mode, "steps_per_trial": steps, "max_trials": max_trials}
        try:
            found = Tuner(trainer).scale_batch_size(search.model, datamodule=datamodule, init_val=smallest, **options)
        except ConfigError as error:
            if datamodule.batch_size >= smallest:
                raise
            raise DeviceError(
                f"out of memory at data.batch_size={smallest}, the smallest size for determinism.shards={shards}",
                hint="trainer.precision=bf16-mixed, speed.checkpoint_activations=true, or a smaller model",
            ) from error
    assert found is not None
    found = max(smallest, min(found, max(fitted)))  # Lightning returns 8192 without trying it
    say(f"data.batch_size={found}: {held_at_once(found, shards)}")
    return found


def _sized(datamodule: Any) -> Any:
    """Return a datamodule whose batch size can be set.

    Raises:
        ConfigError: it has no batch size.
    """
    if not hasattr(datamodule, "batch_size"):
        raise ConfigError(
            f"{type(datamodule).__name__} has no attribute batch_size: the search sets it, then asks for loaders",
            hint="set self.batch_size = batch_size in its __init__, and make the loaders with self.batch_size",
        )
    return datamodule


def _noting_sizes(trainer: pl.Trainer, datamodule: Any) -> list[int]:
    """Return a list that collects the batch size of each completed trial."""
    fitted: list[int] = []
    run = trainer.fit_loop.run

    def noted() -> None:
        run()
        fitted.append(datamodule.batch_size)

    trainer.fit_loop.run = noted  # type: ignore[method-assign]
    return fitted


def held_at_once(size: int, shards: int | None) -> str:
    """Return, in words, how much of a batch is in memory at once, and on how many devices."""
    if shards is None:
        return "on one device; without determinism.shards, several devices would divide it"
    return (
        f"determinism.shards={shards}, shards of {-(-size // shards)} samples, one after the other on one device,"
        f" or on up to {shards} devices"
    )
