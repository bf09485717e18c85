"""Joins what predict_step returns for each shard to one value for all samples, the same on any number of devices."""

import sys

import torch
from torch import Tensor

from labtrain.base.errors import ConfigError
from labtrain.exact.plain_values import SCALARS


def joined_rows(outputs: list[tuple[int | None, object]]) -> object:
    """Join the outputs of all shards: tensors by rows, lists with an item a sample by items, the rest by their parts.

    Args:
        outputs: (samples, output) of each shard; samples: None if their number is not known.

    Raises:
        ConfigError: an output has another form.
    """
    first = outputs[0][1]
    values = [output for _, output in outputs]
    if not all(type(value) is type(first) for value in values):
        kinds = sorted({type(value).__name__ for value in values})
        raise _not_joinable(f"a {' or a '.join(kinds)}, depending on the shard")
    if isinstance(first, Tensor):
        for samples, tensor in outputs:
            assert isinstance(tensor, Tensor)
            if tensor.dim() == 0 or samples not in (None, len(tensor)):
                raise _not_joinable(f"a tensor of shape {tuple(tensor.shape)} for {samples} samples")
        return torch.cat(values).contiguous()  # type: ignore[arg-type]
    if isinstance(first, dict):
        if not all(value.keys() == first.keys() for value in values):  # type: ignore[attr-defined]
            raise _not_joinable("dicts with different keys")
        return {_alone(key): joined_rows([(samples, value[key]) for samples, value in outputs]) for key in first}  # type: ignore[index]
    if isinstance(first, list) and all(samples == len(value) for samples, value in outputs):  # type: ignore[arg-type]
        items = [item for value in values for item in value]  # type: ignore[attr-defined]
        if all(type(item) in SCALARS or isinstance(item, Tensor) for item in items) and not _have_rows(outputs):
            return [_alone(item) for item in items]
    if isinstance(first, list | tuple) and len({len(value) for value in values}) == 1:  # type: ignore[arg-type]
        parts = (joined_rows([(samples, value[at]) for samples, value in outputs]) for at in range(len(first)))  # type: ignore[index]
        return list(parts) if isinstance(first, list) else tuple(parts)
    raise _not_joinable(f"a {type(first).__name__}")


def _alone(item: object) -> object:
    """Return an item that shares nothing by chance: equal texts are one object, and each tensor has its own memory.

    A file has an object once, so its bytes show which objects were the same.
    """
    if isinstance(item, Tensor):
        return item.clone(memory_format=torch.contiguous_format)
    return sys.intern(item) if type(item) is str else item


def _have_rows(outputs: list[tuple[int | None, object]]) -> bool:
    """Return whether each item of lists is a tensor with a row a sample."""
    return all(
        isinstance(item, Tensor) and item.dim() > 0 and len(item) == samples
        for samples, value in outputs
        for item in value  # type: ignore[attr-defined]
    )


def _not_joinable(what: str) -> ConfigError:
    return ConfigError(
        f"predict_step returned {what}: the outputs of all batches cannot be joined",
        hint="return tensors with a row for each sample, lists with an item for each, or dicts and tuples of those",
    )
