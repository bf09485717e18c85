"""`make demo`, as it stands; and that it would say so if the bits differed."""

import json
import subprocess
from pathlib import Path

import pytest

from labtrain.base.errors import ConfigError
from labtrain.project.demo import WAYS, make_empty
from tests.conftest import LABTRAIN, ROOT

GOLDEN = json.loads((ROOT / "tests/golden/receipt.json").read_text())["results"]["weights_digest"]


def test_four_ways_one_digest_the_golden_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [LABTRAIN, "demo", "--dir", "kept"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(tuple(WAYS))]
    assert len(rows) == 4
    assert {row.split()[-1] for row in rows} == {GOLDEN}
    assert done.stdout.splitlines()[-3:] == [
        "4 ways, one digest: the golden one",
        "trained again from the receipt: the same bits to the end",
        "report: kept/report.html",
    ]
    page = (tmp_path / "kept" / "report.html").read_text()
    assert "4 ways, one digest, the golden one: A plain run, B on an older CPU (emulated)" in page
    assert page.count(GOLDEN) >= 4
    receipts = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("kept/golden/runs/*/*/*/receipt.json"))]
    assert [len(receipt["segments"]) for receipt in receipts] == [1, 1, 1, 2]
    assert len({receipt["run_id"] for receipt in receipts}) == 1
    assert receipts[2]["segments"][0]["devices"] == 2
    assert receipts[3]["segments"][1]["from_step"] % 20 != 0  # in the middle of an epoch
    assert receipts[1]["determinism"]["variables"]["MKL_ENABLE_INSTRUCTIONS"] == "SSE4_2"


def test_the_readme_shows_the_golden_digest() -> None:
    assert (ROOT / "README.md").read_text().count(GOLDEN) >= 3


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds files that are not a demo's"):
        make_empty(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
