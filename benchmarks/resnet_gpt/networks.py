"""What both sides share: ResNet-18, ResNet-50 and a GPT of 124 million weights, random data, and the clock.

On a CPU both are small and so is the data: it shows that the benchmark runs, and no more.

K. He et al.: Deep Residual Learning for Image Recognition. arXiv:1512.03385, 2015. A. Radford et al.: Language Models
are Unsupervised Multitask Learners, 2019.
"""

import json
import os
import sys
import time
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGE = DEVICE.type == "cuda"
MEAN, STD = 0.449, 0.226  # of ImageNet's, over its channels
BATCH = {"resnet18": 256, "resnet50": 128, "gpt": 16} if LARGE else {"resnet18": 8, "resnet50": 8, "gpt": 4}
WARMUP, STEPS = (20, 100) if LARGE else (3, 10)
SIDE, WIDTH, CLASSES = (224, 64, 1000) if LARGE else (64, 16, 10)
CONTEXT, VOCABULARY, LAYERS, HEADS, CHANNELS = (1024, 50_304, 12, 12, 768) if LARGE else (64, 512, 2, 4, 64)


def normalised(before: int, after: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution without bias and its BatchNorm."""
    return [nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(after)]


class Residual(nn.Module):
    """Convolutions beside an identity, or beside one of 1 x 1 where the shape changes.

    Args:
        before: channels of the input.
        width: of its convolutions.
        stride: of the first 3 x 3.
        deep: a bottleneck of three convolutions, whose output has 4 * width channels; else two of width channels.
    """

    def __init__(self, before: int, width: int, stride: int, *, deep: bool) -> None:
        super().__init__()
        after = 4 * width if deep else width
        relu = nn.ReLU(inplace=True)
        if deep:
            first, second = normalised(before, width, 1), normalised(width, width, 3, stride)
            layers = [*first, relu, *second, relu, *normalised(width, after, 1)]
        else:
            layers = [*normalised(before, width, 3, stride), relu, *normalised(width, after, 3)]
        self.body = nn.Sequential(*layers)
        changes = stride != 1 or before != after
        self.side = nn.Sequential(*normalised(before, after, 1, stride)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.side(x))


class ResNet(nn.Module):
    """Images (B, 3, H, W) to scores (B, CLASSES): ResNet-18, or ResNet-50 if it is deep."""

    def __init__(self, *, deep: bool) -> None:
        super().__init__()
        blocks, channels = [], WIDTH
        for stage, count in enumerate((3, 4, 6, 3) if deep else (2, 2, 2, 2)):
            for block in range(count):
                blocks.append(Residual(channels, WIDTH << stage, 2 if stage and not block else 1, deep=deep))
                channels = (WIDTH << stage) * (4 if deep else 1)
        stem = [*normalised(3, WIDTH, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
        self.body = nn.Sequential(*stem, *blocks)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.body(images).mean((2, 3))))


class Layer(nn.Module):
    """Attention and a perceptron, each beside an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_perceptron = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.mixed, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.perceptron = nn.Sequential(
            nn.Linear(CHANNELS, 4 * CHANNELS), nn.GELU(approximate="tanh"), nn.Linear(4 * CHANNELS, CHANNELS)
        )

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            self.mixed(self.before_attention(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )
        seen = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True
        )  # (B, HEADS, T, CHANNELS / HEADS)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.perceptron(self.before_perceptron(x)))


class GPT(nn.Module):
    """Tokens (B, T) to scores (B, T, VOCABULARY); the embedding and the last layer are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, CHANNELS), nn.Embedding(CONTEXT, CHANNELS)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)), nn.LayerNorm(CHANNELS))
        self.head = nn.Linear(CHANNELS, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.layers(self.tokens(tokens) + self.places.weight)))


def network(name: str) -> nn.Module:
    """Return `resnet18`, `resnet50` or `gpt`."""
    return GPT() if name == "gpt" else ResNet(deep=name == "resnet50")


def rows(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return random inputs and targets: images (N, 3, SIDE, SIDE) of bytes and classes, or tokens and those after.

    N is more than is measured, so no epoch ends; there is one image for each place in a batch.
    """
    draws, batches = np.random.default_rng(0), WARMUP + STEPS + 1
    size = BATCH[name] * batches
    if name != "gpt":
        images = draws.integers(0, 256, (BATCH[name], 3, SIDE, SIDE), np.uint8)
        return np.tile(images, (batches, 1, 1, 1)), draws.integers(0, CLASSES, size)
    tokens = draws.integers(0, VOCABULARY, (size, CONTEXT + 1))
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy."""
    return functional.cross_entropy(scores.flatten(0, -2), targets.flatten())


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW in one kernel."""
    return torch.optim.AdamW(module.parameters(), 3e-4, fused=True)


class Clock:
    """Samples a second, by the wall's clock on a GPU and in CPU time on a CPU; it prints them and ends the process."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.steps, self.began = batch_size, 0, 0.0

    def tick(self) -> None:
        """Count a step."""
        self.steps += 1
        if self.steps == WARMUP:
            self.began = self._now()
        elif self.steps == WARMUP + STEPS:
            speed = STEPS * self.batch_size / (self._now() - self.began)
            found = {"samples_per_second": speed}
            if LARGE:
                found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
            os._exit(0)

    @staticmethod
    def _now() -> float:
        if not LARGE:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()
