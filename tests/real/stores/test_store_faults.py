"""Stores that fail under a training: tests/support/store_faults.py has all, and these are one of each kind."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import Experiment, need

CHOSEN = {
    "s3:fresh:PUT:1:500*": "error",
    "s3:fresh:PUT:4:lost": "survived",
    "s3:resumed:LIST:3:stale old": "survived, with a warning",
    "s3:resumed:GET:3:short": "error",
    "s3:check:LIST:1:stale old": "survived",
    "s3:check:GET:2:500*": "error",
    "s3:large:POST:2:lost*": "survived",
    "s3:spool:close:2:EIO": "error",
    "sftp:fresh:PACKET:1:reset": "error",
    "sftp:fresh:PACKET:100:lost": "survived, with a warning",
    "sftp:ls:PACKET:21:lost": "error",
}


def test_a_fault_of_each_kind_is_survived_or_told(shared_experiment: Experiment) -> None:
    """One error with a hint, or the same weights; no damaged checkpoint; the next start ends with the same weights."""
    need("cc", "gcc")
    command = [sys.executable, "-m", "tests.support.store_faults", "--experiment", str(shared_experiment.root)]
    command += [f"--choose={each}" for each in CHOSEN]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
                          env={**os.environ, "CI": "true"})  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = [line.split(": ") for line in done.stdout.splitlines() if line.startswith("ok: ")]
    assert [each[3] for each in told] == list(CHOSEN.values()), done.stdout
