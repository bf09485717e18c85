"""`labtrain store` of what is not there, and of what is broken."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from labtrain.cli import main

NO_MANIFEST = "is not a labtrain/checkpoint/1 manifest: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"


@pytest.mark.parametrize("command", ["ls", "check", "prune"])
def test_a_folder_that_does_not_exist_is_no_empty_store(command: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["store", command, str(tmp_path / "chekpoints")])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/chekpoints: no such folder\n\nhint: labtrain ls")
    assert CliRunner().invoke(main, ["store", command, str(tmp_path)]).exit_code == 0


def test_the_table_shows_a_broken_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its line, as --json does; standard error has the sentence."""
    monkeypatch.chdir(tmp_path)
    folder = Path("store/step-0000000003")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    done = CliRunner().invoke(main, ["store", "ls", "store"])
    assert done.exit_code == 0
    assert done.stdout == (f"store/step-0000000003  step 3  0.0 MB  manifest.json {NO_MANIFEST}\n")
    assert done.stderr == f"warning: store/step-0000000003/manifest.json {NO_MANIFEST}\n"
