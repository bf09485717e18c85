"""Runs that torchrun starts: more of tests/real/launch/test_torchrun.py."""

import subprocess
from pathlib import Path

from tests.conftest import Experiment
from tests.real.launch.test_torchrun import command


def test_a_fresh_start_needs_a_name_that_all_ranks_know(experiment: Experiment) -> None:
    """resume=never: all ranks are to write into one new folder, whichever looks first."""
    line = [part for part in command(experiment) if part != "--standalone"]
    done = subprocess.run([*line, "resume=never"], capture_output=True, text=True, check=False, timeout=300)
    assert "error: resume=never: 2 processes cannot agree on a name for the new folder" in done.stderr
    out, err = subprocess.Popen(
        [*command(experiment), "resume=never"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ).communicate(timeout=300)
    (run,) = Path("runs/digits").iterdir()
    assert out.split()[0] == str(run), err
