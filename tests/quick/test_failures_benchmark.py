"""The arithmetic of benchmarks/failures.py, from steps as it logs them."""

import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import itertools

import failures

KILLED = failures.Failure(3, "rank", 0.0)
FULL = failures.Failure(6, "disk", 0.0)


def test_a_failure_costs_the_steps_that_are_done_again_and_the_time_without_a_new_one() -> None:
    """A kill after step 3 goes on from step 1; a full disk after step 6 stops nothing."""
    times = [(0, 1), (1, 2), (2, 3), (10, 2), (11, 3), (12, 4), (13, 5), (14, 6), (15, 7)]
    lines = [(float(moment), step, 1) for moment, step in times]
    found = failures.costs(lines, [(2.5, KILLED, True), (14.5, FULL, True)])
    assert [(cost["steps_lost"], cost["stalled_s"]) for cost in found] == [(2, 10.0), (0, 1.0)]
    assert failures.span(lines, 7) == 15


def test_a_seed_has_each_kind_of_failure_at_the_same_steps() -> None:
    found = failures.schedule(0, 10_000)
    assert found == failures.schedule(0, 10_000) != failures.schedule(2, 10_000)
    assert {each.kind for each in found[:4]} == {"rank", "all", "writer", "disk"}
    gaps = [after.step - before.step for before, after in itertools.pairwise(found)]
    assert min(gaps) >= 100
    assert max(gaps) <= 200


def test_the_best_interval_between_saves_is_the_best() -> None:
    assert failures.extrapolated(27, 1, 0, 54) == pytest.approx(1 - 54 / 2700)
    best = failures.extrapolated(30, 0.5, 2)
    assert all(failures.extrapolated(30, 0.5, 2, interval) < best for interval in (50, 100, 140, 155, 300, 1000))
