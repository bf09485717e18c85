"""Augmentation of whole batches on the training's device; each draw is a function of (seed, epoch, index, name).

A transform is a callable `(batch, draws) -> batch` for a tensor of inputs, or for (inputs, targets, ...). A sample gets
the same bits whatever else is in its batch, and on a CPU and a GPU. Random numbers are computed in integers or come
from tables (draws.py). The rest is single additions, multiplications and divisions in float32, which IEEE 754 rounds in
one way. None is fused, and no division is by a scalar, since CUDA would multiply by its reciprocal.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from labtrain.base.errors import ConfigError
from labtrain.data.draws import Draws
from labtrain.data.transforms import Own, Transform, apply

__all__ = ["Crop", "Draws", "Flip", "Mixup", "Noise", "Scale", "Shift", "Transform", "apply"]

IMAGE_DIMENSIONS = 3  # (B, H, W) at least


class _Inputs(Own, ABC):
    """A transform of the inputs, which does not change targets."""

    def __call__(self, batch: object, draws: Draws) -> object:
        inputs, *rest = _parts(batch, self)
        changed = self.change(inputs, draws)
        return [changed, *rest] if isinstance(batch, list | tuple) else changed

    @abstractmethod
    def change(self, inputs: Tensor, draws: Draws) -> Tensor:
        """Return the transformed inputs."""


@dataclass(frozen=True)
class Scale(_Inputs):
    """Converts uint8 to float32 from 0 to 1, then to (x - mean) / std if given: one number, or one a channel.

    Gives the bits of torchvision's ToTensor and Normalize on a CPU.
    """

    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, Sequence):  # a list, as Hydra makes it
                object.__setattr__(self, name, tuple(map(float, value)))
        _wanted(self, self.std is None or bool(np.all(np.asarray(self.std) > 0)), "a std above 0")

    def change(self, inputs: Tensor, draws: Draws) -> Tensor:
        if inputs.dtype != torch.uint8:
            raise ConfigError(f"Scale of {inputs.dtype}: expected torch.uint8", hint="remove it, or put it first")
        device = inputs.device
        scaled = inputs.to(torch.float32).div_(_constant(255.0, device))
        if self.mean is not None:
            scaled.sub_(self._spread(self.mean, scaled))
        return scaled if self.std is None else scaled.div_(self._spread(self.std, scaled))

    def _spread(self, value: float | tuple[float, ...], inputs: Tensor) -> Tensor:
        if isinstance(value, tuple) and (inputs.dim() <= IMAGE_DIMENSIONS or inputs.shape[1] != len(value)):
            raise ConfigError(
                f"{self} has {len(value)} channels, inputs have shape {tuple(inputs.shape)}",
                hint="set one number, or one for each channel of (B, C, H, W)",
            )
        constant = _constant(value, inputs.device)
        return constant.view(-1, 1, 1) if isinstance(value, tuple) else constant


@dataclass(frozen=True)
class Shift(_Inputs):
    """Moves each image, (B, ..., H, W), by up to `pixels` up or down and left or right; new pixels are zero."""

    pixels: int

    def __post_init__(self) -> None:
        _wanted(self, self.pixels >= 0, "pixels of 0 or more")

    def change(self, inputs: Tensor, draws: Draws) -> Tensor:
        _images(inputs, self)
        return _windows(inputs, draws, self.pixels, *inputs.shape[-2:])


@dataclass(frozen=True)
class Crop(_Inputs):
    """Takes a window of `size` x `size` pixels of each image, (B, ..., H, W), with `padding` zeros around the image."""

    size: int
    padding: int = 0

    def __post_init__(self) -> None:
        _wanted(self, self.size >= 1 and self.padding >= 0, "a size of 1 or more and padding of 0 or more")

    def change(self, inputs: Tensor, draws: Draws) -> Tensor:
        _images(inputs, self)
        largest = min(inputs.shape[-2:]) + 2 * self.padding
        if self.size > largest:
            raise ConfigError(
                f"{self} of images of {inputs.shape[-2]} x {inputs.shape[-1]}: the window is larger",
                hint=f"size={largest} or less, or more padding",
            )
        return _windows(inputs, draws, self.padding, self.size, self.size)


@dataclass(frozen=True)
class Flip(_Inputs):
    """Mirrors each image, (B, ..., H, W), left to right with probability `p`."""

    p: float = 0.5

    def __post_init__(self) -> None:
        _wanted(self, 0 <= self.p <= 1, "a probability")

    def change(self, inputs: Tensor, draws: Draws) -> Tensor:
        _images(inputs, self)
        flipped = draws.uniform("flip") < self.p
        return torch.where(_over(flipped, inputs), inputs.flip(-1), inputs)


@dataclass(frozen=True)
class Noise(_Inputs):
    """Adds normal numbers of deviation `std` to each element of inputs of any shape."""

    std: float

    def __post_init__(self) -> None:
        _wanted(self, self.std >= 0, "a std of 0 or more")

    def change(self, inputs: Tensor, draws: Draws) -> Tensor:
        _floating(inputs, self)
        noise = draws.normal("noise", *inputs.shape[1:]).mul_(self.std)
        return inputs + noise.to(inputs.dtype)


@dataclass(frozen=True)
class Mixup(Own):
    """Mixes each sample, inputs and label, with a partner from the whole dataset, in parts of Beta(alpha, alpha).

    Labels, integers (B,), become float32 (B, num_classes), like those of torchvision's v2.MixUp. Each sample has its
    own part and partner; torchvision draws one part a batch and rolls the batch. Inputs of any shape. After `Scale`.

    Source: H. Zhang and others, mixup: Beyond Empirical Risk Minimization, ICLR 2018.
    """

    num_classes: int
    alpha: float = 1.0

    def __post_init__(self) -> None:
        _wanted(self, self.num_classes >= 2 and 0 < self.alpha <= 1000, "2 or more classes and alpha to 1000")

    def partners(self, draws: Draws, num_samples: int) -> Tensor:
        """Return the index of each sample's partner, int64 (B,)."""
        return draws.integers("partner", 0, num_samples)

    def __call__(self, batch: object, draws: Draws) -> object:
        """Mix the first half of a batch with the second half, whose samples are the partners."""
        inputs, *rest = _parts(batch, self)
        if not rest or not isinstance(rest[0], Tensor) or rest[0].dim() != 1 or rest[0].is_floating_point():
            raise ConfigError(f"{self} of a batch without labels", hint="return (inputs, labels), labels as integers")
        _floating(inputs, self)
        if rest[0].device.type == "cpu" and not (rest[0].min() >= 0 and rest[0].max() < self.num_classes):
            raise ConfigError(
                f"{self} of labels of {rest[0].min()} to {rest[0].max()}: expected 0 to {self.num_classes - 1}",
                hint=f"Mixup(num_classes={int(rest[0].max()) + 1}), or labels from 0",
            )
        half = len(draws) // 2
        part = draws.first(half).beta("part", self.alpha)
        labels = functional.one_hot(rest[0].long(), self.num_classes).to(torch.float32)
        mixed = [_mixed(whole, part, half) for whole in (inputs, labels)]
        return [*mixed, *(other[:half] for other in rest[1:])]


