"""What a receipt says of code in a git repository."""

import os
import shutil
import subprocess
from pathlib import Path

from labtrain.base.credentials import NOT_RECORDED
from labtrain.record.provenance import uncommitted_change
from tests.conftest import Experiment


def git(folder: Path, *arguments: str) -> str:
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    done = subprocess.run(
        ["git", "-C", folder, *arguments], env=os.environ | who, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_patch_turns_the_commit_into_the_code(own_experiment: Experiment, tmp_path: Path) -> None:
    """A change, and a source that git does not know; the repository is left as it was."""
    root = own_experiment.root
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "model.py").write_text((root / "model.py").read_text() + "\n# a change\n")
    (root / "more.py").write_text("x = 1\n")
    (root / "notes.txt").write_text("mine\n")
    before = git(root, "status", "--porcelain"), sorted(path.name for path in (root / ".git" / "objects").rglob("*"))
    run = own_experiment.train("trainer.max_steps=1", "logger=none", cwd=root)
    code = run.receipt["code"]
    assert (code["dirty"], code["untracked"], code["commit"]) == (
        True,
        ["more.py"],
        git(root, "rev-parse", "HEAD").strip(),
    )
    assert code["patch"] == uncommitted_change(str(root), ["more.py"]) == (run.folder / "code.patch").read_text()
    shutil.rmtree(root / "runs")
    assert before == (
        git(root, "status", "--porcelain"),
        sorted(path.name for path in (root / ".git" / "objects").rglob("*")),
    )
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(root), str(clone))
    subprocess.run(["git", "-C", clone, "apply", "-"], input=code["patch"], text=True, check=True)
    for name in ("model.py", "more.py"):
        assert (clone / name).read_bytes() == (root / name).read_bytes()
    assert not (clone / "notes.txt").exists()


def test_the_patch_is_the_change_byte_for_byte(own_experiment: Experiment, tmp_path: Path) -> None:
    """Lines as Windows ends them, a text that is no UTF-8, git's settings, staged files; what it ignores is only named."""
    root = own_experiment.root
    (root / "windows.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    (root / ".gitignore").write_text("keys.py\nruns/\n.venv/\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    for name, value in (("color.ui", "always"), ("diff.noprefix", "true"), ("diff.external", "false"),
                        ("diff.relative", "true"), ("diff.context", "0")):  # fmt: skip
        git(root, "config", name, value)
    (root / "staged.py").write_text("x = 1\n")
    git(root, "add", "staged.py")
    git(root, "mv", "data.py", "moved.py")
    (root / "data.py").write_text("from moved import *  # noqa: F403\n")
    (root / "windows.py").write_bytes(b"x = 1\r\ny = 3\r\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\nx = 1\n")
    (root / "keys.py").write_text("PASSWORD = 'correct-horse'\n")
    run = own_experiment.train("trainer.max_steps=1", "logger=none", cwd=root)
    assert (run.receipt["code"]["untracked"], run.receipt["code"]["ignored"]) == (
        ["data.py", "latin.py"],
        ["keys.py"],
    )
    assert b"correct-horse" not in (run.folder / "code.patch").read_bytes() + (run.folder / "receipt.json").read_bytes()
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(root), str(clone))
    git(clone, "apply", str(run.folder.resolve() / "code.patch"))
    for name in ("windows.py", "latin.py", "staged.py", "moved.py", "data.py"):
        assert (clone / name).read_bytes() == (root / name).read_bytes()


def test_a_credential_in_the_change_is_not_recorded(own_experiment: Experiment) -> None:
    root, value = own_experiment.root, "ghp_abcdefghijklmnopqrstuvwxyz0123456789"
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "model.py").write_text((root / "model.py").read_text() + f"\nTOKEN = '{value}'\n")
    run = own_experiment.train("trainer.max_steps=1", "logger=none", cwd=root)
    for name in ("receipt.json", "code.patch"):
        text = (run.folder / name).read_text()
        assert value not in text
        assert NOT_RECORDED in text
