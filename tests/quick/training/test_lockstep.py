"""Functions in lockstep: one runs at a time, and each waits at its meeting points."""

import threading
from functools import partial

import pytest
import torch

from labtrain.training.sharded.lockstep import END, Meeting, Runner, meet, runs_here


def body(name: str, said: list[str], meetings: int = 2) -> str:
    for number in range(meetings):
        said.append(f"{name}{number}")
        said.append(str(meet("kind", number, name)))
    return name * 2


def test_each_runs_to_its_next_meeting_in_the_order_of_its_resumes() -> None:
    said: list[str] = []
    runners = [Runner(partial(body, name, said)) for name in "ab"]
    assert said == []
    assert [runner.resume() for runner in runners] == [Meeting(kind="kind", payload=name) for name in "ab"]
    assert said == ["a0", "b0"]
    assert [runner.resume(1).key for runner in reversed(runners)] == [1, 1]
    assert [runner.resume(2).kind for runner in runners] == [END, END]
    assert said == ["a0", "b0", "1", "b1", "1", "a1", "2", "2"]
    assert [runner.result for runner in runners] == ["aa", "bb"]
    for runner in runners:
        runner.close()


def test_an_error_is_raised_where_it_is_resumed_and_the_others_can_be_ended() -> None:
    cleaned: list[str] = []

    def fails() -> None:
        meet("kind")
        raise ZeroDivisionError

    def waits() -> None:
        try:
            meet("kind")
        finally:
            cleaned.append("up")

    one, two = Runner(fails), Runner(waits)
    one.resume(), two.resume()
    with pytest.raises(ZeroDivisionError):
        one.resume()
    two.close(), one.close()
    assert cleaned == ["up"]
    assert not [each for each in threading.enumerate() if each.name == "labtrain-shard"]


def test_what_a_thread_computes_with_is_what_the_process_has() -> None:
    """Threads of torch have a number of threads of their own, and modes: the bits of a sum depend on the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runner = Runner(lambda: (torch.get_num_threads(), torch.is_grad_enabled(), runs_here()))
        runner.resume()
        assert runner.result == (1, True, True)
        assert not runs_here()
    finally:
        torch.set_num_threads(before)
