"""What is minimised where a batch is cut into shards: the mean of their losses, by samples or by a returned weight."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from labtrain.errors import ConfigError
from labtrain.metrics import add_rows

WEIGHT_HINT = (
    'return {"loss": loss, "weight": n} with the sum that the loss is divided by: valid tokens, or the class weights of'
    " the samples"
)


def weight_of(output: Any) -> float | None:
    """Return the weight that `training_step` returned with the loss of a shard; None if it returned none.

    Raises:
        ConfigError: it is no number, or below 0.
    """
    if not isinstance(output, dict) or "weight" not in output:
        return None
    given = output["weight"]
    if isinstance(given, numbers.Real) or (isinstance(given, Tensor) and given.numel() == 1):
        weight = float(given)
        if math.isfinite(weight) and weight >= 0:
            return weight
    shown = (
        f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) and given.numel() != 1 else repr(given)
    )
    raise ConfigError(
        f"training_step returned {shown} as weight of its loss; expected a finite number, 0 or more",
        hint=f"{WEIGHT_HINT}; or return it by another name than weight",
    )


def weighted_row(loss: Tensor, share: float, *, returned: bool) -> Tensor:
    """Return a shard's loss times its share; and its share, where the step returned a weight. 1-D, float64."""
    row = [loss.double().reshape(()) * share if share else loss.new_zeros((), dtype=torch.float64)]
    if returned:
        row.append(torch.full_like(row[0], share))
    return torch.stack(row)


def weighted_mean(rows_SN: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the loss of a step, and the sum of its shards' shares where they are not 1 by themselves.

    Args:
        rows_SN: `weighted_row` of each shard.
    """
    total = add_rows(rows_SN)
    if len(total) == 1:
        return total[0].float(), None
    return (total[0] / torch.where(total[1] > 0, total[1], 1)).float(), total[1]
