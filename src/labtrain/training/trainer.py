"""The Trainer of one run: the experiment's model, data and callbacks, and labtrain's callbacks."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from labtrain.base.contracts import Options, as_options
from labtrain.base.errors import ConfigError
from labtrain.base.signals import Wishes
from labtrain.exact import determinism
from labtrain.record.fingerprints import noting_opened, places_in
from labtrain.record.identity import Config, Job, shards_in_use
from labtrain.record.sources import Code, load_from_source, note_executed, read_code
from labtrain.record.trail import TRAIL
from labtrain.training.callbacks.agreement import Agreement
from labtrain.training.callbacks.checkpoint import Checkpoints, FolderIO
from labtrain.training.callbacks.gpu_stats import GpuStats
from labtrain.training.callbacks.history import History
from labtrain.training.callbacks.outputs import WholeOutputs
from labtrain.training.callbacks.recorder import Recorder
from labtrain.training.callbacks.steps import BatchSizes, Progress, Seeding, Trail
from labtrain.training.devices import make_strategy
from labtrain.training.guard import Guard
from labtrain.training.instantiate import instantiate
from labtrain.training.sharded.objective import Objective
from labtrain.training.speed import Speed

# Lightning would print what they find, or write it into the first logger's folder.
PROFILERS: dict[str, Callable[..., Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """The objects that the configuration describes.

    Attributes:
        model: from `model`.
        datamodule: from `data`.
        callbacks: from `callbacks`, by name.
        code: the code that names the run; None in mode off.
        modules: names of the modules that were imported before these objects were made.
        places: files and folders that the configuration names, or that were opened while the data was made.
    """

    model: pl.LightningModule
    datamodule: pl.LightningDataModule
    callbacks: dict[str, pl.Callback]
    code: Code | None
    modules: set[str]
    places: set[Path]


def make_experiment(job: Job) -> Experiment:
    """Make model, data and callbacks, each under the run's seed.

    Raises:
        ConfigError: one of them cannot be made.
    """
    config, seed = job.config, job.config["seed"]
    code, modules = named_code(job), set(sys.modules)
    places = set(places_in([config["model"], config["data"]]))
    with noting_opened(places):
        determinism.seed_all(seed, "init")
        datamodule = instantiate(config["data"], "data", pl.LightningDataModule)
        determinism.seed_all(seed, "init")  # seed again: the data's draws must not change the weights
        model = make_model(config["model"])
    for hook in ("prepare_data", "setup"):
        setattr(datamodule, hook, noting_opened(places)(getattr(datamodule, hook)))
    callbacks = {
        name: instantiate(options, f"callbacks.{name}", pl.Callback)
        for name, options in config["callbacks"].items()
        if options
    }
    return Experiment(
        model=model, datamodule=datamodule, callbacks=callbacks, code=code, modules=modules, places=places
    )


def named_code(job: Job) -> Code | None:
    """Return the code that names the run, and load code from source from now on; None in mode off.

    Raises:
        ConfigError: the code changed after the run was named.
    """
    if job.config["determinism"]["mode"] == "off":
        return None
    load_from_source()
    note_executed()
    code = read_code(Path(job.root), as_options(job.config))
    if job.code_digest not in ("", code.digest):
        raise ConfigError("the code changed while the training started", hint="start it again")
    return code


def seeded_alike(set_up: Callable[[], None]) -> None:
    """Run a datamodule's setup with the same draws for "fit", for "test", and on each rank.

    So a random split gives the same parts to the training and to the test. Its draws do not affect later ones.
    """
    determinism.seed_place("setup")
    set_up()
    determinism.seed_place("setup")


def make_model(options: Options) -> pl.LightningModule:
    """Make the model that a configuration's `model` describes; raise like `instantiate`."""
    return instantiate(options, "model", pl.LightningModule)


