"""Metrics of every kind of state, updated a shard at a time: what one process would have. Over ranks: test_exact.py."""

from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import nn

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
