"""The tools of `labtrain lock write`."""

import sys
from pathlib import Path

import pytest

from labtrain.base.errors import LabtrainError
from labtrain.environment.lock import write


def test_a_locks_tool_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv and conda-lock are the programs beside Python: here one that waits."""
    for name in ("pyproject.toml", "environment.yml"):
        (tmp_path / name).touch()
    (tmp_path / "uv").write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(write, "TIMEOUT_S", 1)
    with pytest.raises(LabtrainError, match="uv pip compile took longer than 1 s, so labtrain ended it"):
        list(write.write_locks(tmp_path))
