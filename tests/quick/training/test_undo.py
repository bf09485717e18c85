"""Undo puts back what the comparison before the first step has changed."""

from collections import Counter, OrderedDict, defaultdict
from typing import Any

import pytest

from labtrain.training.state.undo import Undo


@pytest.mark.parametrize(
    "mapping", [{"a": 2, "b": 1}, Counter(a=2, b=1), OrderedDict(a=2, b=1), defaultdict(int, a=2, b=1)]
)
def test_mappings_come_back_with_their_items_in_order(mapping: dict[str, Any]) -> None:
    """Of each kind: `Counter.update` would count the pairs that it is given."""
    kind, before = type(mapping), list(mapping.items())
    undo = Undo([mapping])
    mapping["a"] += 1
    mapping["c"] = mapping.pop("b")
    undo()
    assert type(mapping) is kind
    assert list(mapping.items()) == before
