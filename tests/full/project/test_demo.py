"""`make demo`, as it stands; and that it would say so if the bits differed."""

import json
from pathlib import Path

import pytest

from labtrain.project.demo import judge, read_outcome
from labtrain.record.differences import first_difference
from tests.conftest import QUICK, Experiment


def test_a_difference_is_named_by_step_and_tensor(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs that part at their first step (another seed), and two that part later (another length)."""
    quick = (*QUICK, "trainer.max_epochs=1")
    one = experiment.train(*quick, "paths.runs=one")
    other = experiment.train(*quick, "paths.runs=other", "seed=43")
    outcomes = [read_outcome("one", Path("one"), 1.0), read_outcome("other", Path("other"), 1.0)]
    assert not judge(outcomes)
    assert "differs: one and other: first at step 1, in the batch, first tensor net.0.weight" in capsys.readouterr().out
    assert first_difference(one.folder, one.folder) is None

    lines = other.trail()
    lines[7]["weights"] = "0" * 32
    copy = Path("copy")
    copy.mkdir()
    (copy / "trail.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = first_difference(other.folder, copy)
    assert found is not None
    assert (found.step, found.phase) == (8, "update")
    (copy / "trail.jsonl").write_text("".join(json.dumps(line) + "\n" for line in other.trail()[:5]))
    found = first_difference(other.folder, copy)
    assert found is not None
    assert (found.step, found.phase) == (6, "length")
    assert not judge(outcomes[:1])
    assert "not with the golden run: first at step 1" in capsys.readouterr().out
