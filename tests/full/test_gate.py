"""`labtrain gate` by runs of several seeds: more of tests/real/test_gate.py."""

import json
import stat
import sys
from pathlib import Path

from labtrain.record import receipt as receipts
from tests.support.gate import gate

pytest_plugins = ["tests.support.gate"]


def test_a_worse_training_is_not_equivalent(recorded: list[Path]) -> None:
    found = gate(*recorded, "--seeds", "3", "--metric", "test/acc", "--margin", "0.05", code=1, OTHER_BITS="2")
    assert "no: not shown to be the same: test/acc changes by -0." in found.out


def test_seeds_that_were_not_recorded_are_trained_by_the_old_interpreter(recorded: list[Path], tmp_path: Path) -> None:
    """The old side is another environment: here, one in which the variable of the upgrade is unset."""
    old = tmp_path / "python"
    old.write_text(f'#!/bin/sh\nunset OTHER_BITS\nexec {sys.executable} "$@"\n')
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    command = (recorded[0], "--seeds", "2", "--metric", "test/loss", "--margin", "0.2", "--old-python", old, "--json")
    found = json.loads(gate(*command, code=0, OTHER_BITS="1").out)[0]
    (seed,) = [each["seed"] for each in found["values"] if each["seed"] != 1]
    assert seed == 2
    recorded_two = (receipts.read(recorded[1]) or {})["results"]["metrics"]["test/loss"]
    assert next(each["before"] for each in found["values"] if each["seed"] == 2) == recorded_two
