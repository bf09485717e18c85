"""The buffers of a model during a step that is run a shard at a time: BatchNorm's statistics first of all.

Each shard begins with the buffers of the step's beginning, so that none depends on which process ran the one before. At
the end a floating-point buffer is the mean over the samples: a running mean is then that of the whole batch, a running
variance the mean of the shards' variances.
"""

import zlib
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from labtrain.digests import tensor_bytes
from labtrain.errors import ConfigError
from labtrain.reduction import ShardSum


class Kept:
    """The buffers of a model, sorted by what becomes of them at the end of a step.

    Attributes:
        means: floating-point: (module, name) of each.
        always: which of them count as changed in every step: BatchNorm's kernel does not tell torch.
        equal: of other dtypes, which must come out the same in every shard.
        counts: BatchNorm's number of batches, one more in every shard.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.means: list[tuple[torch.nn.Module, str]] = []
        self.always: list[bool] = []
        self.equal: list[tuple[torch.nn.Module, str]] = []
        self.counts: list[tuple[torch.nn.Module, str]] = []
        for part in module.modules():
            norm = isinstance(part, torch.nn.modules.batchnorm._NormBase)
            for name, buffer in part._buffers.items():
                if buffer is None or any(buffer is other._buffers[key] for other, key in self.all):
                    continue
                if buffer.is_floating_point() or buffer.is_complex():
                    self.means.append((part, name))
                    self.always.append(norm)
                else:
                    (self.counts if norm else self.equal).append((part, name))

    @property
    def all(self) -> list[tuple[torch.nn.Module, str]]:
        return self.means + self.equal + self.counts


class Buffers:
    """The buffers during one step: each shard begins with those of the step's beginning.

    Afterwards a floating-point buffer that a shard changed is the mean over the samples; the others are as they were.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.before = [get(owner, name).clone() for owner, name in kept.all]
        self.seen = [(now := get(owner, name), now._version) for owner, name in kept.means + kept.equal]

    def restore(self) -> None:
        """Begin the next shard."""
        for (owner, name), before in zip(self.kept.all, self.before, strict=True):
            get(owner, name).copy_(before)
        self.seen = [(now := get(owner, name), now._version) for owner, name in self.kept.means + self.kept.equal]

    def push(self, total: ShardSum, shard: int, offset: int, weight: float) -> list[float]:
        """Put in what a shard left, times its share of the samples.

        Returns:
            For each floating-point buffer 1.0 where it was changed, for each other one a number of its content.
        """
        numbers = []
        seen = iter(self.seen)
        for number, ((owner, name), always) in enumerate(zip(self.kept.means, self.kept.always, strict=True)):
            now, (then, version) = get(owner, name), next(seen)
            total.push(shard, offset + number, now.detach() * weight)
            changed = (always and owner.training) or now is not then or now._version != version
            numbers.append(float(changed))
        for owner, name in self.kept.equal:
            now, (then, version) = get(owner, name), next(seen)
            changed = now is not then or now._version != version
            numbers.append(float(zlib.crc32(tensor_bytes(now))) if changed else -1.0)
        return numbers

    def install(self, means: list[Tensor], numbers_SB: Tensor, *, everywhere: bool) -> None:
        """End the step.

        Args:
            means: of the floating-point buffers.
            numbers_SB: what `push` returned for each of the S shards.
            everywhere: every rank had a shard; or those that had none get the integers from rank 0.

        Raises:
            ConfigError: integers come out differently.
        """
        for column, (owner, name) in enumerate(self.kept.equal, start=len(self.kept.means)):
            if len(set(numbers_SB[:, column].tolist())) > 1:
                raise ConfigError(
                    f"buffer {name} of {type(owner).__name__} ({get(owner, name).dtype}) comes out differently in the"
                    " shards of a step: it cannot be averaged",
                    hint="make it floating-point, or determinism.shards=null",
                )
        for column, ((owner, name), mean) in enumerate(zip(self.kept.means, means, strict=True)):
            changed = numbers_SB[:, column].amax() > 0
            get(owner, name).copy_(torch.where(changed, mean, self.before[column]))
        if not everywhere:
            for owner, name in self.kept.equal + self.kept.counts:
                dist.broadcast(get(owner, name), src=0)


def get(owner: torch.nn.Module, name: str) -> Tensor:
    """Return a buffer as it is now: code may have put another tensor in its place."""
    return cast(Tensor, owner._buffers[name])
