"""`labtrain lock export`, installed without a network by the locked uv and pip, from wheels of the real lock."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from labtrain.bootstrap import locked_block
from tests.conftest import LABTRAIN, ROOT

# With a source distribution, which is built with the locked setuptools, and a compiled wheel.
PACKAGES = ("antlr4-python3-runtime", "click", "iniconfig", "markupsafe", "setuptools")
BIN = Path(LABTRAIN).parent


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few packages of the lock, by the command of docs/start/install.md. Asks the registry."""
    root = tmp_path_factory.mktemp("export")
    lock = (ROOT / "requirements.lock").read_text()
    (root / "requirements.lock").write_text("".join(locked_block(lock, name) for name in PACKAGES))
    download = "-m pip download -q --require-hashes --no-deps -r requirements.lock -d wheels"
    done = subprocess.run([sys.executable, *download.split()], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    export = [LABTRAIN, "lock", "export", "--format", "pylock", "--wheels", "wheels"]
    done = subprocess.run(export, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"pylock.toml: 5 packages for Python {sys.version[:4]}\n"), done.stderr
    return root


def uv_sync(root: Path, venv: Path) -> list[str]:
    return [str(BIN / "uv"), "pip", "sync", "--python", f"{venv}/bin/python", "--offline", "--find-links", "wheels",
            "pylock.toml"]  # fmt: skip


def uv_install(root: Path, venv: Path) -> list[str]:
    return [str(BIN / "uv"), "pip", "install", "--python", f"{venv}/bin/python", "--offline", "--find-links", "wheels",
            "-r", "pylock.toml"]  # fmt: skip


def pip(root: Path, venv: Path) -> list[str]:
    return [sys.executable, "-m", "pip", "--python", f"{venv}/bin/python", "install", "--no-index", "--find-links",
            "wheels", "-r", "pylock.toml"]  # fmt: skip


def install(root: Path, tmp_path: Path, command: Callable[[Path, Path], list[str]]) -> tuple[str, set[str]]:
    """Install into a new environment; return what the installer says, and the distributions that are there then."""
    venv = tmp_path / "venv"
    subprocess.run([str(BIN / "uv"), "venv", "-q", "--python", sys.executable, str(venv)], check=True)
    environment = {**os.environ, "UV_CACHE_DIR": str(tmp_path / "cache"), "PIP_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command(root, venv), cwd=root, env=environment, capture_output=True, text=True, check=False)
    (site,) = venv.glob("lib/python*/site-packages")
    found = {info.name.partition("-")[0].replace("_", "-") for info in site.glob("*.dist-info")}
    return done.stdout + done.stderr, found


@pytest.mark.parametrize("command", [uv_sync, uv_install, pip])
def test_it_is_installed_without_a_network(
    downloaded: Path, tmp_path: Path, command: Callable[[Path, Path], list[str]]
) -> None:
    said, found = install(downloaded, tmp_path, command)
    assert set(PACKAGES) <= found, said


@pytest.mark.parametrize("command", [uv_sync, pip])
def test_a_wheel_that_was_changed_is_refused(
    downloaded: Path, tmp_path: Path, command: Callable[[Path, Path], list[str]]
) -> None:
    """A whole wheel, in which one file has another content; the lock's export names it, too."""
    (wheel,) = (downloaded / "wheels").glob("iniconfig-*.whl")
    before = wheel.read_bytes()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("iniconfig/more.py", "changed = True\n")
    try:
        said, found = install(downloaded, tmp_path, command)
        assert "hash" in said.lower(), said
        assert "iniconfig" not in found
        export = [LABTRAIN, "lock", "export", "--wheels", "wheels", "-o", "pylock.again.toml"]
        done = subprocess.run(export, cwd=downloaded, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert f"the hash of {wheel.name} is not in requirements.lock" in done.stderr
    finally:
        wheel.write_bytes(before)
