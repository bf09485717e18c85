"""A loss that is no mean over samples: with its weight it is the whole batch's, without one it is found."""

import copy
import json
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import Strategy
from safetensors.torch import load_file

import labtrain
from labtrain.base.signals import Wishes
from labtrain.exact import determinism
from labtrain.training.sharded.objective import LossDifference, NotComparedError, compare
from labtrain.training.sharded.strategy import Exact, ExactSingleDevice
from labtrain.training.state.counters import Trial
from tests.support import exact_worker
from tests.support.exact import Runner, configure, outcome, tell
from tests.support.objective_models import LR, SAMPLES, Data, Restless, Unweighted, Weighted, hinges, points, sentences

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
    """In float64 the weights are those of plain PyTorch on whole batches, and the bits are the same on two devices.

    The sentences of a shard, and of the last batch, are all padding: they count for nothing, and no NaN comes of them.
    """
    found = []
    for world in (1, 2):
        (folder := tmp_path / str(world)).mkdir()
        config = weighted(kind, trainer={"max_epochs": 2, "accumulate_grad_batches": accumulate})
        run_dir = Runner(folder).run(config, world=world)
        assert run_dir is not None
        found.append(outcome(run_dir))
    assert found == [found[0]] * 2
    model, epoch_loss, last_loss = in_plain_torch(kind, epochs=2, accumulate=accumulate)
    weights = load_file(max(run_dir.glob("checkpoints/*/weights.safetensors")))
    for name, value in model.state_dict().items():
        assert (weights[name] - value).abs().max() <= BOUND, name
    metrics = found[0]["metrics"]
    assert abs(metrics["loss"] - epoch_loss) <= 1e-6  # metrics and losses are kept in float32
    assert abs(metrics["last"] - last_loss) <= 1e-6


def test_an_error_that_is_0_where_the_loss_is_0_is_averaged_by_samples(tmp_path: Path) -> None:
    """On 1, 2 and 4 devices, and killed in the middle of an epoch: the same digests, and the averages of fractions."""
    config = configure("mlp", "even", "64-true", trainer={"max_epochs": 1})
    config["model"] = {"_target_": "tests.support.objective_models.Hinge"}
    config["data"] = {"_target_": "tests.support.objective_models.Data", "kind": "hinges", "batch_size": BATCH}
    found = []
    for world, story in ((1, "whole"), (2, "whole"), (4, "whole"), (1, "killed twice"), (4, "moved")):
        (folder := tmp_path / f"{world} {story}").mkdir()
        found.append(tell(Runner(folder), copy.deepcopy(config), world=world, story=story, seed=1))
    assert found == [found[0]] * len(found)
    losses, valid = (part.double() for part in hinges())
    loss, error = (losses * valid).sum() / valid.sum(), (losses * valid).amax(1).gt(0).double().mean()
    metrics = found[0]["metrics"]
    for name, expected in {"loss_epoch": loss, "item": loss, "error": error, "both_epoch": error}.items():
        assert abs(metrics[name] - expected.item()) <= 1e-15, name  # 60 products and their sum, in float64


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_weight_in_mixed_precision_has_the_same_bits_on_any_devices(precision: str, tmp_path: Path) -> None:
    found = []
    for world in (1, 2):
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


def unweighted(kind: str, **more: Any) -> Any:
    config = configure("mlp", "even", **more)
    config["model"] = {"_target_": "tests.support.objective_models.Unweighted", "kind": kind}
    data = "sentences" if kind == "sentences" else "points"
    config["data"] = {"_target_": "tests.support.objective_models.Data", "kind": data, "batch_size": BATCH}
    config["trainer"] |= {"max_epochs": None, "max_steps": 1}
    return config


def state_of(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """Return all that a step could have changed, in words: content, not identity."""
    numpy_state = np.random.get_state(legacy=True)
    return repr(
        [
            described(module),
            described(trainer.optimizers[0].state_dict()),
            described([each.scheduler.state_dict() for each in trainer.lr_scheduler_configs]),
            described(dict(trainer.fit_loop.epoch_loop._results)),
            (trainer.should_stop, trainer.loggers, vars(trainer._logger_connector)),
            random.getstate(),
            (numpy_state[1].tolist(), numpy_state[2]),
            torch.get_rng_state().tolist(),
        ]
    )


def described(value: Any, seen: set[int] | None = None) -> Any:
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        gradient = described(value.grad) if value.is_leaf else None
        return value.tolist(), str(value.dtype), value.requires_grad, value.data_ptr(), gradient
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state()[1].tolist(), value.get_state()[2]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, set):
        return sorted(value)
    if id(value) in seen or isinstance(value, pl.Trainer | pl.loggers.Logger | Strategy):
        return None
    if isinstance(value, dict | list | deque) or hasattr(value, "__dict__"):
        seen.add(id(value))
    if isinstance(value, dict):
        inner = [(key, described(item, seen)) for key, item in value.items()]
        return type(value).__name__, inner
    if isinstance(value, list | tuple | deque):
        return type(value).__name__, [described(item, seen) for item in value]
    if (hasattr(value, "__dict__") and not callable(value)) or isinstance(value, torch.nn.Module):
        return type(value).__name__, described(vars(value), seen)
    return repr(value)


class CompleteError(Exception):
    """Ends the training."""


