"""`labtrain update`: a kept experiment of 2026-12-01 is brought to a newer labtrain, by git's own merge."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from labtrain.project.origin import make_base, read_carried
from tests.conftest import LABTRAIN, need
from tests.support.template import files, run
from tests.support.update import FIRST, IDENTITY, NEWER, TEMPLATE, git, labtrain, newer_labtrain, old_experiment

# The person edited model.py, conf/config.yaml, README.md and Makefile, and deleted notebooks/. These are elsewhere.
EDITS = {
    f"{TEMPLATE}/model.py": ("        return self.net(images)\n", "        return self.net(images)  # (B, 10)\n"),
    f"{TEMPLATE}/data.py": ('"""', '"""Newer. '),
    f"{TEMPLATE}/Makefile": (
        "test: setup ## run",
        "lint: setup ## lint\n\t@.venv/bin/ruff check .\n\ntest: setup ## run",
    ),
    f"{TEMPLATE}/README.md": ("There are two other ways", "There are (at least) two other ways"),
    f"{TEMPLATE}/.vscode/launch.json": ("", '{"version": "0.2.0"}\n'),
    "containers/start.sh": ("#!", "#!"),
    "src/labtrain/training/fit.py": ('"""', '"""Newer: '),
    "requirements.lock": ("zipp==", "zipp==99."),
}
# These are on lines that the person edited, too, or in a file that the person deleted.
CLASHES = {
    f"{TEMPLATE}/conf/config.yaml": ("  width: 16\n", "  width: 20\n"),
    f"{TEMPLATE}/notebooks/start.ipynb": ("cells", "cells "),
}
RUNS = {"runs"}


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return newer_labtrain(tmp_path_factory.mktemp("newer") / "labtrain", EDITS)


@pytest.fixture(scope="module")
def clashing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return newer_labtrain(tmp_path_factory.mktemp("clashing") / "labtrain", EDITS | CLASHES)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    need("git", "git")
    return old_experiment(tmp_path)


def content(root: Path) -> dict[str, str]:
    """Return the sha256 of each file, without git's own."""
    return {name: digest for name, digest in files(root).items() if not name.startswith(".git/")}


def test_the_base_is_what_the_older_labtrain_made(old: Path, tmp_path: Path) -> None:
    """Byte for byte the first commit, with the name and the author found in files that the person has edited."""
    git(old, "checkout", "-q", "HEAD^")
    first = {name: digest for name, digest in content(old).items() if not name.startswith("runs/")}
    git(old, "checkout", "-q", "main")
    (tmp_path / "scratch").mkdir()
    base, values = make_base(read_carried(old), tmp_path / "scratch")
    assert values == {"name": "digits", "author": "Ada Lovelace"}
    assert content(base) == first


def test_edits_of_both_sides_are_merged_and_the_old_run_is_verified(old: Path, newer: Path) -> None:
    """The whole way: update, look, commit; then today's labtrain trains a run of the older one again."""
    before, head = content(old), git(old, "rev-parse", "HEAD")
    done = labtrain(newer, "update", cwd=old)
    assert done.returncode == 0, done.stderr + done.stdout
    now = content(old)
    assert {name for name in before if name.startswith("runs/") and now[name] != before[name]} == set()
    model = (old / "model.py").read_text()
    assert "nn.GELU()" in model and "return self.net(images)  # (B, 10)" in model
    makefile = (old / "Makefile").read_text()
    assert "# ours" in makefile and "sweep: setup" in makefile and "lint: setup" in makefile
    assert "An experiment of Ada Lovelace, created with labtrain. It asks" in (old / "README.md").read_text()
    assert "(at least) two" in (old / "README.md").read_text()
    assert (old / ".vscode" / "launch.json").exists()
    assert not (old / "notebooks").exists()
    assert (old / "conf" / "experiment" / "wide.yaml").exists()
    assert [path.name for path in (old / "vendor").iterdir()] == [f"labtrain-{NEWER}-py3-none-any.whl"]
    assert git(old, "rev-parse", "HEAD") == head, "update commits nothing"
    assert git(old, "diff", "--name-only") == ""
    assert git(old, "for-each-ref", "refs/labtrain") == ""

    said = done.stdout
    assert said.startswith("labtrain 0.1.0 (6002ec354697) -> 0.2.0 (")
    for line in (
        "packages       zipp ",
        "code           data.py, model.py",
        "merged         with your edits: Makefile; README.md; model.py",
        "configuration  yours is unchanged",
        "git reset --hard",
    ):
        assert line in said, said
    git(old, "commit", "-qam", "labtrain 0.2.0")

    verified = run(LABTRAIN, "verify", f"runs/digits/{FIRST}", "--trust", cwd=old, env=IDENTITY)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert verified.stdout.splitlines()[-1].startswith("yes          the same bits to the end")
    assert "differs      code.labtrain" in verified.stdout


def test_a_second_update_says_that_nothing_is_newer(old: Path, newer: Path) -> None:
    labtrain(newer, "update", cwd=old)
    git(old, "commit", "-qam", "labtrain 0.2.0")
    before = content(old)
    done = labtrain(newer, "update", cwd=old)
    assert (done.returncode, done.stdout) == (0, f"up to date: the experiment carries this labtrain, {NEWER}\n")
    assert content(old) == before
    older = run(LABTRAIN, "update", cwd=old, env=IDENTITY)
    assert older.returncode == 2
    assert f"carries labtrain {NEWER}, newer than the labtrain that is running: 0.1.0" in older.stderr
    assert content(old) == before


def test_conflicts_are_left_as_git_marks_them_and_git_goes_back(old: Path, clashing: Path) -> None:
    before = content(old)
    done = labtrain(clashing, "update", cwd=old)
    assert done.returncode == 1, done.stderr
    config = (old / "conf" / "config.yaml").read_text()
    assert "<<<<<<< labtrain/yours\n  width: 24\n" in config
    assert "  width: 20\n" in config and f">>>>>>> labtrain/{NEWER}\n" in config
    status = git(old, "status", "--porcelain").splitlines()
    assert {line for line in status if line[:2] in ("UU", "DU", "UD", "AA")} == {
        "UU conf/config.yaml",
        "DU notebooks/start.ipynb",
    }
    assert "CONFLICT (content): Merge conflict in conf/config.yaml" in done.stdout
    assert "CONFLICT (modify/delete): notebooks/start.ipynb" in done.stdout
    assert "git add conf/config.yaml notebooks/start.ipynb" in done.stdout
    again = labtrain(clashing, "update", cwd=old)
    assert again.returncode == 2 and "not committed" in again.stderr
    git(old, "reset", "-q", "--hard")
    assert content(old) == before
    assert git(old, "status", "--porcelain") == ""
