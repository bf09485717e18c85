"""The repository's locks, as copies that a test may change."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = ["environment.yml", "virtual-packages.yml", "conda-lock.yml", "requirements.lock", "requirements-conda.lock"]
FILES += ["environment-cpu.yml", "conda-lock-cpu.yml", "pixi.toml", "pixi.lock"]
FILES += ["nix/wheels.json", "flake.lock", "sbom.cdx.json", "pyproject.toml"]


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    (tmp_path / "nix").mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
