"""A stream in parts: each rank reads the parts of its own shards, each batch has rows of all parts."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from labtrain.base.errors import ConfigError
from labtrain.data.sharded import Sharded
from labtrain.data.stream import Stream
from labtrain.data.substreams import SubStreams
from labtrain.training.loaders import exact_or_stream


class Numbers(IterableDataset[Any]):
    """Counts; remembers which parts were read."""

    def __init__(self, numbers: list[int], read: list[int] | None = None) -> None:
        self.numbers, self.read, self.done = numbers, [] if read is None else read, 0

    def __iter__(self) -> Any:
        while self.done < len(self.numbers):
            self.done += 1
            self.read.append(self.numbers[self.done - 1])
            yield torch.tensor(self.numbers[self.done - 1])
        self.done = 0

    def shard(self, index: int, count: int) -> "Numbers":
        return Numbers(self.numbers[index::count], self.read)

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def of(dataset: Any, *, rank: int = 0, world: int = 1, batch_size: int = 8) -> SubStreams:
    made = exact_or_stream(DataLoader(dataset, batch_size))
    assert isinstance(made, SubStreams)
    made.shard(4, rank=rank, world=world)
    return made


def rows(batch: object) -> list[list[int]]:
    assert isinstance(batch, Sharded)
    return [data.tolist() for _, _, data in batch.parts]  # type: ignore[attr-defined]


def test_a_shard_has_the_rows_of_its_part() -> None:
    batches = list(map(rows, of(Numbers(list(range(24))))))
    assert batches[0] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert len(batches) == 3


def test_the_epoch_ends_with_the_first_part() -> None:
    """Of 21 numbers the first part has six, the others five: the third batch has one row of each of those."""
    sizes = [[len(part) for part in rows(batch)] for batch in of(Numbers(list(range(21))))]
    assert sizes == [[2, 2, 2, 2], [2, 2, 2, 2], [2, 1, 1, 1]]


def test_a_rank_makes_only_its_own_parts() -> None:
    assert [sorted(of(Numbers([]), rank=rank, world=2).parts) for rank in range(2)] == [[0, 1], [2, 3]]
    assert [sorted(of(Numbers([]), rank=rank, world=3).parts) for rank in range(3)] == [[0, 1], [2], [3]]


def test_a_resume_begins_after_the_batch() -> None:
    first = of(Numbers(list(range(40))))
    batches = []
    for number, batch in enumerate(first):
        batches.append(rows(batch))
        if number == 1:
            state = first.state_after(2)
    again = of(Numbers(list(range(40))))
    again.start_at(0, 2, state=state)
    assert list(map(rows, again)) == batches[2:]


def test_without_shards_it_is_one_stream() -> None:
    made = exact_or_stream(DataLoader(Numbers(list(range(16))), 8))
    assert [batch.tolist() for batch in made] == [list(range(8)), list(range(8, 16))]  # type: ignore[attr-defined]


class Itself(Numbers):
    def shard(self, index: int, count: int) -> "Numbers":
        return self


class Forgets(Numbers):
    def shard(self, index: int, count: int) -> Any:
        class Part(IterableDataset[Any]):
            def __iter__(self) -> Any:
                yield torch.tensor(index)

        return Part()


class OtherOrder(Numbers):
    """Hugging Face's order of arguments: another protocol, so it is one stream."""

    def shard(self, num_shards: int, index: int) -> "Numbers":  # type: ignore[override]
        raise AssertionError


def test_a_shard_method_that_is_wrong_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Itself\.shard\(index, count\) returned Itself"):
        of(Itself([1]))
    with pytest.raises(ConfigError, match="Part, which shard\\(index, count\\) returned, has no state_dict"):
        list(of(Forgets([1])))
    assert type(exact_or_stream(DataLoader(OtherOrder([1]), 2))) is Stream
