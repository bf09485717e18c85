"""Parts of a batch joined to one: what collate would have made of all their samples."""

import dataclasses
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, arange
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from labtrain.exact.collate import is_changed, joined, marks, to_send


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    rows: Any
    name: str


SIZES = [4, 5]


def parts(make: Any) -> list[Any]:
    """Return two parts: of samples 0..3 and 4..8."""
    return [make(range(4)), make(range(4, 9))]


def plain(value: Any) -> Any:
    """Return a value that can be compared."""
    if isinstance(value, Tensor):
        return ["tensor", value.tolist()]
    if isinstance(value, np.ndarray):
        return ["array", value.tolist()]
    if isinstance(value, PackedSequence):
        return ["packed", *(row.tolist() for row in unpack_sequence(value))]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return plain(vars(value))
    return [type(value).__name__, *map(plain, value)] if isinstance(value, list | tuple) else value


WHOLE: dict[str, Any] = {
    "rows": lambda n: arange(9.0).view(9, 1)[list(n)],
    "inputs and targets": lambda n: [arange(9.0)[list(n)], arange(9)[list(n)]],
    "arrays and names": lambda n: {"x": np.arange(9)[list(n)], "names": [f"{i}" for i in n], "none": None},
    "a named tuple": lambda n: Pair(arange(9)[list(n)], {"deep": (arange(9)[list(n)],)}),
    "a dataclass": lambda n: Frozen(arange(9)[list(n)], "all"),
    "images of any size": lambda n: (tuple(torch.ones(1, i + 1) for i in n), [{"boxes": torch.ones(i, 4)} for i in n]),
    "rows of no one length": lambda n: pack_sequence([arange(i + 1) for i in n], enforce_sorted=False),
    "weights of classes": lambda n: (arange(9)[list(n)], torch.ones(3), 0.5, "kind"),
    "a default dict": lambda n: defaultdict(list, {"x": arange(9)[list(n)]}),
}


def test_as_many_items_as_samples_are_told_from_inputs_and_targets() -> None:
    """In a shard of two or three samples."""
    together = joined([[torch.ones(2, 3), torch.tensor([0, 1])], [torch.zeros(2, 3), torch.tensor([2, 3])]], [2, 2])
    assert together[1].tolist() == [0, 1, 2, 3]
    boxes = [{"boxes": torch.ones(n, 4)} for n in (3, 1, 2)]
    assert joined([boxes, boxes], [3, 3]) == [*boxes, *boxes]
    pairs = [(torch.ones(1, 8, 8), 5), (torch.ones(1, 8, 8), 6)]
    assert joined([pairs, pairs], [2, 2]) == [*pairs, *pairs]
    ragged = [torch.ones(n, 4) for n in (2, 3)]
    assert joined([(ragged, [1, 2]), (ragged, [3, 4])], [2, 2]) == ([*ragged, *ragged], [1, 2, 3, 4])


@pytest.mark.parametrize("kind", WHOLE)
def test_parts_are_joined_to_what_collate_makes_of_all(kind: str) -> None:
    make = WHOLE[kind]
    together = joined(parts(make), SIZES)
    assert plain(together) == plain(make(range(9)))
    assert type(together) is type(make(range(9)))
    assert joined(parts(make)[:1], SIZES[:1]) is not None


def test_numbers_of_outputs_are_averaged_over_samples() -> None:
    """In double precision; equal ones stay what they are."""
    outputs = [
        {"acc": torch.tensor(0.5), "right": torch.tensor(2), "rate": 0.25, "n": 7, "flag": True, "none": None},
        {"acc": torch.tensor(1.0), "right": torch.tensor(5), "rate": 1.0, "n": 7, "flag": True, "none": None},
    ]
    found = joined(outputs, SIZES, average=True)
    mean = (torch.tensor(0.5 * 4 + 1.0 * 5, dtype=torch.float64) / 9).float()
    assert torch.equal(found["acc"], mean)
    assert torch.equal(found["right"], torch.tensor(33 / 9))
    assert found["rate"] == (0.25 * 4 + 1.0 * 5) / 9
    assert (found["n"], found["flag"], found["none"]) == (7, True, None)


def test_what_cannot_be_joined_is_a_list_of_its_parts() -> None:
    """Only that: what stands beside it is joined."""
    padded = [torch.ones(4, 3), torch.ones(5, 7)]
    time_first = [torch.ones(6, 4), torch.zeros(6, 5)]
    first, second, third = joined([(padded[0], time_first[0], arange(4)), (padded[1], time_first[1], arange(5))], SIZES)
    assert first == padded
    assert second == time_first
    assert third.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    views = [[torch.ones(2, 3), torch.zeros(2, 3)]] * 2  # two views of two samples, or two samples of two rows?
    assert joined([{"views": part} for part in views], [2, 2]) == {"views": views}
    assert joined([{"a": 1}, {"b": 1}], SIZES) == [{"a": 1}, {"b": 1}]
    assert joined([None, 3], SIZES, average=True) == [None, 3]


def test_what_is_sent_takes_no_more_memory_than_it_has() -> None:
    """A row of a large tensor goes alone, without its graph."""
    row = torch.ones(1000, 10, requires_grad=True)[3:4] * 2
    sent = to_send([row[:, 1:3]])[0].tensor
    assert (sent.untyped_storage().nbytes(), sent.requires_grad) == (8, False)


def test_a_change_is_seen() -> None:
    """In place, or by another object at any depth."""
    for change in (
        lambda batch: batch[0].mul_(2),
        lambda batch: batch.__setitem__(0, batch[0] * 1),
        lambda batch: batch[1].update(more=1),
        lambda batch: batch[1]["y"].rows.zero_(),
        lambda batch: batch.append(3),
    ):
        batch = [torch.ones(2), {"y": Frozen(torch.ones(2), "a")}]
        before = marks(batch)
        assert not is_changed(batch, before)
        change(batch)
        assert is_changed(batch, before)
