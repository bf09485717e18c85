"""The loggers of a run: TensorBoard, CSV and W&B by name, and any of Lightning's form by `_target_`.

A resumed run continues the same curves. Each checkpoint holds the position of TensorBoard, CSV and W&B. labtrain cuts
off what was logged after it, since the resumed training logs it again. W&B and MLflow cannot cut, so they only get the
rows that they lack. Other loggers get those rows again, with the same values.
"""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from labtrain.base.console import shown, warn
from labtrain.base.contracts import Options
from labtrain.base.errors import ConfigError, LabtrainError, in_words
from labtrain.base.programs import labtrain_command, run_program
from labtrain.record import receipt
from labtrain.record.identity import Job
from labtrain.training.instantiate import instantiate
from labtrain.training.loggers.clean import cleaned
from labtrain.training.loggers.files import ContinuedCSVLogger, ContinuedTensorBoardLogger
from labtrain.training.loggers.mlflow import ContinuedMLFlowLogger
from labtrain.training.loggers.wandb import ContinuedWandbLogger, make_wandb

MLFLOW = "lightning.pytorch.loggers.MLFlowLogger"
# The options of each logger that has a name. labtrain itself sets the folder and the name.
OPTIONS = {
    "tensorboard": {"log_graph", "default_hp_metric", "prefix", "comment", "purge_step", "max_queue", "flush_secs"}
    | {"filename_suffix"},
    "csv": {"prefix", "flush_logs_every_n_steps"},
}
OURS = {"_target_", "save_dir", "dir", "name", "id", "version", "sub_dir", "resume", "offline"}


def make_loggers(job: Job, *, resumed: Options | None) -> list[Logger]:
    """Return the run's loggers; labtrain's own have not written anything yet.

    Args:
        job: its `logger` names each logger and its options.
        resumed: the position of each at the checkpoint that the training resumes from, from `log_positions`.

    Raises:
        ConfigError: labtrain does not know a logger or an option, or a logger is not installed.
    """
    loggers: list[Logger] = []
    position = resumed or {}
    for name, options in job.config["logger"].items():
        options = dict(options or {})
        if "_target_" in options and name not in (*OPTIONS, "wandb"):
            loggers.append(make_other(job, name, options))
            continue
        refuse_unknown(name, options)
        if name == "tensorboard":
            loggers.append(
                ContinuedTensorBoardLogger(
                    job.run_dir,
                    position=position.get(name, {}),
                    name=name,
                    version="",
                    **({"default_hp_metric": False} | options),
                )
            )
        elif name == "csv":
            loggers.append(ContinuedCSVLogger(job.run_dir, position=position.get(name, 0), **options))
        elif name == "wandb":
            loggers.append(make_wandb(job, options, position.get(name, 0)))
        else:
            raise ConfigError(
                f"unknown logger {name}: without _target_, labtrain knows csv, tensorboard and wandb",
                hint=f"logger=tensorboard, or logger.{name}._target_=CLASS of a lightning.pytorch.loggers.Logger",
            )
    return loggers


def make_other(job: Job, name: str, options: Options) -> Logger:
    """Return a logger by its `_target_`.

    `{run_id}`, `{run_key}` and `{run_dir}` in its options become the name of the run's folder, 32 hex digits that
    identify it, and the folder's path. A service that continues a run of the same id then has one run, however often
    the training is resumed.

    Raises:
        ConfigError: it cannot be made.
    """
    run_dir = Path(job.run_dir)
    key = hashlib.sha256(run_dir.name.encode()).hexdigest()[:32]
    named = {"{run_id}": run_dir.name, "{run_key}": key, "{run_dir}": str(run_dir)}
    options = {option: _filled(value, named) for option, value in options.items()}
    if options["_target_"] == MLFLOW:
        own = f"{ContinuedMLFlowLogger.__module__}.{ContinuedMLFlowLogger.__qualname__}"
        options = {"run_name": run_dir.name, "save_dir": str(run_dir / "mlruns")} | options
        options |= {"_target_": own, "own_id": run_dir.name}
    try:
        made = instantiate(options, f"logger.{name}", Logger)  # type: ignore[type-abstract]
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"logger.{name}: {in_words(error)}", hint=_hint(name)) from error
    return cleaned(made)


