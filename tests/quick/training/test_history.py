"""The history of a run: what each loop logged, appended across restarts, and the best value of the monitored metric."""

import json
from pathlib import Path
from typing import Any

import pytest

from labtrain.record.trail import HISTORY
from labtrain.training.callbacks.history import best_of
from tests.conftest import QUICK, Experiment


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / HISTORY).read_text().splitlines() if line.endswith("}")]


def test_each_validation_and_epoch_has_its_metrics_and_no_others(experiment: Experiment) -> None:
    run = experiment.train(*QUICK, "paths.runs=runs", "trainer.max_epochs=2", "trainer.val_check_interval=10",
                           "checkpoint.monitor=val/loss", "checkpoint.mode=min")  # fmt: skip
    found = lines(run.folder)
    told = [(line["step"], sorted(line["metrics"])) for line in found if line["metrics"]]
    val, train = ["val/acc", "val/loss"], ["train/acc", "train/loss"]
    assert told == [(10, val), (20, val), (20, train), (30, val), (40, val), (40, train)]
    results = run.receipt["results"]
    assert found[-1]["metrics"] == {name: results["metrics"][name] for name in train}
    assert all(line["memory_bytes"] > 1e8 and len(line["lr"]) == 1 for line in found)
    least = min((line["metrics"]["val/loss"], line["step"]) for line in found if "val/loss" in line["metrics"])
    assert results["best"] == {"metric": "val/loss", "value": least[0], "step": least[1]}


@pytest.mark.parametrize(("mode", "value", "step"), [("max", 0.5, 20), ("min", 0.25, 10)])
def test_the_best_is_the_first_that_was_reached(tmp_path: Path, mode: str, value: float, step: int) -> None:
    values = {10: 0.25, 20: 0.5, 30: 0.5, 40: 0.25}
    text = "".join(json.dumps({"step": at, "metrics": {"m": found}}) + "\n" for at, found in values.items())
    (tmp_path / HISTORY).write_text(text + '{"step": 50, "me\n\n')
    assert best_of(tmp_path, monitor="m", mode=mode) == {"metric": "m", "value": value, "step": step}
    assert best_of(tmp_path, monitor="other", mode=mode) is None
    assert best_of(tmp_path, monitor=None, mode=mode) is None
    assert best_of(tmp_path / "none", monitor="m", mode=mode) is None
