"""MLflow's logger: one MLflow run for each of labtrain's runs, however often the training is resumed."""

import argparse
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger

from labtrain.base.contracts import Options
from labtrain.base.errors import ConfigError
from labtrain.training.lightning import is_begun, mlflow_of, take_up
from labtrain.training.loggers.clean import Clean

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TAG = "labtrain.run_id"
# MLflow waits 2 + 4 + ... seconds for a server that does not answer, in all eight minutes: too long at the start.
FIRST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@contextmanager
def _soon(uri: str) -> Iterator[None]:
    """Wait for MLflow's first answer for less than a minute, unless the user has set how long.

    Raises:
        ConfigError: there is no answer, or an error.
    """
    from mlflow.exceptions import MlflowException

    mine = {name: value for name, value in FIRST.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    except MlflowException as error:
        said = " ".join(str(error).split())
        hint = f"start the server, or set logger.mlflow.tracking_uri; {next(iter(FIRST))} sets how often to retry"
        raise ConfigError(f"MLflow at {uri}: {said[:300]}", hint=hint) from error
    finally:
        for name in mine:
            del os.environ[name]


class ContinuedMLFlowLogger(Clean, MLFlowLogger):
    """Lightning's; a resumed training continues the MLflow run that has its run id as a tag.

    MLflow cannot remove rows. A resumed training skips the steps of a metric that MLflow has, which are the same to the
    last bit.
    """

    def __init__(self, *, own_id: str, tags: Mapping[str, str] | None = None, prefix: str = "", **options: Any) -> None:
        super().__init__(tags={**(tags or {}), TAG: own_id}, prefix=prefix, **options)
        self.own_id, self.prefix = own_id, prefix
        self.server = str(options.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI"))
        self.continues = False
        self.last: dict[str, int] = {}  # the newest step of each metric that MLflow had before this start

    @property
    @rank_zero_experiment
    def experiment(self) -> "MlflowClient":
        if not is_begun(self):
            with _soon(self.server):
                self._take_up()
        return super().experiment

    def _take_up(self) -> None:
        """Continue the MLflow run of an earlier start, if there is one."""
        client, name = mlflow_of(self)
        there = client.get_experiment_by_name(name)
        if there is None or there.lifecycle_stage == "deleted":
            return
        found = client.search_runs([there.experiment_id], f"tags.`{TAG}` = '{self.own_id}'", max_results=1)
        if not found:
            return
        run_id, self.continues = found[0].info.run_id, True
        take_up(self, run_id)
        client.update_run(run_id, status="RUNNING")
        for key in found[0].data.metrics:
            self.last[key] = max(metric.step for metric in client.get_metric_history(run_id, key))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert self.experiment is not None  # so that `last` is known
        new = {key: value for key, value in metrics.items() if (step or 0) > self.last.get(self._named(key), -1)}
        if new:
            super().log_metrics(new, step)

    def _named(self, key: str) -> str:
        """Return a metric's name as MLflow has it: lightning/pytorch/loggers/mlflow.py log_metrics."""
        return re.sub("[^a-zA-Z0-9_/. -]+", "", f"{self.prefix}-{key}" if self.prefix else key)

    @rank_zero_only
    def log_hyperparams(self, params: Options | argparse.Namespace, *arguments: object, **options: object) -> None:
        """Log them once: MLflow refuses another value, such as another number of devices after a resume."""
        assert self.experiment is not None
        if not self.continues:
            super().log_hyperparams(params, *arguments, **options)

    @rank_zero_only
    def log_receipt(self, said: Mapping[str, str], files: list[Path]) -> None:
        """Put run id and receipt digest into the run's tags, and its receipt and report beside it."""
        for key, value in said.items():
            self.experiment.set_tag(self.run_id, f"labtrain.{key}", value)
        for file in files:
            self.experiment.log_artifact(self.run_id, str(file))
        self.finalize("success")
