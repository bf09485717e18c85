import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labtrain import determinism
from labtrain.digests import digest_tree
from labtrain.errors import ConfigError
from labtrain.loader import DataLoader, Sharded
from labtrain.reduction import shard_range


class Drawing(torch.utils.data.Dataset):
    """A dataset that draws from all three generators, as transforms do."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    determinism.set_run(seed=7, mode="strict")
    yield
    determinism.set_run(seed=0, mode="off")


def epoch(loader: DataLoader, number: int) -> str:
    loader.set_epoch(number)
    return digest_tree(list(loader))


def test_samples_do_not_depend_on_workers_or_on_what_was_drawn_before() -> None:
    """The trap of torch's own loader: with augmentation, another number of workers gives other samples."""
    here, workers = DataLoader(Drawing(30), 8, shuffle=True), DataLoader(Drawing(30), 8, shuffle=True, num_workers=2)
    first = epoch(here, 3)
    torch.rand(5), random.random(), np.random.rand()
    assert epoch(here, 3) == epoch(workers, 3) == first
    assert epoch(here, 4) != first


def test_another_seed_gives_other_samples_and_another_order() -> None:
    loader = DataLoader(Drawing(30), 8, shuffle=True)
    first = epoch(loader, 0)
    determinism.set_run(seed=8, mode="strict")
    assert epoch(loader, 0) != first


def test_an_epoch_holds_each_sample_once_and_says_which() -> None:
    loader = DataLoader(Drawing(21), 8, shuffle=True)
    seen, told = [], []
    for batch in loader:
        seen += batch[:, 0].long().tolist()
        told += loader.indices.tolist()
    assert sorted(seen) == list(range(21))
    assert told == seen
    assert len(loader) == 3


@pytest.mark.parametrize(
    ("size", "drop_last", "sizes"),
    [(21, False, [8, 8, 5]), (21, True, [8, 8]), (16, False, [8, 8]), (16, True, [8, 8]), (3, True, [])],
)
def test_the_last_batch_is_partial_or_left_out(size: int, drop_last: bool, sizes: list[int]) -> None:
    loader = DataLoader(Drawing(size), 8, drop_last=drop_last)
    assert [len(batch) for batch in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [0, 1, 3, 7, 64])
def test_the_ranks_parts_cover_a_batch_without_overlap(size: int, world: int) -> None:
    parts = [list(shard_range(size, rank, world)) for rank in range(world)]
    assert sum(parts, []) == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_in_mode_off_no_global_generator_is_touched() -> None:
    determinism.set_run(seed=7, mode="off")
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = [(torch.rand(()).item(), random.random(), np.random.rand()) for _ in range(2)]

    class Quiet(Drawing):
        def __getitem__(self, index: int) -> int:
            return index

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    got = []
    for _ in range(2):
        list(DataLoader(Quiet(9), 4, shuffle=True))
        got.append((torch.rand(()).item(), random.random(), np.random.rand()))
    assert got == expected


def test_what_cannot_be_loaded_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=0"):
        DataLoader(Drawing(3), 0)
    with pytest.raises(ConfigError, match="no map-style dataset"):
        DataLoader(iter([1, 2]), 2)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- shards


def parts(loader: DataLoader) -> list[tuple[int, int, int, str]]:
    """(batch, shard, samples, digest of the data) of all that a loader yields."""
    return [
        (number, shard, samples, digest_tree(data))
        for number, batch in enumerate(loader)
        for shard, samples, data in batch.parts
    ]


def sharded(world: int, rank: int, *, size: int = 29, workers: int = 0, start: int = 0) -> DataLoader:
    loader = DataLoader(Drawing(size), 8, shuffle=True, num_workers=workers)
    loader.shard(4, rank=rank, world=world)
    loader.set_epoch(2)
    loader.start_at(2, start)
    return loader


