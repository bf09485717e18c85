"""The keyed permutation. What a loader makes of it is in test_loader.py."""

from collections import Counter

import numpy as np
import pytest

from labtrain.exact import permutation as order
from labtrain.exact.permutation import LARGEST, SORTED, Order


@pytest.fixture
def by_feistel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network for small numbers too, where every order can be looked at."""
    monkeypatch.setattr(order, "SORTED", 1)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 1000, SORTED, SORTED + 1, 99_991, 1 << 17, (1 << 17) + 1])
def test_an_order_names_each_sample_once(size: int) -> None:
    assert np.array_equal(np.sort(Order(size, seed=1, epoch=0)(0, size)), np.arange(size))


@pytest.mark.parametrize("size", [*range(2, 70), 127, 128, 129, 1000, 1023, 1024, 1025])
def test_the_network_is_a_permutation_of_any_size(size: int, by_feistel: None) -> None:
    assert np.array_equal(np.sort(Order(size, seed=3, epoch=1)(0, size)), np.arange(size))


def test_an_order_is_this_one_on_every_platform() -> None:
    """Integer arithmetic alone: these are the numbers, whatever the processor and the releases of torch and numpy."""
    assert Order(10, seed=42, epoch=0)(0, 10).tolist() == [1, 9, 8, 2, 6, 7, 4, 0, 3, 5]
    found = Order(10**12, seed=42, epoch=3)(0, 4).tolist()
    assert found == [171911760096, 218004427334, 468060145269, 511488957110]
    found = Order(LARGEST, seed=42, epoch=0)(LARGEST - 2, LARGEST).tolist()
    assert found == [185200229667592128, 793244679919623352]


@pytest.mark.parametrize("size", [100, 100_000])
def test_an_order_is_a_function_of_seed_and_epoch_alone(size: int) -> None:
    orders = [Order(size, seed=seed, epoch=epoch)(0, 100).tolist() for seed in (1, 2) for epoch in (0, 1, 2)]
    assert orders == [Order(size, seed=seed, epoch=epoch)(0, 100).tolist() for seed in (1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(found) for found in orders}) == 6


def test_any_position_at_once() -> None:
    """A resume asks for positions in the middle: they are what the whole would have there."""
    whole = Order(200_000, seed=1, epoch=1)(0, 200_000)
    assert np.array_equal(Order(200_000, seed=1, epoch=1)(123_456, 123_500), whole[123_456:123_500])
    assert len(Order(200_000, seed=1, epoch=1)(199_990, 200_100)) == 10
    assert len(Order(200_000, seed=1, epoch=1)(200_100, 200_200)) == 0


def test_without_shuffling_position_and_index_are_the_same() -> None:
    assert Order(10**12, seed=1, epoch=0, shuffle=False)(10**12 - 2, 10**12 + 5).tolist() == [10**12 - 2, 10**12 - 1]


def test_a_small_order_is_uniform() -> None:
    """All 120 orders of five samples; chi squared with 119 degrees of freedom exceeds 175 by chance once in 1,500."""
    found = Counter(tuple(Order(5, seed=seed, epoch=0)(0, 5).tolist()) for seed in range(12_000))
    assert len(found) == 120
    assert sum((count - 100) ** 2 / 100 for count in found.values()) < 175


def test_a_large_order_is_uniform_at_each_position_and_between_neighbours() -> None:
    """1,000 orders of 70,000 samples in 20 classes, at 4 positions and for a difference; 19 degrees of freedom each."""
    size, seeds = 70_000, 1000
    rows = [Order(size, seed=seed, epoch=0) for seed in range(seeds)]
    found = np.array([np.concatenate([row(at, at + 1) for at in (0, 1, 35_000, size - 1)]) for row in rows])
    columns = [*found.T, (found[:, 1] - found[:, 0]) % size]
    for column in columns:
        counts = np.histogram(column, bins=20, range=(0, size))[0]
        assert ((counts - seeds / 20) ** 2 / (seeds / 20)).sum() < 45


def test_walking_costs_at_most_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's domain is less than twice the number of samples, whatever that is: here just over a power of two."""
    evaluated = []
    encrypt = Order._encrypt
    monkeypatch.setattr(Order, "_encrypt", lambda self, values: evaluated.append(len(values)) or encrypt(self, values))
    Order((1 << 20) + 1, seed=1, epoch=0)(0, 10_000)
    assert 18_000 < sum(evaluated) < 22_000


def test_more_than_two_to_the_sixty_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 2"):
        Order(LARGEST + 1, seed=0, epoch=0)
