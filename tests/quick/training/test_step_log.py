"""Metrics of every kind of state, updated a shard at a time: what one process would have. Over ranks: test_exact.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labtrain.base.errors import ConfigError
from labtrain.record.digests import digest_tree
from labtrain.training.sharded.step_log import Tally

KINDS: dict[str, Any] = {
    "sum": torchmetrics.SumMetric,
    "mean": torchmetrics.MeanMetric,
    "max": torchmetrics.MaxMetric,
    "min": torchmetrics.MinMetric,
    "cat": torchmetrics.CatMetric,
}


class Module(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.metric = KINDS[kind]()


def values(step: int, shard: int) -> torch.Tensor:
    """Whole numbers: every order of their addition has the same bits, so that torchmetrics' own order can be compared."""
    return torch.randint(0, 1000, (3,), generator=torch.Generator().manual_seed(10 * step + shard)).float()


@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_what_one_process_has(kind: str) -> None:
    module, plain = Module(kind), KINDS[kind]()
    tally, results = Tally(module), _ResultCollection(training=True)
    for step in range(4):
        tally.begin(training=True)
        for shard in range(3):
            logs = tally.open(None, 3)
            module.metric(values(step, shard))
            plain.update(values(step, shard))
            logs.log("training_step", "m", module.metric, on_step=True, on_epoch=True, metric_attribute="metric")
            tally.close(torch.zeros(2, dtype=torch.float64), 3)
        tally.combine(results, samples=9, counts=[3], wishes=(0.0, 0.0), device=torch.device("cpu"))
        assert digest_tree(module.metric.compute()) == digest_tree(plain.compute())
        module.metric._computed = plain._computed = None
        alone = KINDS[kind]()
        for shard in range(3):
            alone.update(values(step, shard))
        on_step = results.metrics(on_step=True)["log"]
        if kind != "cat":  # a step's value has to be one number
            assert digest_tree(on_step["m_step"]) == digest_tree(alone.compute())


@pytest.mark.parametrize(
    ("reduce_fx", "on_step", "on_epoch"), [("mean", 3.5, 5.5), ("sum", 7.0, 22.0), ("max", 6.0, 9.0), ("min", 1.0, 1.0)]
)
def test_numbers_are_weighted_by_samples(reduce_fx: str, on_step: float, on_epoch: float) -> None:
    """Two steps of two shards: 1 and 6 with equal samples, then 6 and 9 with one and three."""
    tally, results = Tally(nn.Module()), _ResultCollection(training=True)
    for step, shards in enumerate([[(1.0, 2), (6.0, 2)], [(6.0, 1), (9.0, 3)]]):
        tally.begin(training=True)
        for value, samples in shards:
            logs = tally.open(None, samples)
            logs.log("training_step", "x", torch.tensor(value), on_step=True, on_epoch=True, reduce_fx=reduce_fx)
            tally.close(torch.zeros(2, dtype=torch.float64), samples)
        tally.combine(results, samples=4, counts=[2], wishes=(0.0, 0.0), device=torch.device("cpu"))
        if step == 0:
            assert results.metrics(on_step=True)["log"]["x_step"].item() == on_step
    expected = (1 * 2 + 6 * 2 + 6 + 9 * 3) / 8 if reduce_fx == "mean" else on_epoch
    assert results.metrics(on_step=False)["log"]["x_epoch"].item() == expected


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What a shard's step returns, and logs beside it."""

    samples: int
    weight: float | None
    loss: float
    other: float


CPU = torch.device("cpu")
Log = Callable[[torch.Tensor], Any]


