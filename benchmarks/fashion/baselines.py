"""What people write without labtrain, on the same data and model: `python baselines.py NAME [NETWORK STEPS]`.

bare         a loop over slices of tensors, loss and accuracy by torchmetrics
per-sample   the same loop over torch's DataLoader, a sample at a time, as torchvision's datasets are
slices       Lightning's Trainer over such slices, without a progress bar
lightning    Lightning's Trainer with its defaults over torch's DataLoader: what templates do
lightning-epoch   the same, one epoch with its validation, to its end

Each but the last prints the CPU milliseconds of a step, as common.Clock counts them.
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from common import EPOCH, MEAN, STD, Clock, load, network, tensors
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

BATCH = 128


class Images(Dataset[tuple[Tensor, int]]):
    """One sample at a time, by the operations of torchvision's MNIST dataset with its ToTensor and Normalize."""

    def __init__(self, part: str) -> None:
        images, labels = load(part)
        self.images, self.labels = torch.tensor(images).squeeze(1), torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.images[index].numpy())
        image = torch.from_numpy(np.array(picture, np.uint8, copy=True)).view(28, 28, 1)
        image = image.permute((2, 0, 1)).contiguous().to(torch.float32).div(255)
        mean, std = torch.as_tensor((MEAN,)).view(-1, 1, 1), torch.as_tensor((STD,)).view(-1, 1, 1)
        return image.clone().sub_(mean).div_(std), int(self.labels[index])


class Slices:
    """Batches of shuffled rows of tensors, a new order each epoch."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return -(-len(self.labels) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.labels)).split(BATCH):
            yield self.images[rows], self.labels[rows]


def per_sample(part: str) -> DataLoader[Any]:
    """Return torch's own loader."""
    return DataLoader(Images(part), BATCH, shuffle=part == "train")


def loop(batches: Any, net: str, steps: int) -> None:
    """Train with a bare loop."""
    from torchmetrics import MeanMetric
    from torchmetrics.classification import MulticlassAccuracy

    model, clock = network(net), Clock(steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    losses, accuracy = MeanMetric(), MulticlassAccuracy(10, average="micro")
    while True:
        for images, labels in batches:
            scores = model(images)
            loss = nn.functional.cross_entropy(scores, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses(loss.detach())
            accuracy(scores, labels)
            clock.tick()


def trainer(batches: Any, net: str, *, epochs: int, val: Any = None, quiet: bool = False) -> None:
    """Train with Lightning's Trainer and its defaults; quiet: without what it prints."""
    import lightning.pytorch as pl
    from model import FashionNet, StepClock

    pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        enable_progress_bar=not quiet,
        enable_model_summary=not quiet,
        callbacks=[] if val else [StepClock()],
        limit_val_batches=None if val else 0,
    ).fit(FashionNet(net), batches, val)


def main() -> None:
    """Run one of them."""
    name, net, steps = sys.argv[1], "mlp", EPOCH
    if len(sys.argv) > 2:
        net, steps = sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(1)
    match name:
        case "bare":
            loop(Slices(*tensors("train")), net, steps)
        case "per-sample":
            loop(per_sample("train"), net, steps)
        case "slices":
            trainer(Slices(*tensors("train")), net, epochs=2, quiet=True)
        case "lightning":
            trainer(per_sample("train"), net, epochs=2)
        case "lightning-epoch":
            trainer(per_sample("train"), net, epochs=1, val=per_sample("t10k"))


if __name__ == "__main__":
    main()
