"""Which samples a batch holds: a sampler's list is a function of (seed, epoch), whoever else draws."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DistributedSampler, RandomSampler, Sampler, WeightedRandomSampler

from labtrain.base.console import warn
from labtrain.base.errors import ConfigError
from labtrain.data.combined import Combined
from labtrain.data.from_torch import exact
from labtrain.data.loader import DataLoader
from labtrain.data.stream import Stream
from labtrain.exact import determinism
from labtrain.exact.collate import joined
from labtrain.record.digests import digest_tree
from tests.support.exact_worker import Images
from tests.support.loader_models import BATCH, LOADERS, OwnGenerator, Seeded


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    determinism.set_run(seed=7, mode="strict")
    yield
    determinism.set_run(seed=0, mode="off")
    determinism.set_say(warn)


def keys(loader: DataLoader, epoch: int, batches: int = 100) -> list[Any]:
    found = loader.source.epoch(epoch)
    return [found[number].keys.tolist() for number in range(min(batches, len(found)))]


MAP_STYLE = [name for name, make in LOADERS.items() if isinstance(exact(make(Images(37))), DataLoader)]
SIZED = [name for name in MAP_STYLE if name != "endless"]


def test_most_loaders_are_taken_by_index() -> None:
    assert len(MAP_STYLE) == 19


@pytest.mark.parametrize("name", SIZED)
def test_an_order_depends_on_seed_and_epoch_alone(name: str) -> None:
    """In a new process, after other draws, and asked for the fourth epoch at once."""
    loader = exact(LOADERS[name](Images(37)))
    assert isinstance(loader, DataLoader)
    epochs = [keys(loader, epoch) for epoch in range(4)]
    torch.rand(3), random.random(), np.random.rand()
    again = exact(LOADERS[name](Images(37)))
    assert isinstance(again, DataLoader)
    assert keys(again, 3) == epochs[3]
    assert (epochs[0] != epochs[1]) == (name not in ("sequential", "list of names"))


def test_a_sampler_leaves_the_global_generators_alone() -> None:
    loader = exact(LOADERS["weighted"](Images(37)))
    assert isinstance(loader, DataLoader)
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    keys(loader, 0)
    assert torch.rand(()) == expected


def test_torchs_shuffle_is_labtrains() -> None:
    """Whoever changes the class of the loader gets the same bits."""
    torchs = exact(torch.utils.data.DataLoader(Images(37), 8, shuffle=True))
    assert digest_tree(list(torchs)) == digest_tree(list(DataLoader(Images(37), 8, shuffle=True)))  # type: ignore[call-overload]


@pytest.mark.parametrize("sampler", [OwnGenerator(20), Seeded(20, counts=True)])
def test_a_sampler_that_remembers_cannot_go_back(sampler: Any) -> None:
    loader = DataLoader(Images(20), 4, sampler=sampler)
    second = keys(loader, 1)
    for epoch in range(2, 5):
        assert keys(loader, epoch) != second
    with pytest.raises(ConfigError, match=r"(?s)yields another order each time.*hint: give .* set_epoch"):
        keys(loader, 0)


def test_an_endless_sampler_is_asked_for_what_is_needed() -> None:
    loader = exact(LOADERS["endless"](Images(37)))
    assert isinstance(loader, DataLoader)
    batches = loader.source.epoch(2)
    later = batches[5].keys.tolist()
    again = exact(LOADERS["endless"](Images(37)))
    assert isinstance(again, DataLoader)
    torch.rand(9)
    assert again.source.epoch(2)[5].keys.tolist() == later
    with pytest.raises(TypeError):
        len(loader)


def test_a_sample_that_comes_twice_is_drawn_twice() -> None:
    """With replacement: the second time, its augmentation has other random numbers, as with plain torch."""
    loader = DataLoader(Images(5), 4, sampler=[2, 2, 3, 2])
    (images, _), *_ = loader
    assert len({image.numpy().tobytes() for image in images}) == 4
    once = DataLoader(Images(5), 4, sampler=[2])
    assert digest_tree(images[:1]) == digest_tree(next(iter(once))[0])


class Mining(Sampler[int]):
    """An order that the training's losses change."""

    def __init__(self) -> None:
        self.hard = list(range(10))

    def __iter__(self) -> Iterator[int]:
        return iter(self.hard)

    def __len__(self) -> int:
        return len(self.hard)


@pytest.mark.parametrize("mode", ["strict", "warn", "off"])
def test_a_sampler_that_code_changes_is_refused(mode: str) -> None:
    determinism.set_run(seed=7, mode=mode)
    said: list[str] = []
    determinism.set_say(said.append)
    sampler = Mining()
    loader = DataLoader(Images(10), 4, sampler=sampler)
    keys(loader, 0), keys(loader, 1)
    sampler.hard[0] = 9
    if mode == "strict":
        with pytest.raises(ConfigError, match="code has changed Mining since it was iterated"):
            keys(loader, 2)
    else:
        assert keys(loader, 2)[0][0] == 9
    assert len(said) == (mode == "warn")


