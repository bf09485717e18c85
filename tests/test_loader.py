import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from labtrain import determinism
from labtrain.digests import digest_tree
from labtrain.errors import ConfigError
from labtrain.loader import DataLoader
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
