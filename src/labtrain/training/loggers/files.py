"""TensorBoard's and CSV's files in the run's folder: tensorboard/ and metrics.csv."""

import csv
import os
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from labtrain.base.contracts import Options
from labtrain.base.errors import WriteError
from labtrain.base.files import write_atomically, writing
from labtrain.training.lightning import QuietWriter, experiment_of, put_experiment
from labtrain.training.loggers.clean import Clean


class OwnFiles(Clean):
    """Names the logger's file or folder in the error of a full or broken disk."""

    file = ""  # in the logger's folder; empty: the folder itself is named

    def _writing(self) -> AbstractContextManager[None]:
        return writing(Path(self.log_dir or "", self.file))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self._writing():
            super().log_metrics(dict(metrics), step)  # type: ignore[safe-super]

    def save(self) -> None:
        with self._writing():
            super().save()

    def finalize(self, status: str) -> None:
        try:
            with self._writing():
                super().finalize(status)
        except WriteError:
            if status != "failed":  # else the training ends with its own error
                raise


class ContinuedTensorBoardLogger(OwnFiles, TensorBoardLogger):
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
            _quiet_writers()
            with self._writing():
                for path in self._files():
                    size = min(self.resumed.get(path.name, 0), path.stat().st_size)
                    os.truncate(path, size) if size else path.unlink()
                self.resumed = None
        with self._writing():
            return super().experiment

    @rank_zero_only
    def save(self) -> None:
        with self._writing():
            self.experiment.flush()

    def position(self) -> dict[str, int]:
        with self._writing():
            self.experiment.flush()
        return {path.name: path.stat().st_size for path in self._files()}

    @rank_zero_only
    def log_receipt(self, said: Mapping[str, str]) -> None:
        """Write run id and receipt digest as texts."""
        for key, value in said.items():
            self.experiment.add_text(f"labtrain/{key}", value)
        self.finalize("success")

    def _files(self) -> list[Path]:
        return sorted(Path(self.log_dir).glob("events.out.tfevents.*"))


class ContinuedCSVLogger(OwnFiles, CSVLogger):  # type: ignore[misc]
    """Lightning's, which would delete the metrics.csv it finds; its position is the number of rows."""

    key = "csv"
    file = ExperimentWriter.NAME_METRICS_FILE

    def __init__(self, save_dir: str, *, position: int, **options: Any) -> None:
        super().__init__(save_dir, name="", version="", **options)
        self.resumed = position

    @property
    @rank_zero_experiment
    def experiment(self) -> object:
        if (made := experiment_of(self)) is None:
            with self._writing():
                made = self._continued()
        return made

    def _continued(self) -> ExperimentWriter:
        """Return the writer, after the rows that are kept."""
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
        with self._writing():
            self.experiment.save()
        return self.rows

    @rank_zero_only
    def log_receipt(self, said: Mapping[str, str]) -> None:
        """Write run id and receipt digest to hparams.yaml, where Lightning's logger has what is not a metric."""
        write_atomically(Path(self.log_dir) / ExperimentWriter.NAME_HPARAMS_FILE, yaml.safe_dump(dict(said)))


def _quiet_writers() -> None:
    """Print no traceback of TensorBoard's thread, which passes its error on to the next call."""
    shown = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not (type(raised.thread).__module__.startswith("tensorboard.") and isinstance(raised.exc_value, OSError)):
            shown(raised)

    threading.excepthook = hook
