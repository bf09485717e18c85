"""The experiment that labtrain 38c3d00 made on 2026-12-01, with its repository and three complete runs."""

import subprocess
import tarfile
from pathlib import Path

from tests.conftest import ROOT

ARCHIVE = ROOT / "tests/golden/old/digits.tar.xz"
RUNS = (
    "4588a0f6eb85",
    "1b831cf3e7e2",
    "b6b03edb2f54",
)  # of the first commit, of the second, of the second in runs/wide


def unpack(folder: Path) -> Path:
    """Unpack it in `folder`, and return the experiment's folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    subprocess.run(["git", "checkout", "-q", "."], cwd=folder / "digits", check=True)
    return folder / "digits"