def make_callbacks(
    job: Job, checkpoints: Checkpoints, recorder: Recorder, guard: Guard, own: dict[str, pl.Callback]
) -> list[pl.Callback]:
    """Return labtrain's callbacks and the experiment's, in the order in which they run.

    Raises:
        ConfigError: the progress bars contradict each other.
    """
    config, shards, run_dir = job.config, shards_in_use(job.config), Path(job.run_dir)
    mode, every_n_steps = config["determinism"]["mode"], config["trail"]["every_n_steps"]
    history = History(run_dir, batch_size=config["data"]["batch_size"])
    callbacks: list[pl.Callback] = [checkpoints, guard]  # first: counters are restored before other callbacks read them
    callbacks += [Speed(config["speed"], mode=mode, say=recorder.say), Agreement(mode=mode, say=recorder.say)]
    if shards is not None and shards > 1 and mode != "off":
        strict = mode in determinism.STRICT_MODES
        callbacks.append(
            Objective(
                shards=shards,
                strict=strict,
                judge=guard.judge,
                say=recorder.say,
                note=recorder.note,
                count=history.put_flops,
            )
        )
    callbacks += [Seeding(per_rank=shards is None), BatchSizes(), WholeOutputs(), recorder]
    if every_n_steps:
        first = recorder.resumed_step
        callbacks.append(Trail(run_dir / TRAIL, every_n_steps=every_n_steps, resumed_step=first, say=recorder.say))
    callbacks.append(history)
    if config["gpu_stats"]:
        callbacks.append(GpuStats())
    if wants_progress(config, own):
        callbacks.append(Progress(batch_size=config["data"]["batch_size"], status=checkpoints.saver.status))
    return [*callbacks, *own.values()]


def wants_progress(config: Config, own: dict[str, pl.Callback]) -> bool:
    """Return whether labtrain shows its progress bar: a progress bar of the experiment replaces it.

    Raises:
        ConfigError: the experiment has two, or has one that the configuration turns off.
    """
    bars = [name for name, callback in own.items() if isinstance(callback, ProgressBar)]
    if bars and config["trainer"]["enable_progress_bar"] is False:
        raise ConfigError(
            f"callbacks.{bars[0]} is a progress bar, but trainer.enable_progress_bar is false",
            hint=f"callbacks.{bars[0]}=null, or trainer.enable_progress_bar=true",
        )
    if len(bars) > 1:
        both = " and ".join(f"callbacks.{name}" for name in bars)
        raise ConfigError(f"{both} are progress bars: a training can have only one", hint=f"callbacks.{bars[1]}=null")
    return bool(config["trainer"]["enable_progress_bar"]) and not bars


def make_trainer(
    config: Config,
    accelerator: str,
    devices: int | list[int] | str,
    environment: ClusterEnvironment,
    loggers: list[Logger],
    callbacks: list[pl.Callback],
    wishes: Wishes,
    *,
    root: str,
) -> pl.Trainer:
    """Return Lightning's Trainer with the keys of `trainer`; null means Lightning's default.

    `check_val_every_n_epoch` is the exception: its default is 1, and null means "count batches across epochs".
    """
    options: Options = {key: value for key, value in config["trainer"].items() if value is not None}
    options["check_val_every_n_epoch"] = config["trainer"]["check_val_every_n_epoch"]
    options |= {"accelerator": accelerator, "devices": devices}
    if (profiler := PROFILERS.get(config["trainer"]["profiler"] or "")) is not None:
        options["profiler"] = profiler(dirpath=Path(root, "profiler"), filename="profile")
    if (strategy := make_strategy(config, accelerator, devices, wishes)) is not None:
        options["strategy"] = strategy
    try:
        return pl.Trainer(
            **options,
            callbacks=callbacks,
            logger=loggers or False,
            plugins=[FolderIO(), environment],
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            default_root_dir=root,
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ConfigError(
            f"Lightning's Trainer: {' '.join(str(error).split())}",
            hint="python train.py --help shows the keys of trainer",
        ) from error
