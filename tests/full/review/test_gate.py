"""`labtrain gate` by runs of several seeds: more of tests/real/review/test_gate.py."""

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


def test_other_bits_of_the_same_quality_are_equivalent_within_a_margin_and_not_within_a_narrow_one(
    recorded: list[Path],
) -> None:
    command = (*recorded, "--seeds", "3", "--metric", "test/acc", "--json")
    found = json.loads(gate(*command, "--margin", "0.2", code=0, OTHER_BITS="1").out)[0]
    assert not found["same_bits"]
    assert found["test"]["pairs"] == 3
    assert [each["seed"] for each in found["values"]] == [1, 2, 3]
    for each, run_dir in zip(found["values"], recorded, strict=True):
        assert each["before"] == (receipts.read(run_dir) or {})["results"]["metrics"]["test/acc"]
    assert any(each["before"] != each["now"] for each in found["values"])
    narrow = json.loads(gate(*command, "--margin", "0.0001", code=1, OTHER_BITS="1").out)[0]
    assert narrow["test"]["power"] < 0.8
    assert "too few runs or too large a spread" in narrow["found"]
