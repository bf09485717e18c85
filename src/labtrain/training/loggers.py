"""The loggers of a run, below its folder: tensorboard/, metrics.csv, wandb/.

A resumed run continues the same curves. Each checkpoint holds the position of each logger. labtrain cuts off what was
logged after it, since the resumed training logs it again. W&B cannot cut, so it only gets the rows that it lacks.
"""

import argparse
import csv
import json
import netrc
import os
import struct
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from labtrain.base.contracts import Options
from labtrain.base.credentials import without_secrets
from labtrain.base.errors import ConfigError
from labtrain.base.files import write_atomically
from labtrain.base.git import ask_git
from labtrain.record.identity import Job
from labtrain.training.lightning import QuietWriter, experiment_of, is_offline, put_experiment

# The options of each logger. labtrain itself sets the folder and the name.
OPTIONS = {
    "tensorboard": {"log_graph", "default_hp_metric", "prefix", "comment", "purge_step", "max_queue", "flush_secs"}
    | {"filename_suffix"},
    "csv": {"prefix", "flush_logs_every_n_steps"},
}
OURS = {"_target_", "save_dir", "dir", "name", "id", "version", "sub_dir", "resume", "offline"}
WANDB_HOST = "https://api.wandb.ai"


def make_loggers(job: Job, *, resumed: Options | None) -> list[Logger]:
    """Return the run's loggers; none has written anything yet.

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
            loggers.append(_wandb(job, options, position.get(name, 0)))
        else:
            raise ConfigError(f"unknown logger {name}", hint="logger=tensorboard, csv, wandb, many or none")
    return loggers


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


class Clean(Logger):
    """Removes credentials: Lightning gives each logger the configuration from `save_hyperparameters`."""

    def log_hyperparams(self, params: Options | argparse.Namespace, *arguments: object, **options: object) -> None:
        params = vars(params) if isinstance(params, argparse.Namespace) else params
        super().log_hyperparams(without_secrets(params), *arguments, **options)  # type: ignore[safe-super]


class ContinuedTensorBoardLogger(Clean, TensorBoardLogger):
    """Lightning's; its position is the size of each event file.

    Without hparams.yaml, since config.yaml replaces it: Lightning imports s3fs to write it (0.2 s).
    """

    key = "tensorboard"

    def __init__(self, save_dir: str, *, position: dict[str, int], **options: Any) -> None:
        super().__init__(save_dir, **options)
        self.resumed: dict[str, int] | None = position

    @property
    @rank_zero_experiment
    def experiment(self) -> object:
        if self.resumed is not None:
            for path in self._files():
                size = self.resumed.get(path.name, 0)
                os.truncate(path, size) if size else path.unlink()
            self.resumed = None
        return super().experiment

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()

    def position(self) -> dict[str, int]:
        self.experiment.flush()
        return {path.name: path.stat().st_size for path in self._files()}

    def _files(self) -> list[Path]:
        return sorted(Path(self.log_dir).glob("events.out.tfevents.*"))


class ContinuedCSVLogger(Clean, CSVLogger):  # type: ignore[misc]
    """Lightning's, which would delete the metrics.csv it finds; its position is the number of rows."""

    key = "csv"

    def __init__(self, save_dir: str, *, position: int, **options: Any) -> None:
        super().__init__(save_dir, name="", version="", **options)
        self.resumed = position

    @property
    @rank_zero_experiment
    def experiment(self) -> object:
        if (made := experiment_of(self)) is None:
            path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
            # A copy until the kept rows are written, so that a crash loses none.
            aside = path.with_name(f".{path.name}")
            if path.exists() and not aside.exists():
                path.rename(aside)
            rows: list[Options] = []
            if aside.exists():
                with aside.open(newline="") as file:
                    rows = list(csv.DictReader(file))[: self.resumed]
            made = QuietWriter(log_dir=self.log_dir)
            made.metrics = [{key: value for key, value in row.items() if value} for row in rows]
            made.save()
            put_experiment(self, made)
            aside.unlink(missing_ok=True)
            self.rows = len(rows)
        return made

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self.rows += 1

    def position(self) -> int:
        self.experiment.save()
        return self.rows


