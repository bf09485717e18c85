"""Sweeps whose sweeper chooses trials by earlier results, such as Optuna's (docs/guides/sweeps.md). No torch.

The callback is in `hydra.callbacks` in conf/labtrain.yaml: only a callback runs between composing a sweep and its
sampler. https://hydra.cc/docs/1.3/plugins/optuna_sweeper/
"""

import atexit
import math
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Container, Iterable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from labtrain.base.console import shown
from labtrain.base.credentials import remember, without_secrets
from labtrain.base.errors import ConfigError, JobFailedError
from labtrain.base.permissions import make_folder
from labtrain.base.programs import labtrain_command
from labtrain.record import receipt
from labtrain.record.identity import Job
from labtrain.record.ranks import find_ranks, own_rank

if TYPE_CHECKING:
    from omegaconf import DictConfig

PLUGIN = "hydra_plugins.hydra_optuna_sweeper"
SQLITE = "sqlite:///"
RUNS = "LABTRAIN_SWEEP_RUNS"  # a file with the folders of the sweep's runs


class SweepStart(Callback):
    """Completes a sweeper's settings, and raises on unusable ones before anything is trained."""

    def on_multirun_start(self, config: "DictConfig", **kwargs: object) -> None:
        try:
            refuse_under_launcher()
            complete(config)
            save_without_secrets()
            folder = Path(config.hydra.sweep.dir).absolute()
            atexit.register(_remove_empty, [each for each in (folder, *folder.parents) if not each.exists()])
            make_folder(folder)  # before Hydra makes it, because it may be shared
            os.environ[RUNS] = str(folder / f"runs-{os.getpid()}")
        except ConfigError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(error.exit_code)  # Hydra turns any Exception into a warning: hydra/_internal/callbacks.py

    def on_multirun_end(self, config: "DictConfig", **kwargs: object) -> None:
        """Print the table of the sweep's runs."""
        path = Path(os.environ.pop(RUNS))
        if not path.exists():
            return
        runs = list(dict.fromkeys(path.read_text().splitlines()))
        path.unlink()
        sys.stdout.flush()
        subprocess.run(labtrain_command("ls", *runs), stdout=2, check=False)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that are empty, the innermost first: the sweeper has refused its settings."""
    with suppress(OSError):
        for each in folders:
            each.rmdir()


def note_run(run_dir: str) -> None:
    """Note a run of this sweep for the table at its end."""
    if RUNS in os.environ:
        path = Path(os.environ[RUNS])
        make_folder(path.parent)
        with path.open("a") as file:
            file.write(f"{run_dir}\n")


def refuse_under_launcher() -> None:
    """Refuse `torchrun train.py -m` and `srun -n2 train.py hydra.mode=MULTIRUN`: each copy would run the whole sweep.

    Raises:
        ConfigError: a launcher started several copies of this process.
    """
    if (ranks := find_ranks()) is not None:
        raise ConfigError(
            f"each of {ranks.world} processes would run the whole sweep (-m or hydra.mode=MULTIRUN)",
            hint="start the sweep once, without the launcher: python train.py -m ...",
        )


def save_without_secrets() -> None:
    """Keep credentials out of Hydra's multirun.yaml and optimization_results.yaml."""
    from omegaconf import OmegaConf

    save = OmegaConf.save

    def save_clean(config: object, f: str | Path | IO[str], resolve: bool = False) -> None:
        plain: Any = OmegaConf.to_container(config, resolve=resolve) if OmegaConf.is_config(config) else config
        remember(plain)
        save(OmegaConf.create(without_secrets(plain)), f)

    OmegaConf.save = save_clean  # type: ignore[method-assign]


def chooses(sweeper: Container[object]) -> bool:
    """Return whether a sweeper compares runs; Hydra's basic sweeper trains every combination."""
    return "direction" in sweeper


def complete(config: "DictConfig") -> None:
    """Set a sweep's direction from checkpoint.mode and its sampler's seed from `seed`, if they are not set.

    Args:
        config: the sweep's configuration, as Hydra composed it, with its node `hydra`.

    Raises:
        ConfigError: there is no metric to compare by, or the direction contradicts checkpoint.mode.
    """
    sweeper, checkpoint = config.hydra.sweeper, config.checkpoint
    if not chooses(sweeper):
        return
    if checkpoint.monitor is None:
        raise ConfigError(
            "this sweeper needs a metric, but checkpoint.monitor is null", hint="checkpoint.monitor=val/acc"
        )
    wanted = f"{checkpoint.mode}imize"
    if isinstance(sweeper.direction, Enum):  # the plugin's default; the user's value is a text
        sweeper.direction = wanted
    elif sweeper.direction != wanted:
        raise ConfigError(
            f"hydra.sweeper.direction={sweeper.direction}, but checkpoint.mode={checkpoint.mode} needs {wanted}",
            hint=f"hydra.sweeper.direction={wanted}, or leave it out",
        )
    if sweeper.sampler.get("seed", config.seed) is None:
        sweeper.sampler.seed = config.seed
    random.seed(config.seed)  # the grid sampler draws from the global generator: optuna/samplers/_grid.py
    if str(sweeper.storage).startswith(SQLITE):
        Path(sweeper.storage.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)


def value_of(job: Job, sweeper: Container[object]) -> float | None:
    """Return the value by which a sweeper compares a complete run: the last value of checkpoint.monitor.

    It belongs to the weights in the receipt, so it does not depend on interruptions. The best value during the training
    does (verification.py).

    Raises:
        ConfigError: the run logged no such metric.
        JobFailedError: the value is not finite.
    """
    if own_rank():
        return None  # rank 0 writes the receipt and returns the value
    monitor = job.config["checkpoint"]["monitor"]
    found = receipt.read(Path(job.run_dir))
    if monitor is None or found is None:
        return None
    metrics = found["results"]["metrics"]
    if monitor not in metrics and chooses(sweeper):
        raise ConfigError(
            f"checkpoint.monitor={monitor}: {shown(job.run_dir)} logged no such metric",
            hint=f"one of these: {', '.join(sorted(metrics)) or 'none was logged'}",
        )
    value: float | None = metrics.get(monitor)
    if value is not None and chooses(sweeper) and not math.isfinite(value):
        raise JobFailedError(f"{shown(job.run_dir)} ended with {monitor} {value}", 1)
    return value


def explain(error: Exception) -> Exception:
    """Turn an error of Optuna or submitit into an error for people; return other errors unchanged."""
    if type(error).__name__ == "UncompletedJobError" or "failed during processing" in str(error):
        lines = [line for line in str(error).splitlines() if line.strip()]
        return JobFailedError(f"a job of this sweep left no result: {lines[0]} {lines[-1].strip()}", 1)
    if type(error).__name__ == "FailedJobError" or 'Could not detect "srun"' in str(error):
        return ConfigError(
            f"Slurm did not accept the job: {' '.join(str(error).split())}", hint="sinfo; sbatch --version"
        )
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not any(name.startswith(PLUGIN) for name in frames):
        return error
    if isinstance(error, JobFailedError):
        error.hint = "see its lines above; hydra.sweeper.max_failure_rate=0.5 continues while at most half of them fail"
    elif "No trials are completed" in str(error):
        return JobFailedError("every trial of this sweep failed: see the lines above", 1)
    elif isinstance(error, ValueError | AssertionError):
        spaces = "'choice(8,16)', 'range(8,64,8)', 'interval(0.001,0.1)', 'tag(log,interval(0.001,0.1))'"
        return ConfigError(f"the sweep: {error}", hint=f"a search space is one of {spaces}; docs/guides/sweeps.md")
    return error
