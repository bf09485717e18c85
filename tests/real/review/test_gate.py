"""`labtrain gate`: the same bits, or equivalent within a margin by runs of several seeds, or not; exit code 0 or 1."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from labtrain.record import receipt as receipts
from tests.conftest import changed
from tests.support.gate import gate

pytest_plugins = ["tests.support.gate"]


@pytest.mark.release
def test_the_same_bits_are_a_yes_and_the_runs_are_kept_as_the_next_baselines(
    recorded: list[Path], tmp_path: Path
) -> None:
    found = gate(recorded[0], recorded[1] / "receipt.json", "--keep", tmp_path / "kept", code=0)
    assert "yes: 2 of 2 give the same bits" in found.out
    for before in recorded[:2]:
        kept = receipts.read(tmp_path / "kept" / f"digits-{before.name}")
        assert kept is not None
        assert kept["results"] == (receipts.read(before) or {})["results"]
    again = gate(recorded[0], "--keep", tmp_path / "kept", code=0)
    assert f"kept         {tmp_path}/kept/digits-{recorded[0].name}-2" in again.out  # no training is thrown away


@pytest.mark.release
def test_other_bits_are_a_no_and_it_says_where_they_begin(recorded: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "gate.html"
    found = gate(recorded[0], "--report", page, code=1, OTHER_BITS="1")
    assert "no: different bits, first at step 1, in the loss" in found.out
    assert "--seeds 5 --margin M" in found.out
    assert recorded[0].name in page.read_text()
    assert "Not verified yet" not in page.read_text()
    assert "Trained again in the current environment by this gate. Different bits, first at step 1" in page.read_text()


@pytest.mark.release
def test_one_that_cannot_be_judged_keeps_none_of_the_others_from_it(recorded: list[Path], tmp_path: Path) -> None:
    """A baseline of lost code is a no with its reason, the next one is trained and compared; the page tells both."""
    lost, page = recorded[0].parent / "lost", tmp_path / "gate.html"
    shutil.copytree(recorded[0], lost)
    changed(lost, "code/sources", {"gone.py": "0" * 64})
    found = gate(lost, recorded[1], "--report", page, code=1)
    shutil.rmtree(lost)
    assert "no: " in found.out
    assert "does not match the receipt" in found.out
    assert "yes: 1 of 1 give the same bits" in found.out
    text = page.read_text()
    assert "The same bits now" in text
    assert "Not verified yet" in text  # the lost one
    assert gate(recorded[0], "--report", tmp_path / "no" / "gate.html", code=2).out == ""  # before anything is trained


def refused(recorded: list[Path], tmp_path: Path) -> list[tuple[tuple[Any, ...], str]]:
    running = tmp_path / "running"
    shutil.copytree(recorded[0], running)
    found = receipts.read(running)
    assert found is not None
    found |= {"status": "interrupted", "results": {}}
    receipts.write(running, found)
    return [
        ((tmp_path,), "is not a run"),
        ((running,), "is interrupted: a baseline must be complete"),
        ((recorded[0], "--seeds", "2"), "no metric to compare"),
        ((recorded[0], "--seeds", "2", "--metric", "no/such"), "has no metric no/such; it has test/acc"),
        ((recorded[0], recorded[0] / "receipt.json"), "are the same run"),
        ((recorded[0], "--metric", "typo"), "has no metric typo"),
        ((*recorded, "--seeds", "2", "--metric", "test/acc", "--margin", "-1"), "margin must be above 0, got -1.0"),
        ((recorded[0], "--seeds", "2", "--metric", "test/acc", "--margin", "1", "--old-python", "no/python"), "no/python"),
        ((recorded[0], "--seeds", "2", "--metric", "test/acc", "--margin", "1", "--old-python", "/usr/bin/python3"), "/usr/bin/python3: "),
        ((recorded[0], "--seeds", "2", "--metric", "test/acc"), "--seeds needs --margin, the largest acceptable change of test/acc"),
        ((recorded[0], "--seeds", "2", "--metric", "test/acc", "--margin", "0.1"), "--seeds 2 needs 2 baselines with the configuration of "),
    ]  # fmt: skip


def test_what_cannot_be_judged_is_refused_before_anything_is_trained(recorded: list[Path], tmp_path: Path) -> None:
    for arguments, says in refused(recorded, tmp_path):
        found = gate(*arguments, code=2)
        assert says in found.err
        assert "hint: " in found.err
        assert not found.out


def test_what_cannot_be_trained_today_is_a_no_with_its_reason(recorded: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "gate.html"
    found = gate(recorded[0], "--report", page, code=1, OTHER_BITS="3")
    assert "no: seed 1 cannot be trained in today's environment" in found.out
    assert "this release is broken" in found.out
    assert page.exists()
