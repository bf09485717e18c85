"""Disks that are full or broken under a training: tests/support/faults.py has all, and these are one of each kind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Experiment, need

CHOSEN = {
    "link:EIO:.writer.json": "error",
    "write:ENOSPC:.config.yaml.part": "error",
    "rename:EIO:/receipt.json": "error",
    "write:full:trail.jsonl": "error",
    "write:full:tensorboard/": "error",
    "write:ENOSPC:metrics.csv": "error",
    "sync:EIO:trail.jsonl": "error",
    "write:full:state.pt": "error",
    "write:ENOSPC:output.log": "survived, with a warning",
    "write:short+:": "survived",
}


def swept(experiment: Path, *arguments: str) -> list[str]:
    """Return the lines of a sweep, in which nothing is wrong."""
    need("cc", "gcc")
    command = [sys.executable, "-m", "tests.support.faults", "--experiment", str(experiment), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
                          env={**os.environ, "CI": "true"})  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


def test_a_fault_at_each_kind_of_file_is_survived_or_told(shared_experiment: Experiment) -> None:
    """One error with a hint, or the same weights; no damaged checkpoint; the next start ends with the same weights."""
    lines = swept(shared_experiment.root, *(f"--choose={each}" for each in CHOSEN))
    told = [line.split(": ") for line in lines if line.startswith("ok: ")]
    assert [each[2] for each in told] == list(CHOSEN.values())
    for choice, (_, _, how, *error) in zip(CHOSEN, told, strict=True):
        file = choice.split(":")[2].removesuffix(".part").strip("./").replace("state.pt", "step-0000000002")
        assert how != "error" or file in ": ".join(error), f"{choice}: the error names another file"


@pytest.mark.release
def test_every_fault_at_the_first_and_the_last_write_of_each_kind(shared_experiment: Experiment) -> None:
    assert " 0 wrong" in swept(shared_experiment.root, "--distinct")[-1]
