"""Loggers by `_target_`: MLflow with its real server, and one of a person's own."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib import parse, request

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from labtrain.record.trail import read_trail
from labtrain.training.loggers.wandb import wandb_records
from tests.conftest import Experiment
from tests.support.servers import MLflow, environment_with_mlflow
from tests.support.waiting import wait_until

SHORT = ("trainer.max_epochs=2", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "gpu_stats=false")

RATES = "+callbacks.rates={_target_: lightning.pytorch.callbacks.LearningRateMonitor, logging_interval: step}"


class WithMLflow(Experiment):
    """The experiment, in an environment that has MLflow."""

    def __init__(self, root: Path, python: Path) -> None:
        super().__init__(root)
        self.python = python

    def command(self, *overrides: str) -> list[str]:
        return [str(self.python), str(self.root / "train.py"), *overrides]


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflow]:
    server = MLflow(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with_mlflow(tmp_path_factory.mktemp("with-mlflow"))


def wait_for_step(runs: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    wait_until(lambda: any(len(read_trail(folder)) >= step for folder in runs.glob("killed/*")), process=process)


def asked(server: MLflow, path: str, **body: Any) -> Any:
    """Ask MLflow's REST API: https://mlflow.org/docs/latest/rest-api.html."""
    data = json.dumps(body).encode() if body else None
    call = request.Request(f"{server.url}/{path}", data, {"Content-Type": "application/json"})
    with request.urlopen(call, timeout=60) as answer:
        return json.load(answer)


def run_of(server: MLflow, experiment: str) -> dict[str, Any]:
    """Return the one run of an experiment."""
    known = asked(server, f"api/2.0/mlflow/experiments/get-by-name?experiment_name={experiment}")["experiment"]
    found = asked(server, "api/2.0/mlflow/runs/search", experiment_ids=[known["experiment_id"]])["runs"]
    assert len(found) == 1
    return dict(found[0])


def history(server: MLflow, run: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) pairs of each metric, in the order in which they came."""
    found = {}
    for metric in run["data"]["metrics"]:
        query = parse.urlencode({"run_id": run["info"]["run_id"], "metric_key": metric["key"], "max_results": 25000})
        rows = asked(server, f"api/2.0/mlflow/metrics/get-history?{query}")["metrics"]
        found[metric["key"]] = [(int(row.get("step", 0)), row["value"]) for row in rows]
    return found


def test_mlflow_has_each_step_once_and_the_receipt(
    mlflow: MLflow, python: Path, shared_experiment: Experiment, tmp_path: Path
) -> None:
    """One MLflow run for a training that is killed twice, with the rows of one that is not."""
    found = {}
    for name in ("whole", "killed"):
        experiment = WithMLflow(shared_experiment.root, python)
        options = [*SHORT, "logger=mlflow", f"logger.mlflow.tracking_uri={mlflow.url}", f"experiment={name}"]
        options += [f"paths.runs={tmp_path}", "checkpoint.every_n_steps=3", "trainer.log_every_n_steps=1", RATES]
        for step in (8, 21) if name == "killed" else ():
            with subprocess.Popen(experiment.command(*options), stdout=subprocess.DEVNULL) as process:
                wait_for_step(tmp_path, step, process)
                process.kill()
        trained = experiment.train(*options)
        run = run_of(mlflow, name)
        found[name] = history(mlflow, run)
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        assert tags["labtrain.run_id"] == trained.folder.name
        assert tags["labtrain.receipt_digest"] == trained.receipt["digest"]
        assert run["info"]["status"] == "FINISHED"
        files = asked(mlflow, f"api/2.0/mlflow/artifacts/list?run_id={run['info']['run_id']}")["files"]
        assert {file["path"] for file in files} == {"receipt.json", "report.html"}
        params = {param["key"]: param["value"] for param in run["data"]["params"]}
        assert params["seed"] == "42"
    assert found["killed"] == found["whole"]
    assert len(found["whole"]["lr-AdamW"]) == 40


def test_an_mlflow_server_that_does_not_answer_is_an_error(
    python: Path, shared_experiment: Experiment, tmp_path: Path
) -> None:
    """After four attempts, and not after MLflow's eight minutes; MLflow's own key sets another number."""
    experiment = WithMLflow(shared_experiment.root, python)
    options = [*SHORT, "logger=mlflow", "logger.mlflow.tracking_uri=http://127.0.0.1:9", f"paths.runs={tmp_path}"]
    run = experiment.train(*options, code=2, env={"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    assert "error: MLflow at http://127.0.0.1:9: API request to" in run.err
    assert "hint: start the server, or set logger.mlflow.tracking_uri" in run.err
    assert "Traceback" not in run.err


def test_tensorboard_csv_and_wandb_have_the_run_and_its_receipt(experiment: Experiment) -> None:
    options = (*SHORT, "logger=many", "logger.wandb.mode=offline", "paths.runs=runs")
    trained = experiment.train(*options)
    said = {"run_id": trained.folder.name, "receipt_digest": trained.receipt["digest"]}
    assert yaml.safe_load((trained.folder / "hparams.yaml").read_text()) == said
    events = EventAccumulator(str(trained.folder / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    for key, value in said.items():
        (event,) = events.Tensors(f"labtrain/{key}/text_summary")
        assert event.tensor_proto.string_val[0].decode() == value
    records = [wandb_internal_pb2.Record.FromString(data) for path in trained.folder.glob("wandb/offline-run-*/run-*.wandb")
               for data in wandb_records(path)]  # fmt: skip
    summary = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
               for record in records for item in record.summary.update}  # fmt: skip
    assert {key: summary[f"labtrain/{key}"] for key in said} == said
    (artifact,) = [record.request.log_artifact.artifact for record in records
                   if record.request.HasField("log_artifact")] or [r.artifact for r in records if r.HasField("artifact")]  # fmt: skip
    assert {entry.path for entry in artifact.manifest.contents} == {"receipt.json", "report.html"}


def test_a_logger_of_ones_own(own_experiment: Experiment, tmp_path: Path) -> None:
    """It is in the experiment's folder; its options may name the run; at the end it is given the receipt's digest."""
    (own_experiment.root / "mine.py").write_text(OWN)
    options = [
        *SHORT,
        "logger=none",
        "+logger.mine={_target_: mine.Lines, path: '{run_dir}/lines.txt', of: '{run_id}'}",
    ]
    trained = own_experiment.train(*options, f"paths.runs={tmp_path}/runs")
    lines = (trained.folder / "lines.txt").read_text().splitlines()
    assert lines[0] == f"run {trained.folder.name}"
    assert lines[-1] == f"receipt {trained.receipt['digest']}"
    assert sum(line.startswith("train/loss ") for line in lines) == 2


OWN = """
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class Lines(Logger):
    def __init__(self, path, of):
        super().__init__()
        self.path, self.of = path, of

    name = version = property(lambda self: self.of)

    def write(self, key, value):
        with open(self.path, "a") as file:
            file.write(f"{key} {value}\\n")

    @rank_zero_only
    def log_metrics(self, metrics, step):
        for key, value in metrics.items():
            self.write(key, value)

    @rank_zero_only
    def log_hyperparams(self, params):
        said = params.get("labtrain", {})
        for key in said:
            self.write({"run_id": "run", "receipt_digest": "receipt"}[key], said[key])
"""
