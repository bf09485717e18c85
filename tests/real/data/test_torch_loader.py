"""torch's DataLoader as it is: the same bits on 1, 2 and 4 devices, stopped and moved. All samplers: tests/full."""

import signal

import pytest

from labtrain.base.errors import EXIT_STOPPED
from tests.support.exact import Runner
from tests.support.own_code import LOADERS_IN_CI, is_exact_with_loader, with_loader


@pytest.mark.release
@pytest.mark.parametrize("loader", LOADERS_IN_CI)
def test_the_order_is_what_the_sampler_yields(loader: str, runner: Runner, other: Runner) -> None:
    is_exact_with_loader(loader, runner, other)


def test_a_stream_that_splits_itself_by_rank_is_refused(runner: Runner, other: Runner) -> None:
    """On one device it is trained; on two, each process would leave out samples."""
    config = with_loader("by rank", trainer={"max_steps": 2})
    runner.run(config)
    other.run(config, world=2, code=2)
    assert "DataLoader of ByRank gives each process other batches" in other.said()
    assert "hint: remove from the dataset what splits it by rank, or trainer.devices=1" in other.said()


def test_a_stream_that_is_another_after_a_resume_is_refused(runner: Runner) -> None:
    """Stopped in the second epoch: the process that resumes counts from the beginning."""
    config = with_loader("playing", checkpoint={"every_n_steps": 1})
    runner.run(config, code=EXIT_STOPPED, signal_at=f"8 {signal.SIGTERM} 0")
    runner.run(config, code=2)
    assert "DataLoader of Playing gives other batches than before the resume" in runner.said()
    assert "hint: give it state_dict and load_state_dict; or resume=never" in runner.said()
