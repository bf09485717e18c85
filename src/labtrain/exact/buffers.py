"""The buffers of a model during a step that runs one shard at a time, above all BatchNorm's statistics.

Each shard starts with the buffers from the start of the step, so none depends on the process that ran the shard before.
At the end the running statistics of normalisations are the mean over the samples, along the same tree as the gradients:
a running mean is that of the whole batch, a running variance the mean of the shards' variances. Any other buffer must
be the same after all shards, like a counter or the vectors of spectral normalisation. labtrain refuses a queue that
each shard fills differently. Buffers that do not change, such as a causal mask, are neither copied nor exchanged.
"""

import zlib
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labtrain.base.contracts import Options
from labtrain.exact.metric_states import add_rows
from labtrain.exact.tree_sum import ShardSum
from labtrain.record.digests import tensor_bytes

# Of BatchNorm, InstanceNorm, and of similar modules that people write.
STATISTICS = ("running_", "moving_")
# The dtypes that gloo and NCCL both send: neither int16, nor unsigned ones of more than 8 bits, nor float8.
SENT = {
    torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.complex64, torch.complex128,
}  # fmt: skip

Owned = tuple[nn.Module, str]  # a module, and the name of a buffer of its own
New = dict[tuple[str, str], Tensor]  # by the module's path and the buffer's name


class Buffers:
    """Keeps a model's buffers through its steps.

    Args:
        module: the model.
        device: of the training.
        rank: this process.
        world: the number of processes.
        judge: called with (what, hint) for a buffer that differs between the shards.
    """

    def __init__(
        self, module: nn.Module, *, device: torch.device, rank: int, world: int, judge: Callable[[str, str], None]
    ) -> None:
        self.module, self.device, self.rank, self.world, self.judge = module, device, rank, world, judge
        self.numbers: list[list[float]] = []  # of this rank's shards
        self._left: dict[int, dict[int, Tensor]] = {}  # by shard and buffer: its value, times the shard's share
        self._weights: dict[int, float] = {}
        self._new: dict[int, New] = {}  # by shard: buffers that its step made
        self._scan()

    def _scan(self) -> None:
        """Find the buffers, tied ones once; statistics first."""
        parts = list(self.module.modules())
        self._tables: list[Options] = [part._buffers for part in parts]
        self._tables += [part._modules for part in parts]
        self._lengths = list(map(len, self._tables))
        self._empty = [(table, name) for table in self._tables for name, each in table.items() if each is None]
        owned: dict[int, Owned] = {}
        self._known: set[tuple[int, str]] = set()
        for part in parts:
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    owned.setdefault(id(buffer), (part, name))
                    self._known.add((id(part), name))
        means = [each for each in owned.values() if is_statistic(each[1], _get(each))]
        others = [each for each in owned.values() if each not in means]
        self.owned = means + others
        self.num_means = len(means)
        self._before = [_get(each).clone() for each in self.owned]
        self._seen = [(now := _get(each), now._version) for each in self.owned]
        self._first = list(self._seen)
        self._sum: tuple[list[int], ShardSum] | None = None

    def begin(self) -> None:
        """Begin a step."""
        self._left, self._weights, self._new, self.numbers = {}, {}, {}, []
        if self._has_new():
            self._scan()
        for index in self._changed():
            now = _get(self.owned[index])
            self._before[index] = now.clone()
            self._seen[index] = self._first[index] = now, now._version

    def restore(self) -> None:
        """Begin another shard of the step."""
        for index in self._changed():
            now, before = _get(self.owned[index]), self._before[index]
            if (now.shape, now.dtype) == (before.shape, before.dtype):
                now.copy_(before)
            else:  # a table that code replaced for a longer sequence
                part, name = self.owned[index]
                part._buffers[name] = now = before.clone()
            self._seen[index] = now, now._version
        self._drop_new()

    def _drop_new(self) -> None:
        if self._has_new():
            parts = dict(self.module.named_modules())
            for path, name in self._news():
                was_there = any(table is parts[path]._buffers and name == empty for table, empty in self._empty)
                parts[path]._buffers[name] = None
                if not was_there:
                    del parts[path]._buffers[name]

    def take(self) -> Callable[[], None]:
        """Restore the buffers from the start of the step; return what puts the current ones back.

        The shard's backward is still to come, so both keep the memory and the version that autograd has noted.
        """
        taken = [(index, now := _get(self.owned[index]), now.clone(), now._version) for index in self._changed()]
        new = self._news() if self._has_new() else {}
        for index, *_ in taken:
            self._put(index, self._first[index][0], self._before[index], self._first[index][1])
            self._seen[index] = self._first[index]
        self._drop_new()

        def give() -> None:
            for index, buffer, value, version in taken:
                self._put(index, buffer, value, version)
            for (path, name), buffer in new.items():
                self.module.get_submodule(path)._buffers[name] = buffer

        return give

    def _put(self, index: int, buffer: Tensor, value: Tensor, version: int) -> None:
        """Put a buffer into its module, with this content, as if nothing had written to it since that version."""
        part, name = self.owned[index]
        part._buffers[name] = buffer
        if buffer.shape != value.shape:  # code set its .data
            buffer.data = value.clone()
        else:
            buffer.data.copy_(value)
        torch._C._autograd._unsafe_set_version_counter((buffer,), (version,))

    def leave(self, shard: int, weight: float) -> list[float]:
        """Save the buffers after a shard.

        Returns:
            A number for each buffer: for statistics 1.0 if they changed, otherwise a checksum of the content. And a
            checksum of new buffers.
        """
        numbers = [0.0] * (len(self.owned) + 1)
        self._left[shard], self._weights[shard] = {}, weight
        for index in self._changed():
            now = _get(self.owned[index]).detach()
            if index < self.num_means:
                self._left[shard][index] = now * weight
            numbers[index] = 1.0 if index < self.num_means or _counts_batches(self.owned[index]) else _number(now)
        if self._has_new():
            self._new[shard] = new = self._news()
            numbers[-1] = 1.0 + sum(map(_number, new.values()))
        self.numbers.append(numbers)
        return numbers

    def install(self, numbers_SB: list[list[float]], ranges: list[range]) -> None:
        """End the step.

        Args:
            numbers_SB: what `leave` returned for each shard.
            ranges: the shards of each rank; a rank without a shard gets the buffers that are not averaged.

        Raises:
            ConfigError: in strict mode, a buffer that is not a statistic differs between the shards.
        """
        columns = list(zip(*numbers_SB, strict=True))
        last = max(rank for rank, shards in enumerate(ranges) if shards)  # the rank of the last shard
        for index in range(self.num_means, len(self.owned)):
            part, name = self.owned[index]
            buffer, differs = _get(self.owned[index]), len(set(columns[index])) > 1
            if differs:
                self.judge(*_differs(name, type(part).__name__, buffer))
            if any(columns[index]) and self.world > 1 and (differs or not all(ranges)):
                broadcast(buffer, src=last)  # which raises no version
                self._seen[index] = buffer, -1
        changed = [index for index, column in enumerate(columns[: self.num_means]) if any(column)]
        if changed:
            for index, mean in zip(changed, self._means(changed, ranges), strict=True):
                _get(self.owned[index]).copy_(mean)
        if any(columns[-1]):
            self._adopt(len(numbers_SB))

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
        total.send()
        return total.total()

    def _adopt(self, shards: int) -> None:
        """Adopt buffers that a step made, or gave a first value; this happens once, so it need not be fast."""
        mine = {
            shard: ({key: buffer.detach().cpu() for key, buffer in new.items()}, self._weights[shard])
            for shard, new in self._new.items()
        }
        gathered = [mine]
        if self.world > 1:
            gathered = [{}] * self.world
            dist.all_gather_object(gathered, mine)
        by_shard = {shard: left for part in gathered for shard, left in part.items()}
        parts = dict(self.module.named_modules())
        for path, name in dict.fromkeys(key for new, _ in by_shard.values() for key in new):
            found = [(new[path, name], weight) for _, (new, weight) in sorted(by_shard.items()) if (path, name) in new]
            value = found[-1][0]
            if is_statistic(name, value) and len(found) == shards:
                rows = [(each.double() * weight).reshape(-1) for each, weight in found]
                value = add_rows(torch.stack(rows)).to(value.dtype).view(value.shape)
            elif len(found) < shards or len({tensor_bytes(each).tobytes() for each, _ in found}) > 1:
                self.judge(*_differs(name, type(parts[path]).__name__, value))
            buffer = parts[path]._buffers.get(name)
            if buffer is not None:
                buffer.copy_(value)
            else:  # on a rank that had no shard
                parts[path]._buffers[name] = value.to(self.device)

    def _changed(self) -> list[int]:
        """Return which have changed since the last look: BatchNorm's kernel raises no version."""
        found = []
        for index, (each, (then, version)) in enumerate(zip(self.owned, self._seen, strict=True)):
            now = each[0]._buffers.get(each[1])
            silent = each[0].training and isinstance(each[0], nn.modules.batchnorm._NormBase)
            if now is not None and (silent or now is not then or now._version != version):
                found.append(index)
        return found

    def _has_new(self) -> bool:
        return [*map(len, self._tables)] != self._lengths or any(table[name] is not None for table, name in self._empty)

    def _news(self) -> New:
        return {
            (path, name): buffer
            for path, part in self.module.named_modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and (id(part), name) not in self._known
        }