@pytest.mark.parametrize("size", [8, 16, 24, 29, 33, 34])
def test_the_shards_of_all_ranks_are_those_of_one(size: int) -> None:
    """Whatever the number of ranks, with workers too; the last batch fills the first shards."""
    whole = parts(sharded(1, 0, size=size))
    for world in (2, 3, 4):
        found = [part for rank in range(world) for part in parts(sharded(world, rank, size=size, workers=rank % 2))]
        assert sorted(found) == whole
    assert sum(samples for _, _, samples, _ in whole) == size
    assert [batch.shards for batch in sharded(1, 0, size=size)][-1] == -(-(size % 8 or 8) // 2)
    assert {len(list(sharded(3, rank, size=size))) for rank in range(3)} == {-(-size // 8)}


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_resume_begins_at_its_batch(start: int) -> None:
    whole, rest = sharded(1, 0), sharded(1, 0, start=start)
    assert [part[1:] for part in parts(rest)] == [part[1:] for part in parts(whole) if part[0] >= start]
    assert len(rest) == len(whole)
    rest.set_epoch(3)
    whole.set_epoch(3)
    assert parts(rest) == parts(whole)


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=3 cannot be cut into determinism.shards=4"):
        DataLoader(Drawing(9), 3).shard(4, rank=0, world=1)


class Batched(Drawing):
    """Fetches a list of samples in one call."""

    def __getitem__(self, index: int) -> torch.Tensor:
        raise AssertionError("one at a time")

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [Drawing.__getitem__(self, index) for index in indices]


def test_samples_that_are_fetched_together() -> None:
    """`__getitems__` draws for a shard: the same on any number of workers and ranks, and after a resume."""

    def loader(world: int, rank: int, workers: int, start: int = 0) -> DataLoader:
        made = DataLoader(Batched(29), 8, shuffle=True, num_workers=workers)
        made.shard(4, rank=rank, world=world)
        made.start_at(0, start)
        return made

    whole = parts(loader(1, 0, 0))
    assert parts(loader(1, 0, 2)) == whole
    assert sorted(parts(loader(2, 0, 0)) + parts(loader(2, 1, 1))) == whole
    assert [part[1:] for part in parts(loader(1, 0, 0, 2))] == [part[1:] for part in whole if part[0] >= 2]


@pytest.mark.parametrize("kind", ["tensor", "array", "memory map", "tensor dataset"])
def test_rows_are_taken_a_batch_at_a_time(kind: str, tmp_path: Path) -> None:
    """The same batches as of single rows that torch collates."""
    rows = torch.arange(60, dtype=torch.float32).view(20, 3)
    labels = torch.arange(20)
    dataset: Any = {
        "tensor": rows,
        "array": rows.numpy(),
        "tensor dataset": torch.utils.data.TensorDataset(rows, labels),
    }.get(kind)
    if kind == "memory map":
        dataset = np.memmap(tmp_path / "rows", dtype=np.float32, mode="w+", shape=(20, 3))
        dataset[:] = rows.numpy()
    rows_at_once = list(DataLoader(dataset, 6, shuffle=True))
    one_by_one = list(DataLoader(dataset, 6, shuffle=True, collate_fn=torch.utils.data.default_collate))
    assert digest_tree(rows_at_once) == digest_tree(one_by_one)
    assert len(rows_at_once) == 4


def test_a_dataset_that_draws_nothing_by_declaration_is_held_to_it() -> None:
    class Quiet(Drawing):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor([index])

    torch.manual_seed(5)
    state = torch.get_rng_state()
    quiet = list(DataLoader(Quiet(9), 4, draws=False))
    assert digest_tree(quiet) == digest_tree(list(DataLoader(Quiet(9), 4)))
    with pytest.raises(ConfigError, match="draws=False, but Drawing drew random numbers for sample 0"):
        list(DataLoader(Drawing(9), 4, draws=False))
    assert state is not None


@pytest.mark.parametrize("name", ["sampler", "batch_sampler", "generator", "worker_init_fn"])
def test_an_order_of_ones_own_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"labtrain.DataLoader\({name}=...\): order, workers and seeds are made"):
        DataLoader(Drawing(9), 4, **{name: None})


class Endless(torch.utils.data.Dataset):
    """A million million samples, each made when it is asked for."""

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int) -> int:
        return index


def test_a_dataset_of_any_size_costs_no_memory() -> None:
    """The first batch of 10^12 samples, shuffled, and one in the middle: nothing as long as the dataset is made."""
    loader = DataLoader(Endless(), 1000, shuffle=True, draws=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = next(iter(loader))
    loader.start_at(0, 500_000_000)
    middle = next(iter(loader))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
    assert len(set(first.tolist()) | set(middle.tolist())) == 2000
    assert max(first.tolist()) > 10**11


def test_lightning_leaves_a_sharded_batch_as_it_is() -> None:
    from lightning.fabric.utilities.apply_func import move_data_to_device

    batch = Sharded([(0, 1, torch.ones(1))], samples=1, shards=1)
    assert move_data_to_device(batch, torch.device("meta")) is batch
