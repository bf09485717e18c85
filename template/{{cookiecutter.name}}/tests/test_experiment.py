"""Fast checks of the experiment: its data, its model, and that a start gives the same bits twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import DigitsData
from model import DigitsNet

ROOT = Path(__file__).resolve().parents[1]


def train(runs: Path, *overrides: str) -> tuple[Path, str]:
    """Train a few steps and return the run's folder and its weights digest."""
    short = ("trainer.max_epochs=1", "trainer.limit_train_batches=3")  # with its validation, which callbacks may need
    command = [sys.executable, str(ROOT / "train.py"), f"paths.runs={runs}", *short, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder, digest = done.stdout.split()
    return Path(folder), digest


@pytest.fixture
def data() -> DigitsData:
    made = DigitsData(batch_size=32)
    made.setup("fit")
    return made


def test_the_parts_do_not_overlap(data: DigitsData) -> None:
    assert [len(part) for part in (data.train, data.val, data.test)] == [1257, 270, 270]


def test_a_batch_has_the_shape_that_the_model_takes(data: DigitsData) -> None:
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 1, 8, 8)
    assert labels.dtype == torch.int64
    assert 0 <= images.min() and images.max() <= 1
    assert DigitsNet(width=4)(images).shape == (32, 10)


def test_the_same_start_gives_the_same_bits(tmp_path: Path) -> None:
    first, digest = train(tmp_path / "first")
    assert train(tmp_path / "second")[1] == digest
    assert json.loads((first / "receipt.json").read_text())["status"] == "complete"


def test_another_seed_gives_other_bits(tmp_path: Path) -> None:
    assert train(tmp_path / "first")[1] != train(tmp_path / "second", "seed=43")[1]
