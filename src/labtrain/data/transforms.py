"""How a loader applies transforms to a batch: in turn, each with its own draws. labtrain's own: labtrain.augment."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from labtrain.base.console import full_name
from labtrain.data.draws import Draws

Transform = Callable[[object, Draws], object]


def apply(transforms: Sequence[Transform], batch: object, draws: Draws) -> object:
    """Apply transforms in turn, each under its place in the list.

    A transform with a method `partners` gets the rows that it asked for after the batch's own, and returns as many rows
    as without them.
    """
    for number, transform in enumerate(transforms):
        batch = transform(batch, draws.within(number))
        if hasattr(transform, "partners"):
            draws = draws.first(len(draws) // 2)
    return batch


def with_partners(transforms: Sequence[Transform], draws: Draws, num_samples: int) -> Tensor:
    """Return the indices to load for a batch: its own, then those of `partners`, int64.

    Transforms before the one that asked for a partner treat it as a sample, with its own draws.
    """
    for number, transform in reversed(list(enumerate(transforms))):
        if hasattr(transform, "partners"):
            found = transform.partners(draws.within(number), num_samples)
            draws = Draws(draws.seed, draws.epoch, torch.cat([draws.indices, found]), place=draws.place)
    return draws.indices


def described(transform: Transform) -> str:
    """Return a transform's name; with the arguments if it is one of labtrain's."""
    kind = transform if hasattr(transform, "__qualname__") else type(transform)
    return repr(transform) if isinstance(transform, Own) else full_name(kind)


class Own:
    """A transform of labtrain.augment, which draws only from `Draws`."""
