"""What hooks get of a batch: the whole of it on every rank, as an ordinary batch and an ordinary output."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    ThroughputMonitor,
)
from lightning.pytorch.trainer.states import RunningStage

from labtrain.training.callbacks.steps import BatchSizes, Progress, Seeding
from labtrain.training.sharded.hooks import Readers
from tests.support.exact import Runner, configure, outcome
from tests.support.hook_models import Changing, Idle, Numbered, Plain, Reading


def numbered(model: str, *callbacks: str, **more: Any) -> Any:
    """Return the configuration of a model of hook_models, one epoch."""
    config = configure("mlp", "even", trainer={"max_epochs": 1})
    config["model"] = {"_target_": f"tests.support.hook_models.{model}"}
    config["data"] = {"_target_": "tests.support.hook_models.Numbers", "batch_size": 8}
    config["callbacks"] = {name: {"_target_": f"tests.support.hook_models.{name}"} for name in callbacks}
    for group, values in more.items():
        config[group] |= values
    return config


def seen_by_hooks(folder: Path, world: int, **model: Any) -> list[list[dict[str, Any]]]:
    """Train with `Seeing`, and return the lines of each rank."""
    (folder / "seen").mkdir(parents=True)
    config = numbered("Returning", "Seeing", data={"named": True})
    config["model"] |= model
    Runner(folder).run(config, world=world, environment={"SEEN": str(folder / "seen")})
    return [list(map(json.loads, (folder / f"seen/{rank}.jsonl").read_text().splitlines())) for rank in range(world)]


def test_hooks_get_the_whole_batch_on_every_rank(tmp_path: Path) -> None:
    """To the bit and the stride of values of all kinds, on 1, 2 and 4 devices, and in the order of the batch.

    The last batch of the test has 3 samples: one shard, so three of four ranks have none. The step changes its batch,
    which no hook sees.
    """
    (lines,) = seen_by_hooks(tmp_path / "1", 1)
    for world in (2, 4):
        for rank in seen_by_hooks(tmp_path / str(world), world):
            assert rank == lines
    assert len(lines) == 2 * (2 + 3 + 2 + 2)  # start and end of each batch
    for line in lines:
        numbers = line["number"]
        if line["stage"] != "train":
            start = 8 * line["batch"]
            assert numbers == list(range(start, min(start + 8, 11)))
        assert line["name"] == [f"sample {number}" for number in numbers]
        known = Numbered(22 if line["stage"] == "train" else 11).features
        assert line["sums"] == [known[number].sum().item() for number in numbers]
        if line["hook"] == "start":
            assert line["kind"] == "Part"
        else:
            assert line["mean"] == line["as_number"] == sum(numbers) / len(numbers)
    ends = [line for line in lines if (line["stage"], line["hook"]) == ("train", "end")]
    assert sorted(number for line in ends for number in line["number"]) == list(range(22))
    # Rows that are padded to other lengths cannot be joined: a list of the shards' parts.
    assert {line["padded"] for line in lines if line["hook"] == "end"} == {3, 4, "tensor"}


def test_what_cannot_be_sent_is_refused_on_several_devices(runner: Runner) -> None:
    """By name and cause, on every rank; one device trains it."""
    config = numbered("Returning", "Seeing", data={"named": True})
    config["model"]["unsendable"] = True
    (runner.folder / "seen").mkdir()
    runner.run(config, world=2, code=None, environment={"SEEN": str(runner.folder / "seen")})
    assert "error: what validation_step or test_step returns cannot be sent to the other devices (" in runner.said()
    assert "hint: use tensors, numbers, strings" in runner.said()


def test_lists_and_metrics_of_hooks_cover_each_sample_once(tmp_path: Path) -> None:
    """On four devices a hook appends as many items as there are calls of the step: such a list is not gathered again."""
    config, found = numbered("Collecting", "Summing", data={"val": 16}), []
    for world in (1, 4):
        folder = tmp_path / str(world)
        folder.mkdir()
        found.append(outcome(Runner(folder).run(config, world=world)))
    assert found[0] == found[1]
    assert (found[0]["metrics"]["val/seen"], found[0]["metrics"]["val/steps"]) == (16, 16)
    assert found[0]["metrics"]["val/total"] == 2 * sum(range(16))


@pytest.mark.parametrize("world", [1, 4])
def test_a_hook_that_changes_the_batch_is_refused(world: int, runner: Runner) -> None:
    """The step gets the shards, which would not have the change: also where this rank has one shard alone."""
    runner.run(numbered("Plain", "Changing"), world=world, code=None)
    assert "a hook changed its batch (on_train_batch_start): the step gets the batch's shards" in runner.said()


def test_with_one_shard_a_hook_may_change_the_batch(runner: Runner) -> None:
    """The batch that hooks get is then the one that the step gets, as in Lightning."""
    digests = {
        outcome(runner.run(numbered("Plain", *callbacks, determinism={"shards": 1})))["weights_digest"]
        for callbacks in ((), ("Changing",))
    }
    assert len(digests) == 2


def test_looking_at_a_batch_changes_no_bit(tmp_path: Path) -> None:
    """Nor does the number of devices, where on_after_batch_transfer draws."""
    digests = set()
    for world, callbacks in ((1, ()), (2, ()), (3, ("Idle",))):
        folder = tmp_path / str(world)
        folder.mkdir()
        digests.add(outcome(Runner(folder).run(numbered("Noisy", *callbacks), world=world))["weights_digest"])
    assert len(digests) == 1


def test_nothing_is_sent_where_no_hook_reads_it() -> None:
    """labtrain's own callbacks read neither the batch nor the outputs; nor do most of Lightning's."""
    ours = [BatchSizes(), Seeding(per_rank=False), Progress(batch_size=1)]
    theirs = [DeviceStatsMonitor(), ModelCheckpoint(), RichProgressBar(), LearningRateMonitor()]
    for callbacks, expected in (
        ([*ours, *theirs, Idle()], (False, False)),
        ([*ours, Reading()], (False, True)),
        ([*ours, Changing()], (True, False)),
        ([*ours, ThroughputMonitor(len)], (True, True)),
    ):
        options: Any = {"logger": False, "enable_checkpointing": False, "plugins": [LightningEnvironment()]}
        trainer = pl.Trainer(**options)
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        trainer.strategy._lightning_module = Plain()
        trainer.state.stage = RunningStage.TRAINING
        readers = Readers(trainer)
        assert (readers.batch, readers.outputs) == expected, callbacks


def test_a_hook_that_runs_once_a_shard_is_refused(runner: Runner) -> None:
    """A callback that counted in on_before_backward came to 4 or 2 a step, by devices."""
    config = configure("mlp", "even", callbacks={"count": {"_target_": "tests.support.hook_models.Backwards"}})
    runner.run(config, code=2)
    assert "error: Backwards.on_before_backward runs once a shard" in runner.said()
    assert "hint: use on_after_backward or on_before_optimizer_step" in runner.said()
