"""Nix as Debian has it, with tests/nix/flake.nix in place of nixpkgs."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labtrain.bootstrap import locked_block
from tests.conftest import ROOT, need, skip_or_fail

NIX_CONFIG = """\
experimental-features = nix-command flakes
build-users-group =
sandbox = false
substituters =
max-jobs = 2
"""
SYSTEM = "x86_64-linux"
Entry = dict[str, Any]


def entry(file: Path) -> Entry:
    """Return the entry of wheels.json for a downloaded file."""
    hashed = "sha256-" + base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
    if file.suffix != ".whl":
        pname, _, version = file.name.removesuffix(".tar.gz").rpartition("-")
        found = {"pname": pname, "version": version, "format": "sdist", "extension": "tar.gz"}
    else:
        pname, version, *build, python, abi, platform = file.stem.split("-")
        found = {"pname": pname, "version": version, "format": "wheel", "build": build[0] if build else None}
        found |= {"dist": python, "python": python, "abi": abi, "platform": platform}
    return {"name": re.sub(r"[-_.]+", "-", pname).lower(), **found, "hash": hashed}


class Nix:
    """Nix, with its caches and its stand-in for nixpkgs in a folder of the test's."""

    def __init__(self, folder: Path) -> None:
        need("nix", "nix-bin")
        need("patchelf", "patchelf")
        need("git", "git")
        if os.geteuid() != 0:
            skip_or_fail("the stand-in for nixpkgs uses the host's Python, outside Nix's sandbox, as only root may ask")
        self.folder, self.stub, self.wheels = folder, folder / "stub", folder / "wheels"
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("NIX_", "PYTHON"))},
            "NIX_CONFIG": NIX_CONFIG,
            "XDG_CACHE_HOME": str(folder / "cache"),
            "TMPDIR": str(folder),  # nix develop leaves an empty folder there
        }
        self.stub.mkdir()
        self.wheels.mkdir()
        shutil.copyfile(ROOT / "tests/nix/flake.nix", self.stub / "flake.nix")
        version = sysconfig.get_python_version()
        host = {
            "interpreter": str(Path(sys.base_prefix, "bin", f"python{version}").resolve()),
            "libPrefix": f"python{version}",
            "wheels": str(self.wheels),
        }
        (self.stub / "host.json").write_text(json.dumps(host))

    def __call__(self, *command: str, cwd: Path, stub: bool = True) -> str:
        """Run nix and return what it prints."""
        override = ["--override-input", "nixpkgs", f"path:{self.stub}", "--no-write-lock-file"] if stub else []
        at = command.index("--") if "--" in command else command.index("-c") if "-c" in command else len(command)
        return self.run("nix", *command[:at], *override, *command[at:], cwd=cwd)

    def run(self, *command: str, cwd: Path) -> str:
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def git(self, folder: Path) -> None:
        """Let git know all files of a folder: Nix sees no others."""
        self.run("git", "init", "-q", cwd=folder)
        self.run("git", "add", "-A", cwd=folder)

    def download(self, names: list[str] | None = None) -> list[Entry]:
        """Fetch locked files for this Python, by hash, and return their entries."""
        lock = (ROOT / "requirements.lock").read_text()
        requirements = self.folder / "requirements.txt"
        requirements.write_text(lock if names is None else "".join(locked_block(lock, name) for name in names))
        # pip asks an sdist for its metadata, with the setuptools of this environment.
        command = "-m pip download -q --no-deps --require-hashes --no-build-isolation --no-cache-dir"
        self.run(sys.executable, *command.split(), "-r", str(requirements), "-d", str(self.wheels), cwd=self.folder)
        return [entry(file) for file in sorted(self.wheels.iterdir())]


@pytest.fixture(scope="module")
def nix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nix]:
    folder = tmp_path_factory.mktemp("nix")
    yield Nix(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def repository(nix: Nix) -> Path:
    """What the flake reads of this repository, as it stands in the working tree."""
    target = nix.folder / "repository"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packed = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    names = ["flake.nix", "flake.lock", "nix", "pyproject.toml", "README.md", "LICENSE"]
    for name in sorted({*names, *packed["packages"], *packed["force-include"]}):
        source, copy = ROOT / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, copy)
    nix.git(target)
    return target


@pytest.fixture(scope="module")
def small(nix: Nix, repository: Path) -> list[Entry]:
    """The files of env-small, now the repository's wheels.json."""
    small = f".#packages.{SYSTEM}.env-small.names"
    names = sorted(set(json.loads(nix("eval", "--json", small, cwd=repository))))
    entries = nix.download(names)
    assert [one["name"] for one in sorted(entries, key=lambda one: one["name"])] == names
    (repository / "nix/wheels.json").write_text(json.dumps(entries))
    return entries
