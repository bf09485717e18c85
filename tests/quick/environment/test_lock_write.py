"""The tools of `labtrain lock write`."""

import sys
from pathlib import Path

import pytest

from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.environment.lock import write


def test_a_locks_tool_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv and conda-lock are the programs beside Python: here one that waits."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "environment.yml").touch()
    (tmp_path / "uv").write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(write, "TIMEOUT_S", 1)
    with pytest.raises(LabtrainError, match="uv pip compile took longer than 1 s, so labtrain ended it"):
        list(write.write_locks(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("requirements.lock", b"\xff", "byte 0xff in line 1 is not UTF-8"),
        ("pyproject.toml", b"\n\xff", "byte 0xff in line 2 is not UTF-8"),
        ("pyproject.toml", b"[project", "Expected ']'"),
        ("pyproject.toml", b"", r"must have a table \[project\]"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "environment.yml").touch()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedError, match=f"{name}: {says}.*No lock was changed") as raised:
        list(write.write_locks(tmp_path))
    assert raised.value.hint == f"git checkout {name}"
