"""The buffers of a model during a step that is run a shard at a time: BatchNorm's statistics first of all.

Each shard begins with the buffers of the step's beginning, so that none depends on which process ran the one before. At
the end a floating-point buffer that some shard changed is the mean over the samples, along the same tree as the
gradients: a running mean is then that of the whole batch, a running variance the mean of the shards' variances. What
does not change, such as a causal mask, is neither copied nor exchanged.
"""

import zlib
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from labtrain.digests import tensor_bytes
from labtrain.errors import ConfigError
from labtrain.reduction import ShardSum

Owned = tuple[torch.nn.Module, str]  # a module, and the name of a buffer of its own


class Buffers:
    """Keeps a model's buffers through its steps.

    Args:
        module: the model.
        shards: S.
        rank: this process.
        world: the number of processes.
    """

    def __init__(self, module: torch.nn.Module, *, shards: int, rank: int, world: int) -> None:
        self.shards, self.rank, self.world = shards, rank, world
        owned: dict[int, Owned] = {}  # tied ones once
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    owned.setdefault(id(buffer), (part, name))
        means = [each for each in owned.values() if _get(each).is_floating_point() or _get(each).is_complex()]
        others = [each for each in owned.values() if each not in means]
        self.owned = means + others
        self.num_means = len(means)
        self._before = [_get(each).clone() for each in self.owned]
        self._seen = [(now := _get(each), now._version) for each in self.owned]
        self._left: dict[int, dict[int, Tensor]] = {}  # by shard and buffer: what it left, times its share
        self._weights: dict[int, float] = {}
        self.numbers: list[list[float]] = []  # of this rank's shards
        self._sum: tuple[list[int], ShardSum] | None = None

    def begin(self) -> None:
        """Begin a step."""
        self._left, self._weights, self.numbers = {}, {}, []
        for index in self._changed():
            now = _get(self.owned[index])
            self._before[index] = now.clone()
            self._seen[index] = now, now._version

    def restore(self) -> None:
        """Begin another shard of the step."""
        for index in self._changed():
            now = _get(self.owned[index])
            now.copy_(self._before[index])
            self._seen[index] = now, now._version

    def leave(self, shard: int, weight: float) -> list[float]:
        """Keep what a shard left.

        Returns:
            A number a buffer: of those that are averaged 1.0 where it was changed; of the others one of their content.
        """
        numbers = [0.0] * len(self.owned)
        self._left[shard], self._weights[shard] = {}, weight
        for index in self._changed():
            now = _get(self.owned[index]).detach()
            if index < self.num_means:
                self._left[shard][index] = now * weight
                numbers[index] = 1.0
            elif not _counts_batches(self.owned[index]):  # one more in each shard: nothing to compare
                numbers[index] = 1.0 + zlib.crc32(tensor_bytes(now))
        self.numbers.append(numbers)
        return numbers

    def install(self, numbers_SB: list[list[float]], ranges: list[range]) -> None:
        """End the step.

        Args:
            numbers_SB: what `leave` returned for each of the S shards.
            ranges: the shards of each rank; one that had none gets what is not averaged from rank 0.

        Raises:
            ConfigError: integers come out differently.
        """
        columns = list(zip(*numbers_SB, strict=True))
        for each, column in zip(self.owned[self.num_means :], columns[self.num_means :], strict=True):
            if len(set(column)) > 1:
                raise ConfigError(
                    f"buffer {each[1]} of {type(each[0]).__name__} ({_get(each).dtype}) comes out differently in the"
                    " shards of a step: it cannot be averaged",
                    hint="make it floating-point, or determinism.shards=null",
                )
        changed = [index for index, column in enumerate(columns[: self.num_means]) if any(column)]
        if changed:
            for index, mean in zip(changed, self._means(changed, ranges), strict=True):
                _get(self.owned[index]).copy_(mean)
        if not all(ranges):
            for each in self.owned[self.num_means :]:
                dist.broadcast(_get(each), src=0)

    def _means(self, changed: list[int], ranges: list[range]) -> list[Tensor]:
        if self._sum is None or self._sum[0] != changed:
            like = [self._before[index] for index in changed]
            self._sum = changed, ShardSum(like, rank=self.rank, world=self.world)
        total = self._sum[1]
        total.begin(ranges)
        for shard in ranges[self.rank]:
            for number, index in enumerate(changed):
                left = self._left[shard].get(index)
                total.push(shard, number, self._before[index] * self._weights[shard] if left is None else left)
        return total.total()

    def _changed(self) -> list[int]:
        """Return which differ from when they were last seen: BatchNorm's kernel does not tell torch of its change."""
        found = []
        for index, (each, (then, version)) in enumerate(zip(self.owned, self._seen, strict=True)):
            now = _get(each)
            silent = each[0].training and isinstance(each[0], torch.nn.modules.batchnorm._NormBase)
            if silent or now is not then or now._version != version:
                found.append(index)
        return found


def _get(each: Owned) -> Tensor:
    """Return a buffer as it is now: code may have put another tensor in its place."""
    return cast(Tensor, each[0]._buffers[each[1]])


def _counts_batches(each: Owned) -> bool:
    return each[1] == "num_batches_tracked" and isinstance(each[0], torch.nn.modules.batchnorm._NormBase)
