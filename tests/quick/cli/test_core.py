"""labtrain's core: what works without torch, Lightning and the other packages of the extra `train`."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT
from tests.support.old import RUNS, unpack

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Also what others bring along, which labtrain must not need either.
TRAIN = {Requirement(line).name for line in PROJECT["optional-dependencies"]["train"]} - {"jinja2", "rich"}
WITHOUT = {*TRAIN, "pandas", "conda_lock", "sklearn", "matplotlib", "cyclonedx", "wheel", "uv"}
BLOCKED = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {WITHOUT!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from labtrain.cli import main
main()
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("old"))


def labtrain(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "300"}
    )


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["ls"], 0, "digits/4588a0f6eb85  complete"),
        (["digest", RUNS[0]], 0, "67fb0332a6e42b83"),
        (["diff", RUNS[0], RUNS[1]], 1, "first at step 1"),
        (["lock", "check"], 0, "all locks agree"),
        (["verify", RUNS[1], "--steps", "0"], 1, "unverified"),
        (["doctor", "--fast"], 1, "  driver "),
        (["new", "../another"], 0, "../another"),
        (["update"], 0, "git reset --hard"),  # the last: it changes the experiment
    ],
)
def test_the_core_needs_no_torch(experiment: Path, words: list[str], code: int, says: str) -> None:
    """Each command of the core answers with those packages blocked."""
    done = labtrain(experiment, *words)
    assert done.returncode == code, done.stderr
    assert says in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["report", RUNS[0], "-o", "x.html"], "numpy"),
        (["crate", RUNS[0], "-o", "x.zip"], "rocrate"),
        (["demo"], "numpy"),
    ],
)
def test_another_command_says_what_installs_its_packages(experiment: Path, words: list[str], package: str) -> None:
    """In an experiment that is `make setup`; the hint repeats the command as it was typed."""
    done = labtrain(experiment, *words)
    assert done.returncode == 2
    assert (
        f"error: labtrain {words[0]} needs {package}, which is not installed: this is labtrain without" in done.stderr
    )
    assert f"hint: make setup && .venv/bin/labtrain {' '.join(words)}\n" in done.stderr
    assert not list(experiment.glob("x.*"))


def test_outside_an_experiment_the_hint_names_the_extra(tmp_path: Path) -> None:
    done = labtrain(tmp_path, "demo")
    assert done.returncode == 2
    assert "labtrain[train]" in done.stderr


@pytest.mark.parametrize(
    ("told", "address"),
    [
        (
            '{"url": "file:///x/labtrain-0.1.0-py3-none-any.whl", "archive_info": {}}',
            "file:///x/labtrain-0.1.0-py3-none-any.whl",
        ),
        ('{"url": "https://host/lab", "vcs_info": {"vcs": "git", "commit_id": "3f2a"}}', "git+https://host/lab@3f2a"),
    ],
)
def test_the_hint_names_where_labtrain_came_from(told: str, address: str) -> None:
    """A repository as pip and uv take it: with git+ and the commit."""
    from labtrain.base.errors import _address

    assert _address(told) == address


def test_a_bug_of_ones_own_imports_keeps_its_traceback() -> None:
    """Only an import of labtrain's own is explained: another program's missing module is its own affair."""
    from labtrain.base.errors import missing_package

    with pytest.raises(ModuleNotFoundError) as raised:
        __import__("module_that_is_nowhere")
    assert missing_package(raised.value, ["labtrain", "report"]) is None
