"""Checks that fail for real: driver libraries of our own, small disks, another clock, an old C library."""

import json
from pathlib import Path

from tests.conftest import LABTRAIN, QUICK, Experiment
from tests.real.environment.test_doctor import in_namespace


def test_a_full_disk_fails_and_the_last_checkpoints_size_counts(experiment: Experiment, tmp_path: Path) -> None:
    """A disk of 1 MB, with a real checkpoint of which three more do not fit."""
    run = experiment.train(*QUICK, "paths.runs=runs", "trainer.max_steps=2", "model.width=64")
    checkpoint = run.folder.resolve() / "checkpoints"
    script = f"mkdir {tmp_path}/disk; mount -t tmpfs -o size=2m none {tmp_path}/disk; mkdir {tmp_path}/disk/run; cp -r {checkpoint}/* {tmp_path}/disk/run; "
    script += f"cd {tmp_path}/disk; {LABTRAIN} doctor --json --checkpoints {tmp_path}/disk || true"
    checks = {entry["name"]: entry for entry in json.loads(in_namespace(script).stdout)}
    assert checks["disk"]["status"] == checks["checkpoints"]["status"] == "failed"
    assert "the last one has" in checks["checkpoints"]["found"]
