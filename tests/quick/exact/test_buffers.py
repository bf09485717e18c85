"""Which buffers are averaged, compared or left alone. In a training: test_steps.py and test_exact.py."""

from typing import Any

import pytest
import torch
from torch import nn

from labtrain.base.errors import ConfigError
from labtrain.exact.buffers import Buffers
from labtrain.exact.tree_sum import shard_ranges


def refuse(what: str, hint: str) -> None:
    raise ConfigError(what, hint=hint)


def buffers_of(module: nn.Module) -> Buffers:
    return Buffers(module, device=torch.device("cpu"), rank=0, world=1, judge=refuse)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")))
        self.register_buffer("running_average", torch.zeros(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("center", torch.zeros(2))
        self.norm = nn.BatchNorm1d(2)


def step(module: Module, buffers: Buffers, *shards: tuple[Any, int]) -> None:
    buffers.begin()
    for shard, (value, samples) in enumerate(shards):
        if shard:
            buffers.restore()
        module.running_average += value
        module.seen += samples
        buffers.leave(shard, 0.5)
    buffers.install(buffers.numbers, shard_ranges(len(shards), 1))


def test_what_changed_is_averaged_and_the_rest_is_neither_copied_nor_touched() -> None:
    module = Module().eval()
    buffers = buffers_of(module)
    at = [name for _, name in buffers.owned].index("mask")
    mask, copy = module.mask, buffers._before[at]
    for number in range(3):
        step(module, buffers, (torch.tensor([1.0, 2.0]), 1), (torch.tensor([3.0, 6.0]), 1))
        assert module.running_average.tolist() == [2.0 * (number + 1), 4.0 * (number + 1)]
        assert module.seen == number + 1
    assert module.mask is mask
    assert mask._version == 0
    assert buffers._before[at] is copy
    assert module.norm.running_var.tolist() == [1.0, 1.0]  # frozen: not a bit of it changes


def test_statistics_that_change_without_a_word_are_seen() -> None:
    """BatchNorm's kernel does not raise its buffers' version."""
    module = Module()
    buffers = buffers_of(module)
    inputs = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    buffers.begin()
    for shard in range(2):
        if shard:
            buffers.restore()
        module.norm(inputs[4 * shard : 4 * shard + 4])
        buffers.leave(shard, 0.5)
    buffers.install(buffers.numbers, [range(2)])
    alone = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
    for norm, half in zip(alone, inputs.chunk(2), strict=True):
        norm(half)
    for name in ("running_mean", "running_var"):
        expected = getattr(alone[0], name) * 0.5 + getattr(alone[1], name) * 0.5
        assert torch.equal(getattr(module.norm, name), expected)
    assert module.norm.num_batches_tracked == 1


def test_a_buffer_that_code_replaces_is_seen() -> None:
    module = Module().eval()
    buffers = buffers_of(module)
    buffers.begin()
    module.running_average = torch.tensor([5.0, 6.0])
    buffers.leave(0, 1.0)
    buffers.install(buffers.numbers, [range(1)])
    assert module.running_average.tolist() == [5.0, 6.0]


@pytest.mark.parametrize("name", ["seen", "center"])
def test_what_is_no_statistic_and_differs_is_refused(name: str) -> None:
    """Integers or not: a mean of queues or of counters is neither."""
    module = Module()
    buffers = buffers_of(module)
    buffers.begin()
    for shard in range(2):
        if shard:
            buffers.restore()
        getattr(module, name).add_(shard + 1)
        buffers.leave(shard, 0.5)
    with pytest.raises(ConfigError, match=f"buffer {name} of Module .* differs between the shards"):
        buffers.install(buffers.numbers, [range(2)])


def test_a_shard_that_waits_keeps_what_its_backward_needs() -> None:
    """Other shards run between its forward and its backward: BatchNorm's statistics, replaced buffers, a write in place."""
    module, rows = Module(), torch.rand(4, 2)
    buffers = buffers_of(module)

    def forward(shard: int) -> torch.Tensor:
        module.center = module.center + shard + 1
        module.running_average += shard
        return (module.norm(rows * (shard + 1)) * module.center * module.running_average.sum()).sum()

    def gradient(loss: torch.Tensor) -> list[float]:
        found: list[float] = torch.autograd.grad(loss, module.norm.weight)[0].tolist()
        return found

    buffers.begin()
    alone = []
    for shard in range(3):
        alone.append((gradient(forward(shard)), module.center.tolist(), module.norm.running_mean.tolist()))
        buffers.restore()
    buffers.begin()
    waiting = []
    for shard in range(3):
        loss = forward(shard)
        waiting.append((loss, buffers.take()))
    for number, (loss, give) in enumerate(waiting):
        give()
        assert (gradient(loss), module.center.tolist(), module.norm.running_mean.tolist()) == alone[number]
        buffers.restore()
    assert module.center.tolist() == [0.0, 0.0]
