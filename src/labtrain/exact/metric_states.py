"""Takes out and restores the states of torchmetrics, and reduces them over shards in one order."""

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

from labtrain.base.contracts import State

REDUCTIONS: dict[object, str] = {dim_zero_sum: "sum", dim_zero_mean: "mean", dim_zero_min: "min", dim_zero_max: "max"}

KEPT = frozenset({*vars(torchmetrics.SumMetric()), "_update_count"})  # torchmetrics' own attributes

Held = State


def metrics_of(module: torch.nn.Module) -> dict[str, torchmetrics.Metric]:
    """Return a model's metrics that have states, by name."""
    return {
        name: part for name, part in module.named_modules() if isinstance(part, torchmetrics.Metric) and part._defaults
    }


def hold(metric: torchmetrics.Metric) -> Held:
    """Return a metric's states and its cached results."""
    states = {state: getattr(metric, state) for state in metric._defaults}
    states = {state: list(value) if isinstance(value, list) else value for state, value in states.items()}
    return {
        **states,
        "_update_count": metric._update_count,
        "_computed": metric._computed,
        "_forward_cache": metric._forward_cache,
    }


def release(metric: torchmetrics.Metric, held: Held) -> None:
    """Restore what `hold` returned."""
    for name, value in held.items():
        setattr(metric, name, value)


def reduced(rows_SK: Tensor, kind: str) -> Tensor:
    """Reduce rows (S, K) to (K,): a sum adds them one after the other."""
    if kind in ("min", "max"):
        return rows_SK.amin(0) if kind == "min" else rows_SK.amax(0)
    return add_rows(rows_SK) / len(rows_SK) if kind == "mean" else add_rows(rows_SK)


def add_rows(rows_SK: Tensor) -> Tensor:
    """Return the sum of the rows (S, K), added one after the other: (K,)."""
    total = rows_SK[0].clone()
    for row in rows_SK[1:]:
        total += row
    return total


def fresh(metric: torchmetrics.Metric) -> Held:
    """Return what `hold` returns for a metric that was never updated."""
    states: Held = {
        state: default.clone().to(metric.device) if isinstance(default, Tensor) else []
        for state, default in metric._defaults.items()
    }
    return {**states, "_update_count": 0, "_computed": None, "_forward_cache": None}


def merged(held: Tensor, step: Tensor, kind: str, updates: int) -> Tensor:
    """Return a metric's state after one more step, as torchmetrics' own Metric._reduce_states does it."""
    if kind == "mean":
        return (held * updates + step) / (updates + 1)
    if kind == "sum":
        return held + step
    return (torch.minimum if kind == "min" else torch.maximum)(held, step)


def reduction(metric: torchmetrics.Metric, state: str) -> str:
    """Return how a state is reduced over ranks: sum, mean, min, max; empty for another way."""
    function: object = metric._reductions[state]
    return REDUCTIONS.get(function, "")


def beside_states(metric: torchmetrics.Metric) -> dict[str, object]:
    """Return a metric's attributes beside its states; two results are equal if nothing changed.

    Numbers and texts; of a tensor its version, of a container its length.
    """
    found: dict[str, object] = {"_update_count": metric._update_count}
    for name, value in vars(metric).items():
        if name in metric._defaults or name in KEPT:
            continue
        if isinstance(value, Tensor):
            found[name] = id(value), value._version
        elif isinstance(value, list | dict | set):
            found[name] = len(value)
        elif type(value) in (int, float, str):
            found[name] = value
    return found
