"""W&B's logger, and the rows in its own files below wandb/ of the run's folder."""

import json
import netrc
import os
import struct
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger

from labtrain.base.contracts import Options
from labtrain.base.credentials import without_secrets
from labtrain.base.errors import ConfigError
from labtrain.base.files import Lines, write_atomically, writing
from labtrain.base.git import ask_git
from labtrain.record.identity import Job
from labtrain.training.lightning import experiment_of, is_offline
from labtrain.training.loggers.clean import Clean

WANDB_HOST = "https://api.wandb.ai"


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
        self.file: Lines | None = None

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
        self.file.add(json.dumps(row))
        self._tell(self.rows, row)

    def _tell(self, number: int, row: Mapping[str, object]) -> None:
        if number > self.told:
            self.told = number
            self.experiment.log(row, step=number - 1, commit=True)

    def _catch_up(self) -> None:
        path = self.run_dir / self.ROWS
        lines = path.read_text().splitlines(keepends=True)[: self.rows] if path.exists() else []
        with writing(path):
            write_atomically(path, "".join(lines))
        self.file = Lines(path)
        run = self.experiment
        self.told = count_rows(self.run_dir) if is_offline(self) else int(run.starting_step)
        for number, line in enumerate(lines, start=1):
            self._tell(number, json.loads(line))
        self.told = max(self.told, self.rows - len(lines))  # W&B has rows whose file was lost

    def position(self) -> int:
        return self.rows

    @rank_zero_only
    def log_receipt(self, said: Mapping[str, str], files: list[Path]) -> None:
        """Put run id and receipt digest into the run's summary, and its receipt and report beside it."""
        from wandb import Artifact

        run = self.experiment
        run.summary.update({f"labtrain/{key}": value for key, value in said.items()})
        artifact = Artifact(f"run-{said['run_id']}", type="labtrain-run", metadata=dict(said))
        for file in files:
            artifact.add_file(str(file), name=file.name)
        run.log_artifact(artifact)


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


def make_wandb(job: Job, options: Options, position: int) -> WandbLogger:
    """Return W&B's logger of a run.

    Raises:
        ConfigError: `mode` is wrong, or W&B is not installed.
    """
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
