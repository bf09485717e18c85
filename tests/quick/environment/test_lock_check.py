"""`labtrain lock check` where locks are missing. What it finds in locks: tests/real."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from labtrain.cli import main
from labtrain.environment.lock.check import check_locks
from tests.conftest import ROOT


def test_a_folder_without_locks_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["lock", "check"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path} has no lock files\n\nhint: cd to an experiment")


def test_a_lock_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text((ROOT / "requirements.lock").read_text())
    found = {each.file: each.found for each in check_locks(tmp_path) if each.what == "the file"}
    assert found["conda-lock.yml"] == found["sbom.cdx.json"] == found["nix/wheels.json"] == "missing"
