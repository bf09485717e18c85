"""What hooks get of a batch: this rank's part, as an ordinary batch and an ordinary output."""

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.trainer.states import RunningStage

from labtrain.training.callbacks.steps import BatchSizes, Progress, Seeding
from labtrain.training.sharded.hooks import Takers
from tests.support.exact import Runner, configure, outcome
from tests.support.hook_models import Changing, Idle, Numbered, Plain


def numbered(model: str, *callbacks: str, **more: Any) -> Any:
    """Return the configuration of a model of hook_models, one epoch."""
    config = configure("mlp", "even", trainer={"max_epochs": 1})
    config["model"] = {"_target_": f"tests.support.hook_models.{model}"}
    config["data"] = {"_target_": "tests.support.hook_models.Numbers", "batch_size": 8}
    config["callbacks"] = {name: {"_target_": f"tests.support.hook_models.{name}"} for name in callbacks}
    for group, values in more.items():
        config[group] |= values
    return config


def seen_by_hooks(runner: Runner, world: int, **data: Any) -> list[list[dict[str, Any]]]:
    """Train with `Seeing`, and return the lines of each rank."""
    folder = runner.folder / "seen"
    folder.mkdir()
    config = numbered("Returning", "Seeing", data={"named": True, **data})
    runner.run(config, world=world, environment={"SEEN": str(folder)})
    return [list(map(json.loads, (folder / f"{rank}.jsonl").read_text().splitlines())) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 3])
def test_hooks_get_the_part_of_this_rank(world: int, runner: Runner) -> None:
    """Each sample is seen once, rows and names in the order of the batch, outputs as the batch.

    The last batch of the test has 3 samples: one shard, so two of three ranks see a batch of no rows.
    """
    ranks = seen_by_hooks(runner, world)
    assert {len(rank) for rank in ranks} == {2 * (2 + 3 + 2 + 2)}  # start and end of each batch
    for lines in zip(*ranks, strict=True):
        first = lines[0]
        whole = [number for line in lines for number in line["number"]]
        if first["stage"] != "train":
            start = 8 * first["batch"]
            assert whole == list(range(start, min(start + 8, 11)))
        for line in lines:
            assert (line["stage"], line["hook"], line["batch"]) == (first["stage"], first["hook"], first["batch"])
            assert line["name"] == [f"sample {number}" for number in line["number"]]
            known = Numbered(22 if line["stage"] == "train" else 11).features
            assert line["sums"] == [known[number].sum().item() for number in line["number"]]
            if line["hook"] == "start":
                assert line["kind"] == "Part"
            else:
                numbers = line["number"]
                assert math.isnan(line["mean"]) if not numbers else line["mean"] == sum(numbers) / len(numbers)
                assert line["as_number"] == line["mean"] or not numbers
                assert line["loss"] == first["loss"]  # of the whole batch
    ends = [line for rank in ranks for line in rank if (line["stage"], line["hook"]) == ("train", "end")]
    train = [number for line in ends for number in line["number"]]
    assert sorted(train) == list(range(22))
    if world == 1:  # rows that are padded to other lengths cannot be joined: a list of the shards' parts
        assert {line["padded"] for line in ranks[0] if line["hook"] == "end"} == {3, 4, "tensor"}


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


def test_nothing_is_joined_where_no_hook_takes_a_batch() -> None:
    """labtrain's own callbacks take none."""
    ours = [BatchSizes(), Seeding(per_rank=False), Progress(batch_size=1)]
    for callbacks, expected in (
        (ours, (False, False)),
        ([*ours, Idle()], (True, True)),
        ([*ours, Changing()], (True, False)),
    ):
        options: Any = {"logger": False, "enable_checkpointing": False, "plugins": [LightningEnvironment()]}
        trainer = pl.Trainer(callbacks=callbacks, **options)
        trainer.strategy._lightning_module = Plain()
        trainer.state.stage = RunningStage.TRAINING
        takers = Takers(trainer)
        assert (takers.batch, takers.outputs) == expected


def test_a_hook_that_runs_once_a_shard_is_refused(runner: Runner) -> None:
    """A callback that counted in on_before_backward came to 4 or 2 a step, by devices."""
    config = configure("mlp", "even", callbacks={"count": {"_target_": "tests.support.hook_models.Backwards"}})
    runner.run(config, code=2)
    assert "error: Backwards.on_before_backward runs once a shard" in runner.said()
    assert "hint: use on_after_backward or on_before_optimizer_step" in runner.said()