def logged(steps: list[list[Shard]], log: Log, *, on_step: bool, dtype: torch.dtype = torch.float64) -> Any:
    """Return the collection that some steps leave, as Lightning's self.log calls it."""
    tally, results = Tally(nn.Module()), _ResultCollection(training=True)
    for shards in steps:
        tally.begin(training=True)
        for shard in shards:
            logs, loss = tally.open(None, shard.samples), torch.tensor(shard.loss, dtype=dtype)
            for name, value in (("loss", log(loss)), ("other", shard.other)):
                value = value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
                logs.log("training_step", name, value, on_step=on_step, on_epoch=True)
            weighted = None if shard.weight is None else (loss, shard.weight)
            tally.close(torch.zeros(2, dtype=torch.float64), shard.samples, weighted)
        samples = sum(shard.samples for shard in shards)
        tally.combine(results, samples=samples, counts=[len(shards)], wishes=(0.0, 0.0), device=CPU)
    return results


def average(steps: list[list[Shard]], name: str) -> float:
    """Return the mean of the loss by weight, or of the other value by samples."""
    weights, total = Fraction(0), Fraction(0)
    for shard in (shard for shards in steps for shard in shards):
        by = shard.samples if name == "other" or shard.weight is None else shard.weight
        if by and not math.isnan(getattr(shard, name)):
            weights, total = weights + Fraction(by), total + Fraction(by) * Fraction(getattr(shard, name))
    return float(total / weights)


def shards(*numbers: tuple[int, float | None, float, float]) -> list[Shard]:
    return [Shard(samples=samples, weight=weight, loss=loss, other=other) for samples, weight, loss, other in numbers]


# The other value is an error, which is 0 where the loss is.
SOME_RIGHT = shards((2, 2, 2.5, 1.0), (2, 8, 1.5, 0.5), (2, 15, 0.0, 0.0), (2, 15, 0.0, 0.0))
ALL_RIGHT = shards((2, 9, 0.0, 0.0), (2, 40, 0.0, 0.0), (4, 60, 0.0, 0.0))
PADDING = shards((2, 0, math.nan, math.nan), (1, 0, 0.0, 0.0))
SOME_PADDING = shards((2, 0, math.nan, 0.25), (3, 5, 1.25, 1.25))
WITHOUT = shards((2, None, 0.75, 0.25), (3, None, 0.5, 0.5))
EPOCHS = {
    "equal in some shards": [SOME_RIGHT],
    "equal in all shards of the last step": [SOME_RIGHT, ALL_RIGHT],
    "equal in all shards of the first step": [ALL_RIGHT, SOME_RIGHT],
    "a step without weight": [SOME_RIGHT, PADDING],
    "a first step without weight": [PADDING, SOME_RIGHT],
    "a shard without weight": [SOME_PADDING, SOME_RIGHT],
    "equal wherever there is weight": [SOME_PADDING],
    "steps that return no weight": [WITHOUT, SOME_RIGHT, WITHOUT],
}
WAYS: dict[str, Log] = {
    "loss": lambda loss: loss,
    "item": lambda loss: loss.item(),
    "double": lambda loss: loss.double(),
    "nan to num": lambda loss: loss.nan_to_num(),
}


