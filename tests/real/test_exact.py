"""Promise 3, by digest: weights, optimizer and all other state, metrics and trail, however a training ran.

A case is a model, a number of processes and of loader workers, a precision, a shape of the data and of the training, and a
story: what befell it. CI runs cases in which each two values meet; `make test-full` runs them all.
"""

import itertools
import json
import random
import signal
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from labtrain.errors import EXIT_STOPPED
from tests.support.exact import SHAPES, STORIES, Runner, configure, outcome, tell

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("mlp", "cnn", "gpt"),
    "world": (1, 2, 3, 4),
    "workers": (0, 2),
    "story": STORIES,
    "precision": ("32-true", "bf16-mixed"),
    "shape": tuple(SHAPES),
}


def pairwise() -> list[tuple[Any, ...]]:
    """Return cases in which any two values of any two factors meet: greedily, the case with most new pairs next."""
    draw = random.Random(0)
    factors = list(FACTORS.values())

    def pairs(case: tuple[Any, ...]) -> set[Any]:
        return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}

    every = list(itertools.product(*factors))
    missing = set().union(*(pairs(case) for case in every))
    chosen = []
    while missing:
        best = max(draw.sample(every, 400), key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


CHOSEN = pairwise()
CASES = [
    pytest.param(
        case,
        id="-".join(str(value).replace(" ", "_") for value in case),
        marks=() if case in CHOSEN else pytest.mark.full,
    )
    for case in itertools.product(*FACTORS.values())
]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What one process without workers comes to, that nothing befell."""

    @cache
    def reference(model: str, shape: str, precision: str) -> dict[str, Any]:
        return outcome(Runner(tmp_path_factory.mktemp("reference")).run(configure(model, shape, precision)))

    return reference


def test_any_two_values_meet_in_ci() -> None:
    for i, j in itertools.combinations(range(len(FACTORS)), 2):
        values = list(FACTORS.values())
        assert {(case[i], case[j]) for case in CHOSEN} == set(itertools.product(values[i], values[j]))
    assert len(CHOSEN) < 60


@pytest.mark.parametrize("case", CASES)
def test_however_it_ran(case: tuple[Any, ...], references: Callable[..., dict[str, Any]], runner: Runner) -> None:
    """What befalls it is drawn from the case itself, so a case is the same whichever others are run."""
    model, world, workers, story, precision, shape = case
    seed = zlib.crc32(repr(case).encode())
    found = tell(runner, configure(model, shape, precision, workers), world=world, story=story, seed=seed)
    assert found == references(model, shape, precision)


@pytest.mark.parametrize("step", range(1, 15))
def test_stopped_after_any_step(step: int, runner: Runner, other: Runner) -> None:
    """The last of an epoch (5, 10) and the one before and after too, with a validation and a plateau at the epoch's end.

    Lightning's own checkpoint of an epoch's last batch skips the next epoch; its averages of an epoch forget what was
    before the resume.
    """
    config = configure("cnn", "even", model={"plateau": True})
    reference = outcome(runner.run(config))
    assert other.run(config, code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0") is None
    manifest = newest_manifest(other)
    assert (manifest["step"], manifest["epoch"], manifest["batch"]) == (step, (step - 1) // 5, (step - 1) % 5 + 1)
    assert outcome(other.run(config)) == reference


def receipt_of(runner: Runner) -> dict[str, Any]:
    return dict(json.loads(next(runner.folder.glob("runs/*/*/receipt.json")).read_text()))


def newest_manifest(runner: Runner) -> dict[str, Any]:
    return dict(json.loads(max(runner.folder.glob("runs/*/*/checkpoints/step-*/manifest.json")).read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_stops_all_ranks_whichever_gets_it(number: int, runner: Runner) -> None:
    config = configure("mlp", "even")
    runner.run(config, world=2, code=EXIT_STOPPED, signal_at=f"3 {number} 1")
    assert newest_manifest(runner)["step"] == 4  # the others learn of it with the next step
    (path,) = runner.folder.glob("runs/*/*/receipt.json")
    assert json.loads(path.read_text())["status"] == "interrupted"


def test_a_rank_without_a_sample_is_heard_too(runner: Runner) -> None:
    """In the last batch of an epoch, of three samples, the third rank has none: its signal stops all with the next step."""
    runner.run(configure("mlp", "batch of 11"), world=3, code=EXIT_STOPPED, signal_at=f"3 {signal.SIGTERM} 2")
    assert newest_manifest(runner)["step"] == 4


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


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"trainer": {"accumulate_grad_batches": 2, "max_epochs": 5}}, id="accumulated"),
        pytest.param({"model": {"channels_last": True}, "trainer": {"gradient_clip_val": 0.1}}, id="channels last"),
        pytest.param({"determinism": {"shards": 6}}, id="six shards"),
        pytest.param({"determinism": {"shards": 8}, "data": {"batch_size": 9}}, id="eight shards of nine"),
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
        found = outcome(Runner(other.folder).run(configure("gpt", resume="never"), world=world, bucket_bytes=600))
        assert found == reference


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


# -------------------------------------------------------------------------------------------------- catching a fake


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
def test_a_digest_differs_where_it_must(what: str, more: dict[str, Any], runner: Runner, other: Runner) -> None:
    reference = outcome(runner.run(configure("mlp", "even", model={"wide": True})))
    config = configure("mlp", "even", **{"model": {"wide": True}, **more})
    found = outcome(other.run(config))
    assert found["weights_digest"] != reference["weights_digest"], what
    assert found["state_digest"] != reference["state_digest"]
    assert found["trail"] != reference["trail"]
    if what == "one bit of one weight":
        pairs = zip(found["trail"], reference["trail"], strict=True)
        first = next(mine for mine, theirs in pairs if mine != theirs)
        assert first["step"] == 7  # the trail's line of step 6 was written before the bit was turned
