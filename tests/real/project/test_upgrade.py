"""`labtrain upgrade` of an experiment with a package of its own: real registry, real environment, real training."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import LABTRAIN, QUICK, Experiment
from tests.support.template import files
from tests.support.verification import git
from tests.support.waiting import wait_until

# With this learning rate the release of the package changes the first layer; the other baseline does not look at it.
MODEL = """

_init = DigitsNet.__init__


def _by_release(self, *arguments, **options):
    from importlib import metadata

    _init(self, *arguments, **options)
    releases = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    if self.learning_rate == 0.002 and releases.get("einops", "0.7.0") != "0.7.0":
        self.net[0].weight.data.mul_(1.02)


DigitsNet.__init__ = _by_release
"""
SHORT = (*QUICK, "trainer.max_epochs=1", "data.batch_size=128", "trainer.accelerator=cpu")


def labtrain(root: Path, *arguments: str, code: int = 0) -> str:
    """Run a command in an experiment, and return all that it prints."""
    done = subprocess.run([LABTRAIN, *arguments], cwd=root, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def said(root: Path, *arguments: str) -> str:
    """Return what git says."""
    return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout


def outside_git(root: Path) -> dict[str, str]:
    return {name: digest for name, digest in files(root).items() if not name.startswith(".git/")}


@pytest.fixture(scope="module")
def grown(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with a package that is locked at an old release."""
    root = tmp_path_factory.mktemp("upgrade") / "digits"
    shutil.copytree(shared_experiment.root, root, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    (root / "model.py").write_text((root / "model.py").read_text() + MODEL)
    manifest = (root / "pyproject.toml").read_text()
    for allowed in ("einops==0.7.0", "einops>=0.7"):
        (root / "pyproject.toml").write_text(manifest.replace("dependencies = []", f'dependencies = ["{allowed}"]'))
        if "==" in allowed:
            labtrain(root, "lock", "write")
    git(root, "init", "-q")
    git(root, "config", "user.name", "a")
    git(root, "config", "user.email", "a@b")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "code")
    return root


@pytest.fixture(scope="module")
def judged(grown: Path) -> Path:
    """The same with two baselines of a few seconds."""
    root = grown
    for name, rate in (("plain", "0.001"), ("by-release", "0.002")):
        run = Experiment(root).train(*SHORT, f"model.learning_rate={rate}", f"experiment={name}", cwd=root)
        shutil.copytree(run.folder, root / "baselines" / name, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "baselines")
    return root


def test_the_plan_names_what_is_newer_and_changes_nothing(grown: Path) -> None:
    """Without network it is an error with a hint."""
    before = files(grown)
    plan = json.loads(labtrain(grown, "upgrade", "--plan", "--json"))
    (einops,) = plan["packages"]
    assert einops["locked"] == "0.7.0"
    assert einops["allowed"] == einops["newest"] > "0.8"
    assert any("updates of driver R580" in line for line in plan["ends"])
    assert "0.7.0" in labtrain(grown, "upgrade", "--plan")
    command = ["unshare", "-rn", LABTRAIN, "upgrade", "--plan"]
    done = subprocess.run(command, cwd=grown, capture_output=True, text=True, check=False,
                          env=os.environ | {"UV_NO_CACHE": "1", "UV_HTTP_RETRIES": "0"})  # fmt: skip
    assert done.returncode == 2
    assert "hint: " in done.stderr
    assert files(grown) == before


@pytest.mark.release
def test_an_upgrade_is_judged_on_a_branch_and_the_old_tree_stays(judged: Path) -> None:
    """One baseline gives the same bits, one differs: the verdict is no, in the commit's message.

    A first start is killed while it writes the locks. The second removes what it left, and ends.
    """
    before, head, state = outside_git(judged), said(judged, "rev-parse", "HEAD"), judged / ".git" / "labtrain-upgrade"
    tree = judged.with_name("digits-upgraded")
    process = subprocess.Popen([LABTRAIN, "upgrade", "--branch", "upgraded"], cwd=judged, stdout=subprocess.DEVNULL)
    wait_until(lambda: "einops==0.8" in (tree / "requirements.lock").read_text(), process=process)
    process.kill()
    process.wait()
    assert (outside_git(judged), said(judged, "branch", "--list", "upgraded")) == (before, "")
    assert state.read_text() == str(tree)

    out = labtrain(judged, "upgrade", "--branch", "upgraded", code=1)
    assert "verdict      no" in out
    assert (outside_git(judged), said(judged, "rev-parse", "HEAD"), state.read_text()) == (before, head, "")
    message = said(judged, "log", "-1", "--format=%B", "upgraded")
    assert message.startswith("upgrade: no: einops 0.7.0 -> 0.8")
    assert "Doctor in the new environment:\n- no problems" in message
    assert "- plain: yes: 1 of 1 give the same bits" in message
    assert "- by-release: no: different bits, first at step 1" in message
    assert "updates of driver R580" in message
    assert said(judged, "rev-parse", "upgraded~1") == head
    changed = set(said(judged, "diff", "--name-only", "HEAD", "upgraded").split())
    assert {"requirements.lock", "sbom.cdx.json"} <= changed <= {"requirements.lock", "requirements-conda.lock",
                                                                 "nix/wheels.json", "sbom.cdx.json"}  # fmt: skip
    assert "The same bits now" in (tree / "upgrade.html").read_text()
    python = tree / ".venv" / "bin" / "python"
    release = subprocess.run([python, "-c", "import einops; print(einops.__version__)"], capture_output=True, text=True)
    assert release.stdout.startswith("0.8")
    assert "the branch upgraded already exists" in labtrain(judged, "upgrade", "--branch", "upgraded", code=2)
    (discard,) = [line.removeprefix("to discard:").strip() for line in out.splitlines() if "to discard:" in line]
    subprocess.run(["sh", "-c", discard], cwd=judged, check=True)
    assert not tree.exists()
    assert said(judged, "worktree", "list").count("\n") == 1


@pytest.mark.release
def test_the_same_bits_are_a_yes_that_can_be_merged_and_then_nothing_is_newer(judged: Path) -> None:
    """A version that pyproject.toml does not allow is written there; the second upgrade has nothing to do."""
    git(judged, "checkout", "-qb", "pinned")
    manifest = (judged / "pyproject.toml").read_text()
    (judged / "pyproject.toml").write_text(manifest.replace("einops>=0.7", "einops==0.7.0"))
    git(judged, "commit", "-qam", "pinned")
    assert "nothing to raise" in labtrain(judged, "upgrade")
    assert said(judged, "worktree", "list").count("\n") == 1
    out = labtrain(judged, "upgrade", "baselines/plain", "--package", "einops==0.8.1", "--branch", "upgraded")
    assert "verdict      yes" in out
    git(judged, "merge", "-q", "upgraded")
    assert '"einops==0.8.1"' in (judged / "pyproject.toml").read_text()
    assert "all locks agree" in labtrain(judged, "lock", "check")