@pytest.mark.parametrize("on_step", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("epoch", EPOCHS)
def test_the_loss_is_averaged_by_its_weight_and_a_metric_by_samples(epoch: str, way: str, on_step: bool) -> None:
    """Each average is that of exact fractions, rounded once; the value of a step is float32, as Lightning's."""
    steps = EPOCHS[epoch]
    results, end = logged(steps, WAYS[way], on_step=on_step), "_epoch" if on_step else ""
    found = results.metrics(on_step=False)["log"]
    assert found[f"loss{end}"].item() == average(steps, "loss")
    assert found[f"other{end}"].item() == average(steps, "other")
    for number in range(len(steps)) if on_step else ():
        if steps[number] is PADDING:
            expected = dict.fromkeys(("loss", "other"), 0.0)
        else:
            expected = {name: average([steps[number]], name) for name in ("loss", "other")}
        step = logged(steps[: number + 1], WAYS[way], on_step=True).metrics(on_step=True)["log"]
        for name, value in expected.items():
            assert step[f"{name}_step"].item() == torch.tensor(value).item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_a_logged_loss_is_known_in_any_precision(way: str, dtype: torch.dtype, default: torch.dtype) -> None:
    """The losses have many digits. Three additions and a division in float64: the error is below 1e-15.

    If a loss were not known as one, the average would be that by samples, which differs by more than 0.01.
    """
    steps = [shards((3, 1, 0.1, 0.2), (3, 100, 0.7, 0.2)), shards((5, 30, 1 / 3, 0.2), (1, 3, 5 / 7, 0.2))]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = logged(steps, WAYS[way], on_step=False, dtype=dtype).metrics(on_step=False)["log"]
    finally:
        torch.set_default_dtype(before)
    rounded = [[Shard(**vars(each) | {"loss": torch.tensor(each.loss, dtype=dtype).item()}) for each in step]
               for step in steps]  # fmt: skip
    assert abs(found["loss"].item() - average(rounded, "loss")) <= 1e-15
    assert abs(average(rounded, "loss") - average([[Shard(**vars(each) | {"weight": each.samples}) for each in step]
                                                   for step in rounded], "loss")) > 0.01  # fmt: skip


def test_a_new_epoch_begins_without_the_last_ones_differences() -> None:
    """A value that was another than the loss in one epoch may be the loss in the next."""
    results = logged([SOME_RIGHT], lambda loss: loss / 2, on_step=False)
    assert results.metrics(on_step=False)["log"]["loss"].item() == (2 * 1.25 + 2 * 0.75) / 8
    results.reset()
    assert results["training_step.loss"].as_loss is None


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices, and a copy from a CPU that waits."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        to = (kwargs or {}).get("device")
        if function is torch.ops.aten._to_copy.default and to is not None:
            assert {torch.device(to).type} == devices or kwargs["non_blocking"], function
        else:
            assert len(devices) < 2, f"{function} of {devices}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_step", [False, True])
@pytest.mark.parametrize("weight", [None, 0.0, 2.0])
def test_values_of_a_cpu_beside_a_loss_of_a_device(weight: float | None, on_step: bool) -> None:
    """The meta device stands for a GPU: it has no value to wait for, so a read raises.

    No operation has tensors of two devices, and no copy to the device waits for it.
    """
    tally, results = Tally(nn.Module()), _ResultCollection(training=True)
    meta = torch.device("meta")
    for _ in range(2):
        tally.begin(training=True)
        for _ in range(2):
            logs, loss = tally.open(None, 3), torch.zeros((), device=meta)
            for name, value in (("cpu", torch.tensor(0.5)), ("wide", torch.tensor(0.5).double()), ("device", loss)):
                logs.log("training_step", name, value, on_step=on_step, on_epoch=True)
                logs.log("training_step", f"{name} of a step", value, on_step=True, on_epoch=False)
                logs.log("training_step", f"sum of {name}", value, on_step=on_step, on_epoch=True, reduce_fx="sum")
            with OneDevice():
                front = torch.zeros(2, dtype=torch.float64, device=meta)
                tally.close(front, 3, None if weight is None else (loss, weight))
        with OneDevice():
            tally.combine(results, samples=6, counts=[2], wishes=(0.0, 0.0), device=meta)
    with OneDevice():
        found = results.metrics(on_step=False)["log"]
    assert {value.device.type for value in found.values()} == {"meta"}


def test_a_collection_shares_no_states() -> None:
    """Compute groups would update one of two metrics and let the other look at its state."""
    module = nn.Module()
    module.metrics = torchmetrics.MetricCollection(
        [torchmetrics.Accuracy("multiclass", num_classes=3), torchmetrics.F1Score("multiclass", num_classes=3)]
    )
    assert len(Tally(module).metrics) == 2
    module.metrics.update(torch.eye(3), torch.arange(3))
    first, second = module.metrics.values(copy_state=False)
    assert first.tp is not second.tp


def test_a_state_with_a_function_of_its_own_is_refused() -> None:
    module = nn.Module()
    module.metric = torchmetrics.PearsonCorrCoef()
    with pytest.raises(ConfigError, match="has its own reduction"):
        Tally(module)
