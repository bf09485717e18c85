"""Promise 3, by digest: every case of the matrix that tests/real leaves out, and other ways to train one step."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.exact import Runner, configure, outcome, tell
from tests.support.exactness import EVERY, Case, cover, each, most_pairs

pytest_plugins = ["tests.support.exactness"]


@each([case for case in EVERY if case not in most_pairs()])
def test_however_it_ran(case: Case, is_exact: Callable[[Case], None]) -> None:
    is_exact(case)


@each(cover(2, own=True)[4:])
def test_what_people_bring(case: Case, is_exact_own: Callable[[Case], None]) -> None:
    """Any two of program, devices, story and precision meet; the first cases: tests/real."""
    is_exact_own(case)


@pytest.mark.parametrize("step", sorted({*range(1, 15)} - {1, 4, 5, 6, 10}))
def test_stopped_after_a_step(step: int, goes_on_after: Callable[[int], None]) -> None:
    """Those that tests/real leaves out."""
    goes_on_after(step)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"trainer": {"accumulate_grad_batches": 2, "max_epochs": 5}}, id="accumulated"),
        pytest.param({"model": {"channels_last": True}, "trainer": {"gradient_clip_val": 0.1}}, id="channels last"),
        pytest.param(
            {"determinism": {"shards": 6}, "data": {"batch_size": 13}, "trainer": {"max_epochs": 5}},
            id="six shards of thirteen",
        ),
        pytest.param(
            {"determinism": {"shards": 8}, "data": {"batch_size": 17}, "trainer": {"max_epochs": 5}},
            id="eight shards of seventeen",
        ),
        pytest.param({"trainer": {"limit_train_batches": 3, "limit_val_batches": 1, "max_epochs": 5}}, id="limited"),
        pytest.param({"trainer": {"check_val_every_n_epoch": 2}}, id="validated every second epoch"),
    ],
)
def test_trained_otherwise(more: dict[str, Any], runner: Runner, other: Runner) -> None:
    config = configure("cnn", **more)
    reference = outcome(runner.run(config))
    for world, story in ((3, "whole"), (2, "moved"), (4, "killed")):
        folder = other.folder / f"{world}"
        folder.mkdir()
        assert tell(Runner(folder), configure("cnn", **more), world=world, story=story, seed=world) == reference