class ContinuedWandbLogger(Clean, WandbLogger):
    """Lightning's; its position is the number of rows. W&B gets each row once, however often the training is killed.

    W&B cannot remove rows. When the training is killed, it loses rows that it has not written yet (wandb 0.31: the
    whole last block of 32 KiB). So labtrain also keeps the rows in its own file. A resumed training sends the rows that
    W&B lacks, and skips those that it has, which are the same to the last bit.
    """

    key = "wandb"
    ROWS = ".wandb-rows.jsonl"

    def __init__(self, *, position: int, **options: Any) -> None:
        super().__init__(**options)
        self.run_dir = Path(options["save_dir"])
        self.rows, self.told = position, 0
        self.file: IO[str] | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> object:
        if (made := experiment_of(self)) is not None:
            return made
        run = super().experiment
        # W&B writes printed output to output.log.
        if (told := getattr(run, "_console_raw_callback", None)) is not None:
            run._console_raw_callback = lambda name, data: told(name, without_secrets(data))
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.file is None:
            self._catch_up()
        assert self.file is not None
        self.rows += 1
        row = {**metrics, "trainer/global_step": step}
        self.file.write(json.dumps(row) + "\n")
        self._tell(self.rows, row)

    def _tell(self, number: int, row: Mapping[str, object]) -> None:
        if number > self.told:
            self.told = number
            self.experiment.log(row, step=number - 1, commit=True)

    def _catch_up(self) -> None:
        path = self.run_dir / self.ROWS
        lines = path.read_text().splitlines(keepends=True)[: self.rows] if path.exists() else []
        write_atomically(path, "".join(lines))
        self.file = path.open("a", buffering=1)
        run = self.experiment
        self.told = count_rows(self.run_dir) if is_offline(self) else int(run.starting_step)
        for number, line in enumerate(lines, start=1):
            self._tell(number, json.loads(line))
        self.told = max(self.told, self.rows - len(lines))  # W&B has rows whose file was lost

    def position(self) -> int:
        return self.rows


def count_rows(run_dir: Path) -> int:
    """Return how many rows of history W&B has written to its files below a run."""
    from wandb.proto import wandb_internal_pb2

    rows = 0
    for path in run_dir.glob("wandb/offline-run-*/run-*.wandb"):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(data)
            rows += record.WhichOneof("record_type") == "history"
    return rows


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yield the whole records of a `.wandb` file: 7 bytes, then LevelDB's log format.

    Blocks of 32 KiB with pieces of (crc, length, kind), https://github.com/google/leveldb/blob/main/doc/log_format.md.
    """
    raw, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", raw, at + 4)
        if kind == 0 or at + 7 + length > len(raw):  # truncated by a crash
            return
        record += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield record
            record = b""


def _wandb(job: Job, options: Options, position: int) -> WandbLogger:
    mode = options.pop("mode", "auto")
    if mode not in ("auto", "online", "offline"):
        raise ConfigError(f"logger.wandb.mode={mode}: must be auto, online or offline", hint="logger.wandb.mode=auto")
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    options = {key: value for key, value in options.items() if value not in (None, [])}
    options = without_secrets(options) | {key: options[key] for key in options if key == "settings"}  # W&B's own key
    # W&B does not remove a user name from the URL, which may be a token.
    remote = ask_git(".", "config", "--get", "remote.origin.url").strip()
    if (clean := without_secrets(remote)) != remote:
        options["settings"] = {"git_remote_url": clean} | dict(options.get("settings", {}))
    run = Path(job.run_dir).name
    try:
        logger = ContinuedWandbLogger(
            position=position,
            name=run,
            id=run,
            resume="allow",
            save_dir=job.run_dir,
            offline=mode == "offline",
            **options,
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            "logger=wandb needs wandb, which is not installed", hint="make setup, or logger=tensorboard"
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
def log_config(loggers: list[Logger], config: dict[str, object]) -> None:
    """Give W&B the run's configuration; other loggers have it in config.yaml."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(config)
