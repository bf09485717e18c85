"""Runs to hold an upgrade against, and `labtrain gate`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import LABTRAIN, QUICK, Experiment, Run

# What an upgrade does: OTHER_BITS=1 changes a layer a little at the start, 2 makes the training worse, 3 ends it.
UPGRADE = """

_init = DigitsNet.__init__


def _other_bits(self, *arguments, **options):
    import os

    _init(self, *arguments, **options)
    if os.environ.get("OTHER_BITS") == "1":
        self.net[0].weight.data.mul_(1.02)
    if os.environ.get("OTHER_BITS") == "2":
        self.learning_rate /= 100
    if os.environ.get("OTHER_BITS") == "3":
        raise RuntimeError("this release is broken")


DigitsNet.__init__ = _other_bits
"""
SHORT = (*QUICK, "trainer.max_epochs=3", "data.batch_size=128")


def gate(*arguments: Path | str, code: int, **env: str) -> Run:
    done = subprocess.run([LABTRAIN, "gate", "--trust", *map(str, arguments)], capture_output=True, text=True, check=False,
                          timeout=500, env=os.environ | env)  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return Run(done.returncode, done.stdout, done.stderr, Path.cwd())


@pytest.fixture(scope="module")
def recorded(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of one experiment with three seeds."""
    root = tmp_path_factory.mktemp("gate") / "digits"
    shutil.copytree(shared_experiment.root, root, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    (root / "model.py").write_text((root / "model.py").read_text() + UPGRADE)
    experiment = Experiment(root)
    return [experiment.train(*SHORT, f"seed={seed}", cwd=root).folder for seed in (1, 2, 3)]
