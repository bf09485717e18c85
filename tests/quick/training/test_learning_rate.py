"""`labtrain lr-find` suggests the rate at which the loss falls fastest."""

import math

from labtrain.training.search.learning_rate import steepest


def test_the_steepest_fall_counts_and_the_first_steps_do_not() -> None:
    losses = [9.0, 1.0, *[1.0] * 12, 0.9, 0.5, 0.4, 0.4, 5.0, 9.0]
    assert steepest(losses) == 14
    assert steepest([1.0 + step for step in range(40)]) is None
    assert steepest([1.0] * 5) is None
    assert steepest([*losses[:-1], math.nan]) == 14
