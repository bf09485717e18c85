"""Takes torch's DataLoader for what it says: the same dataset, batches and workers, in labtrain's exact loader."""

from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)
from torch.utils.data import DataLoader as TorchDataLoader

from labtrain.data.loader import WORKERS, DataLoader

ITERATES = ("__iter__", "_get_iterator")  # a subclass with one of its own iterates in its own way


def exact(loader: object) -> object:
    """Return an exact loader for a DataLoader of torch with a map-style dataset; anything else as it came.

    A subclass counts as torch's unless it iterates in a way of its own.
    """
    if not isinstance(loader, TorchDataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if any(getattr(type(loader), name) is not getattr(TorchDataLoader, name) for name in ITERATES):
        return loader
    options = {name: getattr(loader, name) for name in (*WORKERS, "num_workers")}
    options["pin_memory"] = loader.pin_memory and torch.cuda.is_available()
    options["generator"] = loader.generator
    if loader.batch_sampler is None and not isinstance(loader.sampler, BatchSampler):
        return loader  # the dataset makes the batches
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, None, sampler=loader.sampler, collate_fn=loader.collate_fn, **options)
    options["collate_fn"] = None if loader.collate_fn is default_collate else loader.collate_fn
    batches: Any = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return DataLoader(loader.dataset, batch_sampler=batches, **options)
    options |= {"batch_size": batches.batch_size, "drop_last": batches.drop_last}
    sampler = batches.sampler
    if type(sampler) is SequentialSampler:
        return DataLoader(loader.dataset, **options)
    if _shuffles(sampler, loader):
        return DataLoader(loader.dataset, shuffle=True, **options)
    return DataLoader(loader.dataset, sampler=sampler, **options)


def _shuffles(sampler: Any, loader: TorchDataLoader[object]) -> bool:
    """Return whether a sampler is what shuffle=True makes."""
    return (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.generator is None
        and loader.generator is None
        and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
        and len(sampler.data_source) == sampler.num_samples
    )
