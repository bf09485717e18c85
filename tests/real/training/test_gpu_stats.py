"""A real training on the CPU beside a driver library of our own: what is read through NVML, and where it ends up."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.doctor import driver

TRAIN = """if True:
    import json, sys
    import lightning.pytorch as pl
    from labtrain.training.callbacks.gpu_stats import GpuStats, cards_of
    from lightning.pytorch.demos.boring_classes import BoringModel
    cards = {0: "whole", 1: "slice", 5: "another"}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=6, limit_val_batches=0, log_every_n_steps=2,
        logger=pl.loggers.CSVLogger(sys.argv[1], name="", version=""), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[GpuStats(lambda trainer: cards)],
    )
    trainer.fit(BoringModel())
    print(json.dumps({"metrics": list(trainer.callback_metrics), "logged": list(trainer.logged_metrics),
                      "without a GPU": cards_of(trainer)}))
"""


def train(folder: Path, **environment: str) -> tuple[dict[str, Any], list[dict[str, str]], str]:
    """Return what the training printed, what its logger has, and its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(folder)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    metrics = folder / "metrics.csv"
    with (metrics if metrics.exists() else Path(os.devnull)).open() as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return json.loads(done.stdout), [row for row in rows if any(name.startswith("gpu/") for name in row)], done.stderr


def test_what_cards_tell_is_in_the_loggers_and_nowhere_else(tmp_path: Path) -> None:
    """By UUID; a slice of a card has its memory alone; a card that NVML does not know is left out."""
    found, rows, said = train(tmp_path, **driver(tmp_path, USED="12000000000ULL"))
    read = {
        "gpu/0/memory_used_gb": "12.0",
        "gpu/0/utilization_percent": "87.0",
        "gpu/0/temperature_celsius": "71.0",
        "gpu/0/power_watts": "299.5",
        "gpu/1/memory_used_gb": "12.0",
    }
    assert rows == [{**read, "step": step} for step in ("1", "3", "5")]
    assert not any(name.startswith("gpu/") for name in found["metrics"] + found["logged"])
    assert found["without a GPU"] == {}
    assert "warning: GPU" not in said


def test_without_a_driver_the_training_goes_on(tmp_path: Path) -> None:
    """NVML_ERROR_DRIVER_NOT_LOADED, whatever this machine has."""
    _, rows, said = train(tmp_path, **driver(tmp_path, INIT=9))
    assert rows == []
    assert said.count("warning: gpu_stats: the driver does not report the GPUs") == 1
