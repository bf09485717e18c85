"""What both sides share: a ResNet-18 and a GPT of 124 million weights, random data of their kind, and the clock.

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
BATCH = {"resnet18": 256, "gpt": 16} if LARGE else {"resnet18": 8, "gpt": 4}
WARMUP, STEPS = (20, 100) if LARGE else (3, 10)
SIDE, WIDTH, CLASSES = (224, 64, 1000) if LARGE else (64, 16, 10)
CONTEXT, VOCABULARY, LAYERS, HEADS, CHANNELS = (1024, 50_304, 12, 12, 768) if LARGE else (64, 512, 2, 4, 64)


class Residual(nn.Module):
    """Two convolutions beside an identity, or beside one of 1 x 1 where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.side: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.side = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.side(x))


class ResNet18(nn.Module):
    """Images (B, 3, H, W) to scores (B, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH << stage for stage in range(4)]
        blocks = [
            Residual(before, after, stride)
            for stage, after in enumerate(widths)
            for before, stride in ((widths[max(stage - 1, 0)], 2 if stage else 1), (after, 1))
        ]
        self.body = nn.Sequential(
            nn.Conv2d(3, WIDTH, 7, 2, padding=3, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1), *blocks,
        )  # fmt: skip
        self.head = nn.Linear(widths[-1], CLASSES)

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
    """Return `resnet18` or `gpt`."""
    return ResNet18() if name == "resnet18" else GPT()


def rows(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return random inputs and targets: images (N, 3, SIDE, SIDE) of bytes and classes, or tokens and those after.

    N is more than is measured, so no epoch ends; there is one image for each place in a batch.
    """
    draws, batches = np.random.default_rng(0), WARMUP + STEPS + 1
    size = BATCH[name] * batches
    if name == "resnet18":
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