def _mixed(whole: Tensor, part: Tensor, half: int) -> Tensor:
    part = _over(part, whole).to(whole.dtype)
    return (whole[:half] * part).add_(whole[half:] * (1 - part))


def _windows(images: Tensor, draws: Draws, padding: int, height: int, width: int) -> Tensor:
    """Return a window of each image (B, ..., H, W), each at its own place: (B, ..., height, width)."""
    padded = functional.pad(images, (padding,) * 4) if padding else images
    high, wide = padded.shape[-2:]
    tops, lefts = draws.integers("top", 0, high - height + 1), draws.integers("left", 0, wide - width + 1)
    planes = padded.reshape(len(images), -1, high, wide)  # (B, C, H, W)
    starts = torch.arange(planes.shape[0] * planes.shape[1], device=images.device).view(*planes.shape[:2], 1) * high
    lines = starts + tops.view(-1, 1, 1) + torch.arange(height, device=images.device)  # (B, C, height)
    places = (lines * wide + lefts.view(-1, 1, 1)).view(-1)
    # All runs of `width` elements are a view: a window is `height` of them, copied row by row.
    return planes.reshape(-1).unfold(0, width, 1).index_select(0, places).view(*images.shape[:-2], height, width)


def _parts(batch: object, transform: object) -> list[Any]:
    parts = list(batch) if isinstance(batch, list | tuple) else [batch]
    if not parts or not isinstance(parts[0], Tensor):
        found = type(parts[0] if parts else batch).__name__
        raise ConfigError(
            f"{transform} of a batch of {found}: expected a tensor or (inputs, targets)",
            hint="write your own callable (batch, draws) -> batch",
        )
    return parts


def _wanted(transform: object, holds: bool, what: str) -> None:
    if not holds:
        raise ConfigError(f"{transform}: expected {what}", hint=f"help(labtrain.augment.{type(transform).__name__})")


def _images(inputs: Tensor, transform: object) -> None:
    if inputs.dim() < IMAGE_DIMENSIONS:
        raise ConfigError(
            f"{transform} of inputs {tuple(inputs.shape)}: expected images (B, ..., H, W)",
            hint="reshape the dataset's array: images.reshape(-1, 1, 28, 28)",
        )


def _floating(inputs: Tensor, transform: object) -> None:
    if not inputs.is_floating_point():
        raise ConfigError(f"{transform} of {inputs.dtype}: expected floats", hint=f"Scale() before {transform}")


def _over(values: Tensor, inputs: Tensor) -> Tensor:
    """Return one value a sample, (B,), in a shape that broadcasts over inputs (B, ...)."""
    return values.view(-1, *[1] * (inputs.dim() - 1))


@cache
def _constant(value: float | tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32).to(device)
