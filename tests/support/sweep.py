"""Optuna's sweeps of a generated experiment."""

from pathlib import Path

import yaml

from tests.conftest import QUICK

OPTUNA = ("-m", "hydra/sweeper=optuna", *QUICK, "checkpoint.monitor=val/acc")
SHORT = ("trainer.max_epochs=1", "data.batch_size=512", "paths.runs=runs")


def results(runs: str) -> dict[str, object]:
    return dict(yaml.safe_load(Path(runs, ".sweep", "optimization_results.yaml").read_text()))
