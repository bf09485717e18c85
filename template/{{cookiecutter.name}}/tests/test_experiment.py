"""Fast checks of the model and data that conf/ names: they fit together, and a start gives the same bits twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig
from torch.utils._pytree import tree_leaves

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
def config() -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config")


def test_the_model_trains_on_a_batch(config: DictConfig) -> None:
    trainer = Trainer(fast_dev_run=True, accelerator="cpu", logger=False, enable_model_summary=False)
    trainer.fit(instantiate(config.model), datamodule=instantiate(config.data))


def first_values(config: DictConfig) -> list[object]:
    """Return what the first batch of the validation holds, in whatever form."""
    data = instantiate(config.data)
    if not is_overridden("val_dataloader", data):
        pytest.skip("the data have no validation")
    data.prepare_data()
    data.setup("fit")
    return tree_leaves(next(iter(data.val_dataloader())))


def test_the_validation_data_are_the_same_each_time(config: DictConfig) -> None:
    """A split without a seed of its own would give other samples in each process."""
    for one, two in zip(first_values(config), first_values(config), strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_the_same_start_gives_the_same_bits(tmp_path: Path) -> None:
    first, digest = train(tmp_path / "first")
    assert train(tmp_path / "second")[1] == digest
    assert json.loads((first / "receipt.json").read_text())["status"] == "complete"


def test_another_seed_gives_other_bits(tmp_path: Path) -> None:
    assert train(tmp_path / "first")[1] != train(tmp_path / "second", "seed=43")[1]