class Probe(pl.Callback):
    """Compares before the first step, and keeps what there was before and after."""

    def __init__(self, shards: int) -> None:
        self.shards = shards

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        loader: Any = trainer.train_dataloader
        self.before = state_of(trainer, pl_module)
        self.found: Any = None
        try:
            trial = Trial(cast(Exact, trainer.strategy).counters, training=True)
            self.found = compare(trainer, pl_module, loader, trial, strict=True)
        except NotComparedError as error:
            self.found = str(error)
        self.after = state_of(trainer, pl_module)
        raise CompleteError


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Probe]:
    """Return what begins to train a model, and compares before its first step."""
    monkeypatch.setattr(determinism, "_run_mode", "strict")

    def begin(model: pl.LightningModule, dataset: Any, precision: str = "32-true", shards: int = 2) -> Probe:
        probe = Probe(shards)
        trainer = pl.Trainer(
            max_steps=1,
            accelerator="cpu",
            precision=precision,  # type: ignore[arg-type]
            strategy=ExactSingleDevice(device=torch.device("cpu"), shards=shards, wishes=Wishes(every_seconds=None)),
            callbacks=[probe],
            logger=CSVLogger(tmp_path),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with pytest.raises(CompleteError):
            trainer.fit(model, labtrain.DataLoader(dataset, BATCH, shuffle=True))
        assert probe.before == probe.after
        assert not trainer.logger.experiment.metrics  # type: ignore[union-attr]
        return probe

    return begin


def test_the_comparison_leaves_everything_as_it_was(probe: Callable[..., Probe]) -> None:
    """Weights and where they lie, buffers, attributes, containers, gradients, metrics, logs, optimizers, generators."""
    assert probe(Restless(), points()).found is None  # cross entropy, each time from the same state


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("kind", ["sentences", "classes", "contrast", "sum", "variance", "samples"])
def test_a_loss_that_is_no_mean_over_samples_is_found(kind: str, shards: int, probe: Callable[..., Probe]) -> None:
    with_tokens = tuple(array[:14] for array in sentences())
    found = probe(Unweighted(kind), with_tokens if kind == "sentences" else points(), shards=shards).found
    assert isinstance(found, LossDifference), found
    assert found.gradients > 10 * found.rounding


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize(
    "kind", ["squares", "one norm", "critic", "autocast", "normed", "frozen", "recurrent", "weighted sentences"]
)
def test_a_mean_is_no_false_alarm(kind: str, precision: str, probe: Callable[..., Probe]) -> None:
    if kind == "weighted sentences":
        found = probe(Weighted("sentences"), sentences(), precision).found
    else:
        found = probe(Unweighted(kind), points(), precision).found
    assert found is None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("model", [exact_worker.CNN, exact_worker.GPT])
def test_ordinary_models_are_no_false_alarm(
    model: Callable[[], pl.LightningModule], precision: str, probe: Callable[..., Probe]
) -> None:
    kind: Any = exact_worker.Texts if model is exact_worker.GPT else exact_worker.Images
    assert probe(model(), kind(24), precision).found is None


@pytest.mark.parametrize(
    ("kind", "shards", "reason"),
    [
        ("drawn", 2, "the loss draws random numbers"),
        ("own draws", 2, "the loss draws random numbers"),
        ("nan", 2, "the loss is not finite"),
        (
            "fails",
            2,
            "training_step, or the loading of a part of a shard, fails in eval mode: AttributeError: 'Tensor'",
        ),
        ("squares", 8, "a shard has one sample"),
    ],
)
def test_what_cannot_be_compared_is_said_with_the_reason(
    kind: str, shards: int, reason: str, probe: Callable[..., Probe]
) -> None:
    assert probe(Unweighted(kind), points(), shards=shards).found.startswith(reason)


def notes(run_dir: Path | None) -> list[str]:
    """Return what the receipt notes, but that the model's generator is in no checkpoint."""
    assert run_dir is not None
    found = json.loads((run_dir / "receipt.json").read_text())["determinism"]["notes"]
    return [note for note in found if not note.startswith("generator is a torch._C.Generator")]


def test_it_is_said_and_in_the_receipt_with_the_cures(tmp_path: Path) -> None:
    """The same on one device and on two, where rank 1 only waits; the weights are those without the comparison."""
    found, results = [], []
    for world, target in ((1, "Unweighted"), (2, "Unweighted"), (1, "Unchecked")):
        (folder := tmp_path / f"{world}-{target}").mkdir()
        config = unweighted("contrast", trainer={"max_steps": 3})
        config["model"]["_target_"] = f"tests.support.objective_models.{target}"
        runner = Runner(folder)
        run_dir = runner.run(config, world=world)
        found.append(notes(run_dir))
        results.append({key: value for key, value in outcome(run_dir).items() if key != "run_id"})
        assert all(runner.said().count(note) == 1 for note in found[-1])
    assert found[0] == found[1]
    assert results == [results[0]] * 3
    normalised, said = found[0]
    assert normalised == (
        "BatchNorm normalises over the 2 samples of a shard, not over the batch's 8 (determinism.shards=4)"
    )
    assert (
        "Each step minimises the mean of the losses of 4 shards of 2 samples, not the loss of the batch of 8." in said
    )
    assert "determinism.shards=1 minimises the loss of the batch." in said
    assert 'return {"loss": loss, "weight": n}' in said
    assert found[2] == [normalised]


def test_without_shards_or_in_mode_off_nothing_is_compared(tmp_path: Path) -> None:
    for name, settings in (("one", {"shards": 1}), ("off", {"mode": "off"})):
        (folder := tmp_path / name).mkdir()
        assert notes(Runner(folder).run(unweighted("contrast", determinism=settings))) == []


def test_what_is_not_compared_stands_in_the_receipt_alone(runner: Runner) -> None:
    found = notes(runner.run(unweighted("drawn")))
    assert found[-1].endswith("were not compared: the loss draws random numbers")
    assert "not compared" not in runner.said()