def broadcast(tensor: Tensor, *, src: int) -> None:
    """Send a tensor of one rank to every rank, of any dtype, in place; called on every rank."""
    if tensor.dtype in SENT:
        dist.broadcast(tensor, src=src)
        return
    content = tensor.detach().reshape(-1).view(torch.uint8).contiguous()
    dist.broadcast(content, src=src)
    tensor.detach().copy_(content.view(tensor.dtype).view(tensor.shape))


def _differs(name: str, kind: str, buffer: Tensor) -> tuple[str, str]:
    return (
        f"buffer {name} of {kind} ({buffer.dtype}) differs between the shards of a step, and it is not a"
        " running statistic of a normalisation: labtrain averages only those",
        "change it in on_train_batch_end, which runs once a step, or determinism.shards=1",
    )


def is_statistic(name: str, buffer: Tensor) -> bool:
    """Return whether a buffer, by its own name, is averaged over the samples."""
    return name.startswith(STATISTICS) and (buffer.is_floating_point() or buffer.is_complex())


def _number(buffer: Tensor) -> float:
    return 1.0 + zlib.crc32(tensor_bytes(buffer))


def _get(each: Owned) -> Tensor:
    """Return the current buffer: code may have replaced the tensor."""
    return cast(Tensor, each[0]._buffers[each[1]])


def _counts_batches(each: Owned) -> bool:
    return each[1] == "num_batches_tracked" and isinstance(each[0], nn.modules.batchnorm._NormBase)
