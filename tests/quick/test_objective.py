"""A loss that is no mean over samples: with its weight it is the whole batch's, without one it is found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.exact import Runner, configure, outcome
from tests.support.objective_models import LR, SAMPLES, Data, Weighted

BATCH = 8  # the last batch has 6 samples
# Sums of a few dozen float64 numbers in two orders, and as many steps.
BOUND = 1e-13


def weighted(kind: str, *, fault: str = "", **more: Any) -> Any:
    config = configure("mlp", "even", "64-true", **more)
    config["model"] = {"_target_": "tests.support.objective_models.Weighted", "kind": kind, "fault": fault}
    config["data"] = {"_target_": "tests.support.objective_models.Data", "kind": kind, "batch_size": BATCH}
    return config


def in_plain_torch(kind: str, *, epochs: int, accumulate: int) -> tuple[Weighted, float, float]:
    """Return the model that whole batches train, the mean of its loss over the last epoch, and its last loss."""
    model = Weighted(kind).double()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    batches = -(-SAMPLES // BATCH)
    inputs, targets = Data(kind, BATCH).arrays
    for _ in range(epochs):
        total = weights = last = 0.0
        for number in range(batches):
            rows = slice(number * BATCH, (number + 1) * BATCH)
            loss, weight = model.loss((inputs[rows].double(), targets[rows]))
            last = loss.item() if weight else 0.0
            if weight:
                (loss / accumulate).backward()
                total, weights = total + loss.item() * float(weight), weights + float(weight)
            if (number + 1) % accumulate == 0 or number + 1 == batches:
                optimizer.step()
                optimizer.zero_grad()
    return model, total / weights, last


@pytest.mark.parametrize(("kind", "accumulate"), [("sentences", 1), ("points", 2)])
def test_a_weighted_mean_is_that_of_the_whole_batch_on_any_devices(kind: str, accumulate: int, tmp_path: Path) -> None:
    """In float64 the weights are those of plain PyTorch on whole batches, and the bits are the same on 1 to 4 devices.

    The sentences of a shard, and of the last batch, are all padding: they count for nothing, and no NaN comes of them.
    """
    found = []
    for world in (1, 2, 3, 4):
        (folder := tmp_path / str(world)).mkdir()
        config = weighted(kind, trainer={"max_epochs": 2, "accumulate_grad_batches": accumulate})
        run_dir = Runner(folder).run(config, world=world)
        assert run_dir is not None
        found.append(outcome(run_dir))
    assert found == [found[0]] * 4
    model, epoch_loss, last_loss = in_plain_torch(kind, epochs=2, accumulate=accumulate)
    weights = load_file(max(run_dir.glob("checkpoints/*/weights.safetensors")))
    for name, value in model.state_dict().items():
        assert (weights[name] - value).abs().max() <= BOUND, name
    metrics = found[0]["metrics"]
    assert abs(metrics["loss"] - epoch_loss) <= 1e-6  # metrics and losses are kept in float32
    assert abs(metrics["last"] - last_loss) <= 1e-6


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_weight_in_mixed_precision_has_the_same_bits_on_any_devices(precision: str, tmp_path: Path) -> None:
    found = []
    for world in (1, 3):
        (folder := tmp_path / str(world)).mkdir()
        config = weighted("sentences", trainer={"precision": precision, "max_epochs": 4})
        found.append(outcome(Runner(folder).run(config, world=world)))
    assert found[0] == found[1]
    losses = [line["loss"] for line in found[0]["trail"]]
    assert all(isinstance(loss, float) for loss in losses)  # NaN would be a string


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("nan", "training_step returned nan as weight of its loss; expected a finite number, 0 or more"),
        ("-1", "training_step returned -1.0 as weight of its loss"),
        ("each", "training_step returned a tensor of shape (2,) as weight of its loss"),
        ("some", "the shards of one step log different names: "),
    ],
)
def test_a_weight_that_is_none_is_refused(fault: str, says: str, runner: Runner) -> None:
    runner.run(weighted("points", fault=fault), code=2)
    assert says in runner.said(), runner.said()


def test_with_one_shard_a_weight_changes_nothing(tmp_path: Path) -> None:
    """A whole batch's loss is its own mean already: the weights are those of plain PyTorch."""
    config = weighted("points", determinism={"shards": 1}, trainer={"max_epochs": 2})
    run_dir = Runner(tmp_path).run(config)
    assert run_dir is not None
    model, *_ = in_plain_torch("points", epochs=2, accumulate=1)
    weights = load_file(max(run_dir.glob("checkpoints/*/weights.safetensors")))
    for name, value in model.state_dict().items():
        assert (weights[name] - value).abs().max() <= BOUND, name
