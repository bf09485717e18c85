"""Models and data for the tests of what names a run."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

from tests.support.exact_worker import Data


class Tiny(pl.LightningModule):
    """One layer on the images of exact_worker.Data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class TurnsNaN(Tiny):
    """Its loss is NaN from the fourth step on."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step >= 3 else loss


class Weighted(Tiny):
    """Weights of some classes, by class number."""

    def __init__(self, class_weights: dict[int, float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor([float(class_weights.get(label, 1.0)) for label in range(10)]))


class LoadsByPath(Tiny):
    """Imports a module from its file, by no import that can be read in the source."""

    def __init__(self, file: str) -> None:
        super().__init__()
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.scale = module.SCALE


class Noisy(torch.utils.data.Dataset):
    """Augments with a generator of its own."""

    def __init__(self, base: Any) -> None:
        self.base, self.generator = base, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Any:
        image, label = self.base[index]
        return image + float(self.generator.standard_normal()), label


class OwnGenerator(Data):
    """exact_worker's data, with noise from a generator that the dataset holds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.train = Noisy(self.train)


class FromFile(Data):
    """exact_worker's data, with noise added from a file that no configuration names."""

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self.folder = folder

    def setup(self, stage: str) -> None:
        self.train.images = self.train.images + float((Path(self.folder).parent / "noise.txt").read_text())


def execute(file: str) -> float:
    """Run a file and return its SCALE; no module is left."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return float(module.SCALE)


class ExecutesLate(Tiny):
    """Runs a file from its fourth step on."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        scale = execute(self.file) if self.trainer.global_step >= 3 else 1.0
        return super().training_step(batch, batch_idx) * scale


class Executing(torch.utils.data.Dataset[Any]):
    """Runs a file for each sample."""

    def __init__(self, dataset: Any, file: str) -> None:
        self.dataset, self.file = dataset, file

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        image, label = self.dataset[index]
        return image * execute(self.file), label


class ExecutingData(Data):
    """Its workers run a file."""

    def __init__(self, file: str, **options: Any) -> None:
        super().__init__(**options)
        self.file = file

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        loader.dataset = Executing(loader.dataset, self.file)
        return loader
