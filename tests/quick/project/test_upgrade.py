"""`labtrain upgrade` refuses before it changes anything; environment.yml follows the lock. No network."""

import subprocess
from pathlib import Path

import pytest

from labtrain.base.errors import LabtrainError
from labtrain.bootstrap import locked_block
from labtrain.environment.lock.newer import changed_pins, raise_spec
from labtrain.project.upgrade import UpgradeOptions, make_upgrade
from labtrain.review.gate import GateOptions
from tests.conftest import ROOT
from tests.support.locks import change

pytest_plugins = ["tests.support.locks"]

LOCK = (ROOT / "requirements.lock").read_text()
OWN = "einops==0.7.0 \\\n    --hash=sha256:" + 64 * "0" + "\n"


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def refused(root: Path, *packages: str, branch: str = "upgraded") -> str:
    """Return the error of an upgrade that may not begin."""
    options = UpgradeOptions(packages=packages, branch=branch, judged=GateOptions())
    with pytest.raises(LabtrainError) as raised:
        make_upgrade(root, options, ask=None, say=lambda _: None)
    return str(raised.value)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A committed project with one package of its own."""
    root = tmp_path / "digits"
    root.mkdir()
    (root / "pyproject.toml").write_text('[project]\nname = "digits"\ndependencies = ["einops>=0.7"]\n')
    (root / "environment.yml").write_text("dependencies: []\n")
    (root / "requirements.lock").write_text(OWN + locked_block(LOCK, "torch"))
    git(root, "init", "-q")
    git(root, "config", "user.name", "a")
    git(root, "config", "user.email", "a@b")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "all")
    return root


def test_an_upgrade_begins_from_committed_locks(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other changes do not matter: they are not part of the worktree."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (project / "model.py").write_text("changed")
    assert "no baselines" in refused(project)
    (project / "requirements.lock").write_text(OWN)
    assert "uncommitted changes of requirements.lock" in refused(project)
    (tmp_path / "empty").mkdir()
    assert "has no requirements.lock" in refused(tmp_path / "empty")
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / "empty" / name).write_text((project / name).read_text())
    assert "is not in a git repository with a commit" in refused(tmp_path / "empty")


def test_what_cannot_be_raised_here_is_named(project: Path) -> None:
    """labtrain's own pins, a package that is not locked, and what is neither NAME nor NAME==VERSION."""
    assert "hint: labtrain update brings a newer labtrain" in refused(project, "torch==2.10.0")
    assert "timm is not in requirements.lock; pyproject.toml names einops" in refused(project, "timm")
    for text in ("einops>=0.8", "einops ; python_version>'3'", "einops==0.7,<1", "einops[all]", "-r x"):
        assert f"--package {text}: must be NAME or NAME==VERSION" in refused(project, text)


def test_the_branch_must_be_new(project: Path) -> None:
    git(project, "branch", "upgraded")
    assert "the branch upgraded already exists\n\nhint: --branch upgraded-2" in refused(project)
    assert "hint: --branch NAME" in refused(project, branch="a..b")


def test_environment_yml_follows_the_lock(locks: Path) -> None:
    """A version keeps its precision; lines without a version, and comments, stay."""
    before = (locks / "environment.yml").read_text()
    assert not raise_spec(locks)
    change(locks / "requirements.lock", "\ntorch==2.9.1", "\ntorch==2.10.3")
    change(locks / "requirements.lock", "\nlightning==2.6", "\nlightning==2.7")
    assert raise_spec(locks)
    expected = before.replace("pytorch-gpu=2.9.1", "pytorch-gpu=2.10.3").replace("lightning=2.6.*", "lightning=2.7.*")
    assert (locks / "environment.yml").read_text() == expected
    pins = [line.split(" ")[0] for line in changed_pins(ROOT / "requirements.lock", locks / "requirements.lock")]
    assert pins == ["lightning", "torch"]
