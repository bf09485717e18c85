"""Prefetches a batch during the training on the one before: loads it in a thread, or copies it to a GPU."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Item = TypeVar("Item")
Started = TypeVar("Started")


def ahead(items: Iterable[Item], start: Callable[[Item], Started], *, number: int = 1) -> Iterator[Started]:
    """Yield start(item) of each item in turn; it is called `number` items ahead."""
    waiting = []
    for item in items:
        waiting.append(start(item))
        if len(waiting) > number:
            yield waiting.pop(0)
    yield from waiting


def in_thread(load: Callable[[Item], Started], items: Iterable[Item], *, number: int = 1) -> Iterator[Started]:
    """Yield load(item) of each item in turn, as map does; a thread loads `number` items ahead."""
    with ThreadPoolExecutor(1, "labtrain-reader") as reader:
        for loading in ahead(items, lambda item: reader.submit(load, item), number=number):
            yield loading.result()


def on_tensors(function: Callable[[Tensor], object], data: object) -> object:
    """Apply a function to each tensor of a nested batch."""
    return tree_map_only(Tensor, function, data)


class Copies:
    """Copies to one GPU, from page-locked memory.

    Args:
        device: the GPU, whose current stream uses the batches.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def of(self, batches: Iterable[object]) -> Iterator[object]:
        """Yield batches on the GPU: the next copy has started, and the current stream waits for this copy."""
        for copy, copied in ahead(batches, self._start):
            torch.cuda.current_stream(self.device).wait_event(copied)
            on_tensors(self._used, copy)
            yield copy

    def _used(self, tensor: Tensor) -> None:
        """Keep its memory, which belongs to the copying stream, until the current stream is done with it."""
        tensor.record_stream(torch.cuda.current_stream(self.device))

    def _start(self, batch: object) -> tuple[object, torch.cuda.Event]:
        with torch.cuda.stream(self.stream):
            copy = on_tensors(self._copied, batch)
            return copy, self.stream.record_event()

    def _copied(self, tensor: Tensor) -> Tensor:
        locked = tensor.pin_memory() if tensor.is_cpu else tensor
        return locked.to(self.device, non_blocking=True)
