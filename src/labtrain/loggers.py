"""The loggers of a run, below its folder: tensorboard/, metrics.csv, wandb/.

A resumed run goes on with the same curves: what was logged after the step that it goes on from is dropped.
"""

import csv
import netrc
import os
import urllib.parse
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from labtrain.errors import ConfigError
from labtrain.run import Job

WANDB_HOST = "https://api.wandb.ai"


def make_loggers(job: Job, *, resumed_step: int) -> list[Logger]:
    """Return the run's loggers; none has written anything yet.

    Args:
        job: its `logger` names each logger and its options.
        resumed_step: what was logged from here on, before the training was stopped, is dropped.

    Raises:
        ConfigError: a logger that labtrain does not know, or that is not installed.
    """
    loggers: list[Logger] = []
    for name, options in job.config["logger"].items():
        options = dict(options or {})
        if name == "tensorboard":
            if resumed_step:
                options["purge_step"] = resumed_step
            loggers.append(
                PlainTensorBoardLogger(job.run_dir, name=name, version="", default_hp_metric=False, **options)
            )
        elif name == "csv":
            loggers.append(ContinuedCSVLogger(job.run_dir, resumed_step=resumed_step, **options))
        elif name == "wandb":
            loggers.append(_wandb(job, options))
        else:
            raise ConfigError(f"unknown logger {name}", hint="logger=tensorboard, csv, wandb, many or none")
    return loggers


class PlainTensorBoardLogger(TensorBoardLogger):
    """Lightning's, without the hparams.yaml that config.yaml makes needless: to write it, it imports s3fs (0.2 s)."""

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()


class ContinuedCSVLogger(CSVLogger):
    """Lightning's CSV logger, which would delete the metrics.csv it finds; here the rows before the step are kept."""

    def __init__(self, save_dir: str, *, resumed_step: int, **options: Any) -> None:
        super().__init__(save_dir, name="", version="", **options)
        self.resumed_step = resumed_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
            rows: list[dict[str, Any]] = []
            if path.exists():
                with path.open(newline="") as file:
                    rows = [row for row in csv.DictReader(file) if int(row["step"]) < self.resumed_step]
                path.unlink()
            self._experiment = ExperimentWriter(log_dir=self.log_dir)
            self._experiment.metrics = [{key: value for key, value in row.items() if value} for row in rows]
        return self._experiment


def _wandb(job: Job, options: dict[str, Any]) -> WandbLogger:
    mode = options.pop("mode", "auto")
    if mode not in ("auto", "online", "offline"):
        raise ConfigError(
            f"logger.wandb.mode={mode}: one of auto, online, offline is wanted", hint="logger.wandb.mode=auto"
        )
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    options = {key: value for key, value in options.items() if value not in (None, [])}
    run = Path(job.run_dir).name
    try:
        logger = WandbLogger(
            name=run, id=run, resume="allow", save_dir=job.run_dir, offline=mode == "offline", **options
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            "logger=wandb, and wandb is not installed", hint="make setup, or logger=tensorboard"
        ) from error
    return logger


def has_wandb_key() -> bool:
    """Return whether W&B would find a key where it looks for one: WANDB_API_KEY, or its host in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_HOST)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@rank_zero_only
def log_config(loggers: list[Logger], config: dict[str, Any]) -> None:
    """Give W&B the run's configuration; the others have it in config.yaml."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(config)
