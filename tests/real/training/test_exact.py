"""Promise 3, by digest: cases of the matrix in which most pairs of values meet, any step to stop at, other ways to train a step."""

import itertools
import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from labtrain.base.errors import EXIT_STOPPED
from tests.support.exact import Runner, configure, outcome, tell
from tests.support.exactness import FACTORS, Case, cover, each, most_pairs

pytest_plugins = ["tests.support.exactness"]
PAIRS = cover(2)


def test_any_two_values_meet() -> None:
    for i, j in itertools.combinations(range(len(FACTORS)), 2):
        values = list(FACTORS.values())
        assert {(case[i], case[j]) for case in PAIRS} == set(itertools.product(values[i], values[j]))
    assert len(PAIRS) < 60


@each(most_pairs())
def test_however_it_ran(case: Case, is_exact: Callable[[Case], None]) -> None:
    is_exact(case)


@each(cover(2, own=True)[:4])
def test_what_people_bring(case: Case, is_exact_own: Callable[[Case], None]) -> None:
    """torch's samplers, streams, GANs, losses over the batch and synchronised BatchNorm."""
    is_exact_own(case)


@pytest.mark.parametrize("step", [1, 4, 5, 6, 10])
def test_stopped_after_a_step(step: int, goes_on_after: Callable[[int], None]) -> None:
    """The last of an epoch (5, 10) and the one before and after too; tests/full has every step."""
    goes_on_after(step)


def receipt_of(runner: Runner) -> dict[str, Any]:
    return dict(json.loads(next(runner.folder.glob("runs/*/*/receipt.json")).read_text()))


def test_a_checkpoint_gets_the_metrics_of_a_validation_that_was_killed(runner: Runner, other: Runner) -> None:
    """Its weights are saved before the validation; what is best does not depend on where the training was killed."""
    best = {"keep_last": 1, "keep_best": 2, "monitor": "val/loss", "mode": "min"}
    config = configure("mlp", "even", checkpoint=best, trainer={"max_epochs": 6})
    runner.run(config)
    other.run(config, code=None, signal_at=f"-10 {signal.SIGKILL} 0")
    other.run(config)
    kept = [[(each["step"], each["score"]) for each in receipt_of(runner)["checkpoints"]] for runner in (runner, other)]
    assert len(kept[0]) == 3
    assert kept[0] == kept[1]


# ----------------------------------------------------------------------------------------- other ways to train one step


@pytest.mark.release
@pytest.mark.parametrize(("world", "workers", "story"), [(1, 2, "killed"), (2, 0, "moved"), (3, 2, "killed twice")])
def test_transformed_in_batches(world: int, workers: int, story: str, runner: Runner, other: Runner) -> None:
    """Arrays of bytes, shifted, flipped, noisy and mixed with partners; and a transform that draws from torch."""
    reference = outcome(runner.run(configure("cnn", data={"kind": "raw"})))
    config = configure("cnn", "uneven", "32-true", workers, data={"kind": "raw"})
    assert tell(other, config, world=world, story=story, seed=world) == reference
    expected = ["Shift(pixels=1)", "Flip(p=0.5)", "Scale(mean=0.5, std=0.2)", "Noise(std=0.1)"]
    expected += ["Mixup(num_classes=3, alpha=0.4)", "tests.support.exact_worker.hard_and_loud"]
    assert receipt_of(other)["data"]["train"]["transforms"] == expected


def test_gradients_in_many_buckets_that_leave_during_the_backward(runner: Runner, other: Runner) -> None:
    reference = outcome(runner.run(configure("gpt")))
    for world in (2, 3):
        folder = other.folder / str(world)
        folder.mkdir()
        assert outcome(Runner(folder).run(configure("gpt"), world=world, bucket_bytes=600)) == reference


def test_fp16_with_one_decision_on_overflow(runner: Runner, other: Runner) -> None:
    """The scale begins too high: the first steps are skipped, on all ranks, and the scaler's state survives a kill."""
    config = configure("mlp", "uneven", "16-mixed")
    reference = outcome(runner.run(config))
    weights = [line["weights"] for line in reference["trail"]]
    assert weights[0] == weights[1] != weights[-1]
    assert tell(other, config, world=2, story="moved", seed=1) == reference


CALLBACKS = {
    "ema": {"_target_": "lightning.pytorch.callbacks.EMAWeightAveraging", "decay": 0.9},
    "early": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "patience": 1, "min_delta": 0.1},
    "halved": {"_target_": "tests.support.exact_worker.Halve"},
    "at": {"_target_": "tests.support.exact_worker.At"},
}  # fmt: skip


@pytest.mark.release
@pytest.mark.parametrize("name", ["ema", "early", "halved"])
def test_callbacks_keep_their_state(name: str, runner: Runner, other: Runner) -> None:
    """An average of the weights, a stop that counts epochs; and what changes the weights at the end is in a checkpoint."""
    callbacks = {key: CALLBACKS[key] for key in (name, "at")}
    config = configure("mlp", trainer={"max_epochs": 8}, callbacks=callbacks)
    run_dir = runner.run(config)
    reference = outcome(run_dir)
    assert run_dir is not None
    newest = sorted(run_dir.glob("checkpoints/*"))[-1]
    assert newest.name == f"step-{reference['steps']:010d}{'-end' if name == 'halved' else ''}"
    assert json.loads((newest / "manifest.json").read_text())["weights_digest"] == reference["weights_digest"]
    assert (reference["steps"] < 8 * 5) == (name == "early")
    found = tell(
        other, configure("mlp", trainer={"max_epochs": 8}, callbacks=callbacks), world=2, story="killed twice", seed=3
    )
    assert found == reference


@pytest.mark.parametrize("loader", ["stateful", "counted"])
def test_a_stream_that_can_say_where_it_stands(loader: str, runner: Runner, other: Runner) -> None:
    """Without shards, on one device, with and without a length; in the middle of an epoch, at its end, and killed."""
    config = configure("mlp", "even", data={"loader": loader}, determinism={"shards": None})
    reference = outcome(runner.run(config))
    for step in (3, 5, 6):
        folder = other.folder / str(step)
        folder.mkdir()
        stopped = Runner(folder)
        stopped.run(config, code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0")
        assert outcome(stopped.run(config)) == reference


@pytest.mark.parametrize("world", [1, 2])
def test_without_shards_a_resume_is_exact_on_the_same_devices(world: int, runner: Runner, other: Runner) -> None:
    """Lightning's own strategies: sums of metrics are each rank's own, and each rank gets its own back."""
    config = configure("cnn", determinism={"shards": None})
    reference = outcome(runner.run(config, world=world))
    assert tell(other, config, world=world, story="killed", seed=5) == reference


def test_one_shard_is_what_lightning_computes(runner: Runner, other: Runner) -> None:
    """`shards: 1` and Lightning's plain strategy differ in the seeds of their steps alone: without draws, in no weight."""
    data = {"size": 40, "batch_size": 8}
    configs = [configure("gpt", data=data, determinism={"shards": shards}) for shards in (1, None)]
    for config in configs:
        config["model"]["dropout"] = 0.0
    one, plain = outcome(runner.run(configs[0])), outcome(other.run(configs[1]))
    assert one["weights_digest"] == plain["weights_digest"]
    assert [line["weights"] for line in one["trail"]] == [line["weights"] for line in plain["trail"]]
