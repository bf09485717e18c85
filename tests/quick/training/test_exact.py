"""Promise 3, by digest: weights, optimizer and all other state, metrics and trail, however a training ran."""

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from labtrain.base.errors import EXIT_STOPPED
from tests.support.exact import Runner, configure, newest_manifest, outcome
from tests.support.exactness import Case, cover, each

pytest_plugins = ["tests.support.exactness"]


@each(cover(1))
def test_however_it_ran(case: Case, is_exact: Callable[[Case], None]) -> None:
    """Each number of processes, precision, shape and story occurs; tests/real has most pairs of them."""
    is_exact(case)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_stops_all_ranks_whichever_gets_it(number: int, runner: Runner) -> None:
    config = configure("mlp", "even")
    runner.run(config, world=2, code=EXIT_STOPPED, signal_at=f"3 {number} 1")
    assert newest_manifest(runner)["step"] == 4  # the others learn of it with the next step
    (path,) = runner.folder.glob("runs/*/*/receipt.json")
    assert json.loads(path.read_text())["status"] == "interrupted"


def test_a_thread_trains_the_same_weights_without_handlers(runner: Runner, genuine: dict[str, Any]) -> None:
    """Python sets signal handlers in the main thread only; an error of the training is still explained."""
    config = configure("mlp", "even", model={"wide": True})
    environment = {"IN_A_THREAD": "1"}
    assert outcome(runner.run(config, environment=environment)) == genuine
    assert runner.said().count("warning: training in a thread: Ctrl-C, SIGTERM and SIGUSR1 do not save and stop") == 1
    config["callbacks"]["broken"] = {"_target_": "tests.support.exact_worker.Broken"}
    runner.run(config, code=1, environment=environment | {"BREAK_AT": "3"})
    assert "ZeroDivisionError" in runner.said()
    assert "signal only works in main thread" not in runner.said()


def test_a_rank_without_a_sample_is_heard_too(runner: Runner) -> None:
    """In the last batch of an epoch, of three samples, the third rank has none: its signal stops all with the next step."""
    runner.run(configure("mlp", "batch of 11"), world=3, code=EXIT_STOPPED, signal_at=f"3 {signal.SIGTERM} 2")
    assert newest_manifest(runner)["step"] == 4


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = configure("mlp", "even", model={"wide": True})
    return outcome(Runner(tmp_path_factory.mktemp("genuine")).run(config))


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("one sample", {"data": {"flip": 7}}),
        ("the seed", {"seed": 43}),
        ("the shards", {"determinism": {"shards": 8}}),
        ("the threads", {"determinism": {"threads": 2}}),
        ("one bit of one weight", {"model": {"wide": True, "break_at": 6}}),
    ],
)
def test_a_digest_differs_where_it_must(
    what: str, more: dict[str, Any], runner: Runner, genuine: dict[str, Any]
) -> None:
    found = outcome(runner.run(configure("mlp", "even", **{"model": {"wide": True}, **more})))
    assert found["weights_digest"] != genuine["weights_digest"], what
    assert found["state_digest"] != genuine["state_digest"]
    assert found["trail"] != genuine["trail"]
    if what == "one bit of one weight":
        pairs = zip(found["trail"], genuine["trail"], strict=True)
        first = next(mine for mine, theirs in pairs if mine != theirs)
        assert first["step"] == 7  # the trail's line of step 6 was written before the bit was turned
