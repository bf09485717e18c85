"""What predict_step returns for shards becomes one value for all samples."""

import itertools

import pytest
import torch

from labtrain.base.errors import ConfigError
from labtrain.exact.predictions import joined_rows


def test_tensors_lists_dicts_and_tuples_are_joined_in_order() -> None:
    """A list with an item a sample is joined by items, a list of tensors with a row a sample by its tensors."""
    scores = torch.arange(10.0).view(5, 2)
    whole = {"scores": scores, "names": list("abcde"), "pair": (scores[:, 0], [scores, scores + 1])}

    def shard(first: int, last: int) -> tuple[int, object]:
        part = scores[first:last]
        found = {"scores": part, "names": list("abcde")[first:last], "pair": (part[:, 0], [part, part + 1])}
        return last - first, found

    for cuts in ([0, 5], [0, 2, 5], [0, 1, 2, 4, 5]):
        found = joined_rows([shard(*pair) for pair in itertools.pairwise(cuts)])
        assert isinstance(found, dict)
        assert repr(found) == repr(whole)
    boxes = [torch.ones(3, 4), torch.ones(0, 4)]
    found = joined_rows([(2, boxes), (1, boxes[:1])])
    assert isinstance(found, list)
    assert [len(each) for each in found] == [3, 0, 3]


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ([(2, torch.ones(3))], r"a tensor of shape \(3,\) for 2 samples"),
        ([(2, torch.tensor(1.0))], r"a tensor of shape \(\) for 2 samples"),
        ([(2, None)], "returned a NoneType"),
        ([(1, {"a": torch.ones(1)}), (1, {})], "dicts with different keys"),
        ([(1, torch.ones(1)), (1, None)], "a NoneType or a Tensor, depending on the shard"),
        ([(1, 2.0)], "returned a float"),
    ],
)
def test_other_outputs_are_refused(outputs: list[tuple[int | None, object]], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        joined_rows(outputs)
