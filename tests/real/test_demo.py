"""`make demo`, as it stands; and that it would say so if the bits differed."""

import json
import subprocess
from pathlib import Path

import pytest

from labtrain.base.errors import ConfigError
from labtrain.project.demo import WAYS, judge, make_empty, read_outcome
from labtrain.record.differences import first_difference
from tests.conftest import LABTRAIN, QUICK, ROOT, Experiment

GOLDEN = json.loads((ROOT / "tests/golden/receipt.json").read_text())["results"]["weights_digest"]


def test_four_ways_one_digest_the_golden_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [LABTRAIN, "demo", "--dir", "kept"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(tuple(WAYS))]
    assert len(rows) == 4
    assert {row.split()[-1] for row in rows} == {GOLDEN}
    assert done.stdout.splitlines()[-3:] == [
        "4 ways, one digest: the golden one",
        "verified, trained again from its receipt: the same bits, to its end",
        "report: kept/report.html",
    ]
    page = (tmp_path / "kept" / "report.html").read_text()
    assert "4 ways, one digest, the golden one: A as it is, B as an older CPU computes it" in page
    assert page.count(GOLDEN) >= 4
    receipts = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("kept/golden/runs/*/*/*/receipt.json"))]
    assert [len(receipt["segments"]) for receipt in receipts] == [1, 1, 1, 2]
    assert len({receipt["run_id"] for receipt in receipts}) == 1
    assert receipts[2]["segments"][0]["devices"] == 2
    assert receipts[3]["segments"][1]["from_step"] % 20 != 0  # in the middle of an epoch
    assert receipts[1]["determinism"]["variables"]["MKL_ENABLE_INSTRUCTIONS"] == "SSE4_2"


def test_the_readme_shows_the_golden_digest() -> None:
    assert (ROOT / "README.md").read_text().count(GOLDEN) >= 3


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


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="something else than a demo"):
        make_empty(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
