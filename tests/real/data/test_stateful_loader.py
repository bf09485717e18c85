"""A training loader with a state of its own: a resume finds its place, at an epoch's end too; one process alone."""

import signal
from typing import Any

import pytest

from labtrain.base.errors import EXIT_STOPPED
from tests.support.exact import Runner, configure, outcome


def stream(loader: str, **more: Any) -> Any:
    config = configure("mlp", "even", data={"loader": loader}, determinism={"shards": None}, **more)
    config["data"]["_target_"] = "tests.support.resume_models.StreamData"
    config["model"]["_target_"] = "tests.support.resume_models.Small"
    return config


@pytest.mark.release
@pytest.mark.parametrize(
    ("loader", "limit"),
    [("torchdata", None), ("torchdata stream", None), ("torchdata", 3)],
)
def test_an_epoch_that_has_ended_is_not_skipped(runner: Runner, loader: str, limit: int | None) -> None:
    """Saved after the last batch of an epoch, in its middle, and twice: the steps and bits of a run that was not."""
    batches = limit or 5
    config = stream(loader, trainer={"limit_train_batches": limit})
    folder = runner.folder / "whole"
    folder.mkdir()
    whole = outcome(Runner(folder).run(config))
    for step in (batches, batches + 2, 2 * batches):
        runner.run(config, code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0")
    assert outcome(runner.run(config)) == whole
    assert whole["steps"] == 3 * batches


@pytest.mark.parametrize("loader", ["torchdata stream", "counted"])
@pytest.mark.parametrize("limit", [3, 5])
def test_a_stream_goes_on_behind_a_limit(runner: Runner, loader: str, limit: int) -> None:
    """`limit_train_batches` ends an epoch before the stream does, or with it: the next epoch begins where it stood."""
    config = stream(loader, trainer={"limit_train_batches": limit})
    folder = runner.folder / "whole"
    folder.mkdir()
    whole = outcome(Runner(folder).run(config))
    for step in (limit, limit + 1):
        runner.run(config, code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0")
    assert outcome(runner.run(config)) == whole


def test_on_two_devices_it_is_refused(runner: Runner) -> None:
    """Both would train on the same samples."""
    runner.run(stream("torchdata"), world=2, code=2)
    assert "in 2 processes: unless it splits its samples by rank" in runner.said()
    assert "hint: trainer.devices=1" in runner.said()
    assert list(runner.folder.glob("runs/exact/*")) == []
