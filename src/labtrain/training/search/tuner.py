"""What the searches have in common: model and data under the run's seed and flags, on one device, without a folder."""

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import lightning.pytorch as pl

from labtrain.base.signals import Wishes
from labtrain.exact import determinism
from labtrain.record.identity import Config
from labtrain.training.cluster import make_environment
from labtrain.training.devices import choose_accelerator
from labtrain.training.instantiate import instantiate
from labtrain.training.loaders import take_loaders
from labtrain.training.speed import check_compiler, hasten, own_compiles
from labtrain.training.trainer import make_trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """What a search trains, and on what kind of device."""

    trainer: pl.Trainer
    model: pl.LightningModule
    datamodule: pl.LightningDataModule
    accelerator: str


@contextmanager
def searching(config: Config, *, said: tuple[str, ...]) -> Iterator[Searched]:
    """Make model, data and trainer for a search; remove the trainer's folder afterwards.

    Args:
        config: of a training on one device, without callbacks and loggers.
        said: beginnings of Lightning's messages about the search, the only ones to print.
    """
    seed, determined = config["seed"], config["determinism"]
    accelerator, devices = choose_accelerator(config)
    check_compiler(config["speed"], accelerator)
    determinism.set_run(seed=seed, mode=determined["mode"], accelerator=accelerator)
    determinism.apply(
        determined["mode"], threads=determined["threads"], tf32=config["speed"]["tf32"] and accelerator == "gpu"
    )
    # The folder holds the initial weights, which each trial restores.
    with own_compiles(determined["mode"]), tempfile.TemporaryDirectory() as scratch:
        determinism.seed_all(seed, "init")
        datamodule = instantiate(config["data"], "data", pl.LightningDataModule)
        take_loaders(datamodule, lambda loader: loader)
        determinism.seed_all(seed, "init")
        model = instantiate(config["model"], "model", pl.LightningModule)
        hasten(model, config["speed"], mode=determined["mode"], say=say)
        _print_only(said)
        alone = make_environment(None, accelerator=accelerator)
        trainer = make_trainer(config, accelerator, devices, alone, [], [], Wishes(), root=scratch)
        yield Searched(trainer=trainer, model=model, datamodule=datamodule, accelerator=accelerator)


def _print_only(said: tuple[str, ...]) -> None:
    """Print only Lightning's messages that begin so, to standard error."""
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(lambda record: record.getMessage().startswith(said))


def say(text: str) -> None:
    """Print a line to standard error."""
    sys.stderr.write(f"{text}\n")
