"""Runs of a generated experiment by its train.py, of four epochs, and what they are compared with."""

from pathlib import Path

import pytest

from tests.conftest import QUICK, Experiment, Run

SHORT = (*QUICK, "paths.runs=runs", "trainer.max_epochs=4", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def reference(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four epochs, uninterrupted."""
    runs = tmp_path_factory.mktemp("reference")
    return shared_experiment.train(*SHORT, f"paths.runs={runs}")


def folders(runs: Path) -> list[Path]:
    return sorted(path for path in runs.glob("*/*") if path.is_dir())


def same(run: Run, reference: Run) -> None:
    """The same weights, the same whole training state, the same trail."""
    assert run.digest == reference.digest
    assert run.receipt["results"]["state_digest"] == reference.receipt["results"]["state_digest"]
    assert run.receipt["results"]["metrics"] == reference.receipt["results"]["metrics"]
    assert run.trail() == reference.trail()
