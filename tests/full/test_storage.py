"""More kills in saves than each change can wait for."""

from tests.support.exact import Runner, kill_in_saves


def test_a_hundred_kills_in_saves(runner: Runner, other: Runner) -> None:
    kill_in_saves(runner, other, 100)
