"""The lines that CI runs on GitHub, as far as a machine without GitHub can run them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, skip_or_fail
from tests.support.workflows import BEFORE_CHECKOUT, run_lines

SHORT = ("make check", "make docs")
TOO_LONG = ("make test", "make test-real")  # which run this very test


def shell(line: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line as GitHub does: `sh -e` in the repository's folder."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["sh", "-e", "-c", line], cwd=ROOT, env=environment | env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("line", SHORT)
def test_a_short_line_passes(line: str) -> None:
    done = shell(line)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_packages_installs_nothing_where_all_is_there(tmp_path: Path) -> None:
    """With an apt-get that only says what it would install: a test changes no machine."""
    fake = tmp_path / "apt-get"
    fake.write_text('#!/bin/sh\necho "$@"\nexit 3\n')
    fake.chmod(0o755)
    done = shell("make packages", PATH=f"{tmp_path}:{os.environ['PATH']}:/usr/sbin")
    if "update" in done.stdout:
        skip_or_fail("packages are missing: make packages")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("line", TOO_LONG)
def test_a_long_line_is_one_that_make_knows(line: str) -> None:
    """What it would run, without running it: .ci/run runs the line itself."""
    done = shell(f"{line} --dry-run")
    assert done.returncode == 0, done.stderr
    assert "-m pytest" in done.stdout


def test_the_line_before_the_checkout_is_a_line_of_shell() -> None:
    assert shutil.which("sh") is not None
    assert subprocess.run(["sh", "-n", "-c", BEFORE_CHECKOUT], check=False).returncode == 0


def test_each_line_is_tried_here() -> None:
    assert set(run_lines()) == {*SHORT, "make packages", *TOO_LONG, BEFORE_CHECKOUT}
