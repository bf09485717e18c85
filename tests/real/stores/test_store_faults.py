"""Stores that fail under a training: tests/support/store_faults.py has all, and these are one of each kind."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import Experiment, need

CHOSEN = (
    "s3:fresh:PUT:1:500*",
    "s3:fresh:PUT:4:lost",
    "s3:resumed:LIST:3:stale old",
    "s3:resumed:GET:3:short",
    "s3:check:LIST:1:stale old",
    "s3:check:GET:2:500*",
    "s3:large:POST:2:lost*",
    "s3:spool:close:2:EIO",
    "sftp:fresh:PACKET:1:reset",
    "sftp:fresh:PACKET:100:lost",
    "sftp:ls:PACKET:21:lost",
)


def test_a_fault_of_each_kind_is_survived_or_told(shared_experiment: Experiment) -> None:
    """One error with a hint, or the same weights; no damaged checkpoint; the next start ends with the same weights."""
    need("cc", "gcc")
    command = [sys.executable, "-m", "tests.support.store_faults", "--experiment", str(shared_experiment.root)]
    command += [f"--choose={each}" for each in CHOSEN]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
                          env={**os.environ, "CI": "true"})  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = [line.split(": ")[3].partition(",")[0] for line in done.stdout.splitlines() if line.startswith("ok: ")]
    # Which of the two follows from a fault depends on the moment; this one never comes through.
    assert len(told) == len(CHOSEN), done.stdout
    assert set(told) == {"survived", "error"}, done.stdout
    assert told[CHOSEN.index("s3:fresh:PUT:1:500*")] == "error"
