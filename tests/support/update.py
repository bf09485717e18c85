"""A labtrain that is newer than the kept experiment (tests/support/old), and git."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from labtrain.assets import SOURCES
from tests.conftest import ROOT
from tests.support.template import run

TEMPLATE = "template/{{cookiecutter.name}}"
NEWER = "0.2.0"
# What a person has besides: git must not sign, convert or ask.
IDENTITY = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_AUTHOR_NAME": "Ada", "GIT_AUTHOR_EMAIL": "ada@example.org",
            "GIT_COMMITTER_NAME": "Ada", "GIT_COMMITTER_EMAIL": "ada@example.org"}  # fmt: skip


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=folder, env={**os.environ, **IDENTITY}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def newer_labtrain(target: Path, edits: Mapping[str, tuple[str, str]], *, version: str = NEWER) -> Path:
    """Copy labtrain's sources, with edits: (before, after) by path. Before is empty for a new file."""
    for name in ("src", *SOURCES.values()):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, target / name)
    init = target / "src" / "labtrain" / "__init__.py"
    init.write_text(init.read_text().replace('__version__ = "0.1.0"', f'__version__ = "{version}"'))
    for name, (before, after) in edits.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if before else ""
        assert before in text, f"{name} has no {before!r}"
        path.write_text(text.replace(before, after, 1) if before else after)
    return target


def labtrain(source: Path, *words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command of a copy."""
    variables = {**IDENTITY, "PYTHONPATH": str(source / "src"), "PYTHONDONTWRITEBYTECODE": "1", **env}
    return run(sys.executable, "-c", "from labtrain.cli import main; main()", *words, cwd=cwd, env=variables)
