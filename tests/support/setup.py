"""A small environment that `make setup` made, and what may befall it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from labtrain.bootstrap import damaged_distributions, locked_block
from tests.conftest import ROOT

PACKAGES = ("uv", "pip", "iniconfig", "packaging")
WITH_THE_WHEEL = "idna"  # where an experiment has labtrain's own wheel


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose lock holds a few packages of the real one, and its environment."""
    root = tmp_path_factory.mktemp("project")
    lock = (ROOT / "requirements.lock").read_text()
    (root / "requirements.lock").write_text("".join(locked_block(lock, name) for name in PACKAGES))
    (root / "labtrain.lock").write_text(locked_block(lock, WITH_THE_WHEEL))
    set_up(root)
    return root


def set_up(root: Path) -> str:
    """Run what `make setup` runs, and return what it says."""
    done = subprocess.run([sys.executable, "-B", "-m", "labtrain.bootstrap"], cwd=root, capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "src"),
                                            "UV_CACHE_DIR": str(root.parent / "cache")})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def site(root: Path) -> Path:
    (found,) = (root / ".venv" / "lib").glob("python*/site-packages")
    return found


def contents(root: Path) -> dict[str, bytes]:
    """Return each file of the environment but bytecode and what an installer writes for itself."""
    its_own = ("RECORD", "INSTALLER", "REQUESTED")
    return {
        str(path.relative_to(root)): b"" if path.name in its_own else path.read_bytes()
        for path in sorted((root / ".venv").rglob("*"))
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith("uv_") and path.name != ".lock"
    }


def edited(root: Path) -> None:
    """An edit in place, which reaches uv's cache too, where that has hard links."""
    with (site(root) / "iniconfig" / "__init__.py").open("a") as file:
        file.write("# edited\n")


def without_stamp_and_uv(root: Path) -> None:
    """What an older doctor's hint said: afterwards nothing could install uv again."""
    (root / ".venv" / "labtrain-setup").unlink()
    (root / ".venv" / "bin" / "uv").unlink()


def replaced(root: Path) -> None:
    """Another version, and a package that the lock does not have."""
    pip = [str(root / ".venv" / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "iniconfig<2", "six"], check=True)


def broken_pip(root: Path) -> None:
    """pip's own code is gone, and uv with it."""
    shutil.rmtree(site(root) / "pip")
    (root / ".venv" / "bin" / "uv").unlink()


def without_metadata(root: Path) -> None:
    (info,) = site(root).glob("packaging-*.dist-info")
    (info / "METADATA").unlink()


def without_record(root: Path) -> None:
    (info,) = site(root).glob("packaging-*.dist-info")
    (info / "RECORD").unlink()


def uninstalled(root: Path) -> None:
    subprocess.run([root / ".venv" / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", "packaging"], check=True)


def without_python(root: Path) -> None:
    (root / ".venv" / "bin" / "python").unlink()


def python_that_is_none(root: Path) -> None:
    (root / ".venv" / "bin" / "python").unlink()
    (root / ".venv" / "bin" / "python").write_text("no program")


def repairs(project: Path, damage: Callable[[Path], None]) -> None:
    """Damage it and set it up: afterwards each file is as it was, and a further one has nothing to do."""
    before = contents(project)
    damage(project)
    assert contents(project) != before
    assert "done: .venv matches requirements.lock" in set_up(project)
    assert contents(project) == before
    assert damaged_distributions(project / ".venv") == {}
    assert set_up(project) == ""