class Halves(DistributedSampler[Any]):
    """One of one's own, whose order comes from DistributedSampler's fields."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [DistributedSampler, Halves])
@pytest.mark.parametrize("inside", [False, True])
def test_a_distributed_sampler_is_replaced(kind: Any, inside: bool) -> None:
    said: list[str] = []
    determinism.set_say(said.append)
    sampler = kind(Images(10), num_replicas=2, rank=1)
    if inside:
        batches = torch.utils.data.BatchSampler(sampler, 4, False)
        loader = DataLoader(Images(10), batch_sampler=batches)
    else:
        loader = DataLoader(Images(10), 4, sampler=sampler)
    assert sorted(sum(keys(loader, 0), [])) == list(range(10))
    assert len(said) == 1
    assert said[0].startswith(f"{kind.__name__} is not used: labtrain gives each device its part of each batch")


# ------------------------------------------------------------------------------------------------------------- several


def loaders(kind: Any) -> dict[str, Any]:
    return {"a": kind(torch.arange(7.0), 2), "b": [kind(torch.arange(100.0, 112), 3), kind(torch.arange(9.0), 9)]}


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
def test_several_loaders_are_combined_as_lightning_combines_them(mode: Any) -> None:
    lightnings = [batch for batch, *_ in CombinedLoader(loaders(torch.utils.data.DataLoader), mode)]
    combined = Combined(loaders(DataLoader), mode)
    assert digest_tree(list(combined)) == digest_tree(lightnings)
    assert len(combined) == len(lightnings)


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shards_of_several_loaders_are_those_of_one_device(mode: str, world: int) -> None:
    def parts(rank: int, world: int, start: int) -> list[dict[int, str]]:
        shuffled = {
            "a": DataLoader(Images(21), 8, shuffle=True),
            "b": DataLoader(Images(9), 5, sampler=WeightedRandomSampler(torch.ones(9), 9)),
        }
        made = Combined(shuffled, mode)
        made.shard(4, rank=rank, world=world)
        made.set_epoch(1)
        made.start_at(1, start)
        return [{shard: digest_tree(data) for shard, _, data in batch.parts} for batch in made]  # type: ignore[attr-defined]

    whole = parts(0, 1, 0)
    ranks = [parts(rank, world, 1) for rank in range(world)]
    assert [{k: v for rank in each for k, v in rank.items()} for each in zip(*ranks, strict=True)] == whole[1:]


def test_a_loader_that_begins_again_has_another_order() -> None:
    combined = Combined(
        [DataLoader(torch.arange(8), 8), DataLoader(torch.arange(4), 4, shuffle=True)], "max_size_cycle"
    )
    long = Combined([DataLoader(torch.arange(80), 8), combined.loaders[1]], "max_size_cycle")
    orders = [tuple(short.tolist()) for _, short in long]  # type: ignore[attr-defined,misc]
    assert len(orders) == 10
    assert len(set(orders)) > 4


# -------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("world", [1, 2])
def test_the_shards_of_a_stream_are_the_rows_of_its_batches(world: int) -> None:
    batches = [
        {"x": torch.rand(size, 2), "names": [f"{i}" for i in range(size)], "temperature": 0.5} for size in (8, 3)
    ]
    found: list[list[Any]] = [[] for _ in batches]
    for rank in range(world):
        stream = Stream(batches)
        stream.shard(4, rank=rank, world=1 if world == 1 else world)
        stream._compare = lambda batch: None  # type: ignore[method-assign]  # there is no second process
        for parts, batch in zip(found, stream, strict=True):
            parts += batch.parts  # type: ignore[attr-defined]
    for parts, batch in zip(found, batches, strict=True):
        assert [shard for shard, *_ in parts] == list(range(len(parts)))
        assert digest_tree(joined([data for *_, data in parts], [size for _, size, _ in parts])) == digest_tree(batch)
    assert [len(parts) for parts in found] == [4, 1]


def test_a_batch_without_rows_is_refused_with_more_than_one_shard() -> None:
    stream = Stream([object(), object()])
    stream.shard(4, rank=0, world=1)
    with pytest.raises(
        ConfigError, match=r"(?s)list gives batches without rows \(object\).*hint: determinism.shards=1"
    ):
        list(stream)
    stream.shard(1, rank=0, world=1)
    assert len(list(stream)) == 2


def test_an_epoch_of_a_stream_does_not_depend_on_other_draws() -> None:
    def epoch(number: int) -> str:
        stream = Stream(LOADERS["stream"](Images(37)))
        stream.set_epoch(number)
        batches = []
        for batch in stream:
            torch.rand(1), random.random()
            batches.append(batch)
        return digest_tree(batches)

    first = epoch(3)
    random.seed(5)
    assert epoch(3) == first != epoch(4)
    assert BATCH == 8
    assert isinstance(exact(torch.utils.data.DataLoader(Images(4), sampler=RandomSampler(Images(4)))), DataLoader)