def _filled(value: object, named: dict[str, str]) -> object:
    if isinstance(value, dict):
        return {key: _filled(each, named) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, named) for each in value]
    if isinstance(value, str):
        for placeholder, text in named.items():
            value = value.replace(placeholder, text)
    return value


def _hint(name: str) -> str:
    return f"see that its service runs and that its package is installed; logger=csv trains without logger.{name}"


def refuse_unknown(name: str, options: dict[str, object]) -> None:
    """Refuse an option that a logger does not have, or that labtrain sets.

    Raises:
        ConfigError: names it.
    """
    takes = OPTIONS.get(name)
    for key in options:
        if key in OURS or (takes is not None and key not in takes):
            why = (
                "labtrain sets this option, so that the logger writes into the run's folder"
                if key in OURS
                else "no such option"
            )
            taken = ", ".join(sorted(takes)) if takes else "project, entity, group, tags, notes, mode"
            raise ConfigError(
                f"logger.{name}.{key}={options[key]}: {why}", hint=f"remove {key}; logger.{name} takes {taken}"
            )


def log_positions(loggers: list[Logger]) -> dict[str, object]:
    """Return the position of each logger, by its name; flush its files first."""
    return {
        logger.key: logger.position()
        for logger in loggers
        if isinstance(logger, ContinuedTensorBoardLogger | ContinuedCSVLogger | ContinuedWandbLogger)
    }


@rank_zero_only
def log_config(loggers: list[Logger], config: Options, *, run_id: str) -> None:
    """Give the services the run's configuration and its name; files in the run's folder have config.yaml beside them.

    Raises:
        ConfigError: a service does not answer.
    """
    for logger in loggers:
        if isinstance(logger, ContinuedTensorBoardLogger | ContinuedCSVLogger):
            continue
        try:
            logger.log_hyperparams({**config, "labtrain": {"run_id": run_id}})
        except Exception as error:
            name = str(logger.name or type(logger).__name__)
            raise ConfigError(f"logger {type(logger).__name__}: {in_words(error)}", hint=_hint(name)) from error


def log_receipt(loggers: list[Logger], run_dir: Path) -> None:
    """Tell each logger the run's id and its receipt's digest; W&B and MLflow also get receipt and report.

    The run is complete: if a service fails now, labtrain warns. On rank 0.
    """
    found = receipt.read(run_dir)
    if found is None:
        return
    said = {"run_id": run_dir.name, "receipt_digest": found["digest"]}
    for logger in loggers:
        try:
            if isinstance(logger, ContinuedMLFlowLogger | ContinuedWandbLogger):
                with TemporaryDirectory(prefix="labtrain-") as folder:
                    logger.log_receipt(said, [run_dir / receipt.FILE, report_of(run_dir, Path(folder))])
            elif isinstance(logger, ContinuedTensorBoardLogger | ContinuedCSVLogger):
                logger.log_receipt(said)
            else:
                logger.log_hyperparams({"labtrain": said})
                logger.finalize("success")
        except Exception as error:
            warn(f"{shown(run_dir)}: {type(logger).__name__} did not take the receipt: {in_words(error)}")


def report_of(run_dir: Path, folder: Path) -> Path:
    """Write a run's report into a folder, as `labtrain report` does.

    Raises:
        LabtrainError: it cannot be written.
    """
    path = folder / "report.html"
    command = labtrain_command("report", run_dir, "--output", path)
    done = run_program(command, timeout_s=120, hint=f"labtrain report {shown(run_dir)}")
    if done.returncode:
        raise LabtrainError(f"no report: {done.stderr.strip()}", hint=f"labtrain report {shown(run_dir)}")
    return path
