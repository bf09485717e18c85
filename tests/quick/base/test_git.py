"""git, run by base/git.py: what it prints, why it fails, and how long it may take."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from labtrain.base import git
from labtrain.base.git import GitError, ask_git, run_git
from labtrain.record.identity import Job
from labtrain.record.provenance import code_state


def fake(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "bin" / "git"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_what_git_prints_is_returned_byte_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, r"printf 'a\377b'", monkeypatch)
    assert run_git(tmp_path, "log").encode("utf-8", "surrogateescape") == b"a\xffb"


def test_a_git_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "echo fatal: no >&2; exit 128", monkeypatch)
    with pytest.raises(GitError, match="git log -1: fatal: no"):
        run_git(tmp_path, "log", "-1")
    assert ask_git(tmp_path, "log", "-1") == ""


def test_a_git_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "exec sleep 600", monkeypatch)  # fixed: longer than the limit that is tested
    with pytest.raises(GitError, match=r"did not end within 0\.2 seconds"):
        run_git(tmp_path, "log", timeout_s=0.2)


def test_no_git_is_an_error_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    with pytest.raises(GitError, match="apt-get install git"):
        run_git(tmp_path, "log")


def test_a_status_that_fails_is_not_recorded_as_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time-out on a large repository is no proof that nothing was changed."""
    fake(tmp_path, f"case $3 in rev-parse) echo {'a' * 40};; *) exit 1;; esac", monkeypatch)
    root = tmp_path / "experiment"
    root.mkdir()
    (root / "train.py").touch()
    found = code_state(cast(Job, SimpleNamespace(root=str(root), config={}, code_digest="")))
    assert found["commit"] == "a" * 40
    assert (found["dirty"], found["untracked"], found["ignored"]) == (None, [], [])
    assert git.TIMEOUT_S <= 60
