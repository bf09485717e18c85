"""Which buffers are averaged, compared or left alone. BatchNorm in a training: test_exact.py."""

import pytest
import torch
from torch import nn

from labtrain.buffers import Buffers
from labtrain.errors import ConfigError
from labtrain.reduction import shard_ranges


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")))
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.norm = nn.BatchNorm1d(2)


def step(module: Module, buffers: Buffers, *shards: tuple[torch.Tensor, int]) -> None:
    buffers.begin()
    numbers = []
    for shard, (value, samples) in enumerate(shards):
        if shard:
            buffers.restore()
        module.average += value
        module.seen += samples
        numbers.append(buffers.leave(shard, 0.5))
    buffers.install(numbers, shard_ranges(len(shards), 1))


def test_what_changed_is_averaged_and_the_rest_is_neither_copied_nor_touched() -> None:
    module = Module().eval()
    buffers = Buffers(module, shards=2, rank=0, world=1)
    mask, copy = module.mask, buffers._before[0]
    for number in range(3):
        step(module, buffers, (torch.tensor([1.0, 2.0]), 1), (torch.tensor([3.0, 6.0]), 1))
        assert module.average.tolist() == [2.0 * (number + 1), 4.0 * (number + 1)]
        assert module.seen == number + 1
    assert module.mask is mask
    assert mask._version == 0
    assert buffers._before[0] is copy
    assert module.norm.running_var.tolist() == [1.0, 1.0]  # frozen: not a bit of it changes


def test_statistics_that_change_without_a_word_are_seen() -> None:
    """BatchNorm's kernel does not raise its buffers' version."""
    module = Module()
    buffers = Buffers(module, shards=2, rank=0, world=1)
    inputs = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    buffers.begin()
    numbers = []
    for shard in range(2):
        if shard:
            buffers.restore()
        module.norm(inputs[4 * shard : 4 * shard + 4])
        numbers.append(buffers.leave(shard, 0.5))
    buffers.install(numbers, [range(2)])
    alone = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
    for norm, half in zip(alone, inputs.chunk(2), strict=True):
        norm(half)
    for name in ("running_mean", "running_var"):
        expected = getattr(alone[0], name) * 0.5 + getattr(alone[1], name) * 0.5
        assert torch.equal(getattr(module.norm, name), expected)
    assert module.norm.num_batches_tracked == 1


def test_a_buffer_that_code_replaces_is_seen() -> None:
    module = Module().eval()
    buffers = Buffers(module, shards=1, rank=0, world=1)
    buffers.begin()
    module.average = torch.tensor([5.0, 6.0])
    numbers = buffers.leave(0, 1.0)
    buffers.install([numbers], [range(1)])
    assert module.average.tolist() == [5.0, 6.0]


def test_integers_that_differ_are_refused() -> None:
    module = Module()
    with pytest.raises(ConfigError, match=r"buffer seen of Module .* comes out differently"):
        step(module, Buffers(module, shards=2, rank=0, world=1), (torch.ones(2), 1), (torch.ones(2), 2))
