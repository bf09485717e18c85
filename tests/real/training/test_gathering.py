"""Outputs that are gathered in lists: in one order on every rank, and refused where a value is of a part of them."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from labtrain.base.errors import EXIT_STOPPED
from tests.quick.training.test_hooks import numbered, seen_by_hooks
from tests.support.exact import Runner, outcome


def gathered(folder: Path, world: int, config: Any) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """Train, and return the lines of each rank and the outcome."""
    seen = folder / "seen"
    seen.mkdir(parents=True)
    found = outcome(Runner(folder).run(config, world=world, environment={"SEEN": str(seen)}))
    return [list(map(json.loads, (seen / f"{rank}.jsonl").read_text().splitlines())) for rank in range(world)], found


def test_the_items_of_all_ranks_come_in_the_order_of_batches_and_shards(tmp_path: Path) -> None:
    """The same on 1 and 3 devices, on each rank: several loaders, validations in mid-epoch, a last batch of one shard."""
    outcomes = []
    for world in (1, 3):
        config = numbered("Gathering", data={"two": True}, trainer={"max_epochs": 2, "val_check_interval": 2})
        ranks, found = gathered(tmp_path / str(world), world, config)
        assert all(rank == ranks[0] for rank in ranks)
        outcomes.append((ranks[0], found["weights_digest"], found["state_digest"], found["metrics"]))
    lines = outcomes[0][0]
    first = [line["numbers"] for line in lines if line.get("loader") == 0]
    assert first == [[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9, 10]]] * 3
    assert [line["numbers"] for line in lines if line.get("loader") == 1] == [[[0], [1], [2], [3], [4]]] * 3
    assert [line["all"] for line in lines if "all" in line] == [[0] * 5 + [1] * 5] * 3
    trained = [line["numbers"] for line in lines if "more" in line]
    assert [len(numbers) for numbers in trained] == [4 + 4 + 3] * 2
    assert sorted(number for shard in trained[0] for number in shard) == list(range(22))
    assert trained[0] != trained[1]
    assert outcomes[0] == outcomes[1]


def test_hooks_get_all_outputs_of_manual_optimization(tmp_path: Path) -> None:
    """On two and three devices those of one, where no step returns a loss."""
    (lines,) = seen_by_hooks(tmp_path / "1", 1, manual=True)
    for world in (2, 3):
        assert seen_by_hooks(tmp_path / str(world), world, manual=True) == [lines] * world


def test_lists_that_steps_append_to_are_whole_in_the_hooks_at_the_end(tmp_path: Path) -> None:
    """Without a call of labtrain: on 1, 2 and 3 devices, stopped in mid-epoch."""
    outcomes = []
    for world in (1, 2, 3):
        config = numbered("Appending", data={"two": True}, trainer={"max_epochs": 3, "val_check_interval": 2})
        folder = tmp_path / str(world)
        if world == 2:
            config["checkpoint"]["every_n_steps"] = 1
            config["callbacks"] |= AT
            (folder / "seen").mkdir(parents=True)
            seen = {"SEEN": str(folder / "seen")}
            Runner(folder).run(config, world=3, code=EXIT_STOPPED, signal_at=f"5 {signal.SIGTERM} 0", environment=seen)
            (folder / "seen").rename(folder / "before")
        ranks, found = gathered(folder, world, config)
        assert all(rank == ranks[0] for rank in ranks)
        outcomes.append((ranks[0][-1], found["weights_digest"], found["state_digest"], found["metrics"]))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert sorted(number for shard in outcomes[0][0]["numbers"] for number in shard) == list(range(22))


def test_part_of_a_validation_and_without_shards(tmp_path: Path) -> None:
    """limit_val_batches counts; without shards an item is a rank's part of a batch."""
    config = numbered("Gathering", determinism={"shards": None}, trainer={"limit_val_batches": 1})
    (one,), _ = gathered(tmp_path / "1", 1, config)
    ranks, _ = gathered(tmp_path / "2", 2, config)
    assert ranks[0] == ranks[1]
    for alone, together in zip(one, ranks[0], strict=True):
        if "numbers" in alone:
            assert sum(alone["numbers"], []) == sum(together["numbers"], [])
    assert [line["numbers"] for line in ranks[0] if line.get("loader") == 0] == [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2


@pytest.mark.parametrize(
    ("world", "says"),
    [
        (1, "the list has 22 items, but training_step was called 11 times"),
        (2, "the list has 12 (rank 0), 10 (rank 1) items, but training_step was called 6 (rank 0), 5 (rank 1) times"),
    ],
)
def test_a_list_of_another_length_is_refused(world: int, says: str, runner: Runner) -> None:
    config = numbered("Gathering")
    config["model"]["twice"] = True
    (runner.folder / "seen").mkdir()
    runner.run(config, world=world, code=None, environment={"SEEN": str(runner.folder / "seen")})
    assert says in runner.said()
    assert "hint: append exactly one item in each call of the step" in runner.said()


AT = {"at": {"_target_": "tests.support.exact_worker.At"}}
KINDS = {
    "plain": "plain, logged in on_validation_epoch_end, differs between the ranks (4.71429 on rank 0, 5.5 on rank 1)",
    "synced": "synced, logged in on_validation_epoch_end, differs between the ranks (4.71429 on rank 0, 5.5 on rank 1)",
    "summed": "summed, logged in on_validation_epoch_end, is summed over the ranks (sync_dist, reduce_fx=sum)",
    "train": "train, logged in on_train_epoch_end, differs between the ranks (0 on rank 0, 1 on rank 1)",
    "step": "step, logged with sync_dist, differs between the ranks",
}


@pytest.mark.parametrize("kind", ["synced", "step"])
def test_a_value_of_a_part_of_the_outputs_is_refused(kind: str, runner: Runner) -> None:
    """By name: at an epoch's end, before the first step where it is a validation's; with sync_dist also in a step."""
    config = numbered("Partial")
    config["model"]["kinds"] = kind
    runner.run(config, world=2, code=None)
    assert f"error: {KINDS[kind]}" in runner.said(), runner.said()
    assert "hint: compute it with a torchmetrics metric, or from a list" in runner.said()
    assert "Traceback" not in runner.said()


def test_in_warn_each_is_said_once(runner: Runner) -> None:
    config = numbered("Partial", determinism={"mode": "warn"}, trainer={"max_epochs": 3})
    config["model"]["kinds"] = " ".join(KINDS)
    run_dir = runner.run(config, world=2)
    assert run_dir is not None
    notes = json.loads((run_dir / "receipt.json").read_text())["determinism"]["notes"]
    for says in KINDS.values():
        assert runner.said().count(says) == 1
        assert len([note for note in notes if says in note]) == 1


def test_values_of_all_outputs_and_of_a_rank_are_not_refused(runner: Runner) -> None:
    """torchmetrics, rank_zero_only, and what goes to the logger: time, memory, learning rates."""
    config = numbered("Partial", "Timing")
    for name in ("LearningRateMonitor", "DeviceStatsMonitor"):
        config["callbacks"][name] = {"_target_": f"lightning.pytorch.callbacks.{name}"}
    config["logger"] = {"csv": {}}
    runner.run(config, world=2)


def test_a_resumed_epoch_without_the_outputs_of_its_first_batches_is_refused(runner: Runner) -> None:
    """They were in a list that no checkpoint holds: of a callback, say."""
    config = numbered("Plain", "Outside")
    config["callbacks"] |= AT
    runner.run(config, world=2, code=EXIT_STOPPED, signal_at=f"1 {int(signal.SIGTERM)} 0")
    runner.run(config, world=2, code=None)
    assert "this epoch was resumed in the middle, and its checkpoint lacks the" in runner.said()
