"""What all sides share: Fashion-MNIST, the network, and the clock. No Lightning, which the bare loop does without.

Fashion-MNIST is 60,000 and 10,000 images (1, 28, 28) of clothes in ten classes, as Debian's package has them (apt-get
install dataset-fashion-mnist); where it is not installed, random images of the same shape.

H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST. arXiv:1708.07747, 2017.
"""

import gzip
import itertools
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

FOLDER = Path("/usr/share/datasets/fashion-mnist")
SIZES = {"train": 60_000, "t10k": 10_000}
MEAN, STD = 0.1307, 0.3081  # those that torchvision's examples take for MNIST
WARMUP, EPOCH = 50, 469  # steps; 60,000 images in batches of 128


def source() -> str:
    """Return where the images come from."""
    return "Fashion-MNIST" if FOLDER.is_dir() else "generated, of Fashion-MNIST's shape"


def load(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 1, 28, 28), uint8, and labels (N,), int64, of `train` or `t10k`."""
    if FOLDER.is_dir():
        images, labels = (
            np.frombuffer(gzip.decompress((FOLDER / f"{part}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
            for kind, offset in (("images-idx3", 16), ("labels-idx1", 8))
        )
    else:
        draws = np.random.default_rng(0)
        images, labels = (draws.integers(0, top, SIZES[part] * size, np.uint8) for top, size in ((256, 784), (10, 1)))
    return images.reshape(-1, 1, 28, 28), labels.astype(np.int64)


def tensors(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images as float32, normalized as MNIST's usually are, and the labels as int64."""
    images, labels = load(part)
    return (torch.tensor(images).float() / 255 - MEAN) / STD, torch.tensor(labels)


def network(name: str) -> nn.Sequential:
    """Return a network that makes of images (B, 1, 28, 28) scores (B, 10).

    Args:
        name: `mlp`: that of the most used Hydra and Lightning template; `conv` and `wide`: a step takes 50 ms, few
            weights and many; `rows`: `mlp` for rows of 16 numbers.
    """
    if name == "conv":
        return nn.Sequential(
            *_convolution(1, 16), *_convolution(16, 16), nn.MaxPool2d(2), *_convolution(16, 32), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 49, 10),
        )  # fmt: skip
    width = 1024 if name == "wide" else 64
    sizes = (16 if name == "rows" else 784, width, 2 * width, width)
    hidden = [
        layer
        for before, after in itertools.pairwise(sizes)
        for layer in (nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def _convolution(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()


class Clock:
    """CPU milliseconds of a step: over as many as an epoch has, so one epoch's end and its checkpoint are among them.

    It then prints them, and how many of them were the kernel's, and ends the process.
    """

    def __init__(self, steps: int = EPOCH) -> None:
        self.first, self.last = WARMUP, WARMUP + steps
        self.steps, self.began = 0, (0.0, 0.0)

    def tick(self) -> None:
        """Count one."""
        self.steps += 1
        if self.steps == self.first:
            self.began = _spent()
        elif self.steps == self.last:
            milliseconds, kernel = (
                (now - began) / (self.last - self.first) * 1e3 for now, began in zip(_spent(), self.began, strict=True)
            )
            sys.stdout.write(json.dumps({"milliseconds": milliseconds, "kernel_milliseconds": kernel}) + "\n")
            sys.stdout.flush()
            os._exit(0)


def _spent() -> tuple[float, float]:
    """Return the CPU seconds of this process, and those of them in the kernel."""
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
