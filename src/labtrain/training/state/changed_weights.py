"""Weights that code in a step changes: a target network, a momentum encoder, an average, weights that are clamped.

Each shard of a step starts from the same weights, so an equal change of all shards counts once, as without shards. For
this labtrain keeps a copy of the weights that a step may change:

- in the first step of a process all of them, up to MOST_BYTES;
- later those that a step has changed, and those that no optimizer updates, unless they are larger than the rest.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from labtrain.exact.buffers import broadcast
from labtrain.exact.checksums import device_hash
from labtrain.record.digests import tensor_bytes
from labtrain.training.state.undo import same_bits

MOST_BYTES = 1 << 30
EXACT_INTEGERS = (1 << 52) - 1  # ranks exchange checksums as float64


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a weight, with the memory that holds it and the version that autograd has noted."""

    memory: Tensor
    values: Tensor
    version: int

    @classmethod
    def of(cls, weight: Tensor) -> "Content":
        """Copy what a weight holds."""
        return cls(weight.data, weight.detach().clone(), weight._version)

    def is_in(self, weight: Tensor, *, thorough: bool) -> bool:
        """Return whether a weight has this content; unless thorough, by its memory's address and its version."""
        if weight.data_ptr() != self.memory.data_ptr() or weight.shape != self.memory.shape:
            return False
        if weight._version != self.version:
            return False
        return not thorough or same_bits(weight.data, self.values)

    def put_into(self, weight: Tensor) -> None:
        """Give a weight this content, as if nothing had written to it since."""
        if weight.data_ptr() != self.memory.data_ptr() or weight.shape != self.memory.shape:
            weight.data = self.memory
        self.memory.copy_(self.values)
        torch._C._autograd._unsafe_set_version_counter((weight,), (self.version,))


@dataclass(frozen=True, slots=True)
class Taken:
    """What one shard has made of some weights, by their number.

    Attributes:
        contents: of the changed weights.
        changes: the number, from 1, of the first one, and a checksum that is the same on every rank; or zeros.
    """

    contents: dict[int, Content] = field(default_factory=dict)
    changes: tuple[int, int] = (0, 0)


class ChangedWeights:
    """Keeps the weights that steps change.

    Args:
        device: of the training.
        rank: this process.
        world: the number of processes.
    """

    def __init__(self, device: torch.device, *, rank: int, world: int) -> None:
        self.device, self.rank, self.world = device, rank, world
        self.weights: Sequence[Tensor] = ()
        self._bases: dict[int, Content] = {}  # by the weight's number
        self._ever: set[int] = set()  # ids of weights that a step has changed
        self._silent: set[int] = set()  # and raised no version
        self._chosen_ids: list[int] = []
        self._steps = 0

    @property
    def kept(self) -> set[int]:
        """The numbers of the weights that a step may change."""
        return set(self._bases)

    def begin(self, weights: Sequence[Tensor], updated: Iterable[Tensor]) -> None:
        """Begin a step.

        Args:
            weights: of the model.
            updated: those that the optimizers hold.
        """
        chosen_before = self._steps > 1 and self.weights is weights and self._ever <= set(self._chosen_ids)
        self._steps += 1
        self.weights = weights
        if not chosen_before:
            chosen = self._choose(updated)
            self._chosen_ids = [id(weights[number]) for number in chosen]
            self._bases = {number: Content.of(weights[number]) for number in chosen}
        self.rebase()

    def rebase(self) -> None:
        """Take what the weights hold now as what each shard starts from."""
        for number, base in self._bases.items():
            weight = self.weights[number]
            if not base.is_in(weight, thorough=self._is_thorough(weight)):
                self._bases[number] = Content.of(weight)

    def take(self) -> Taken:
        """Put the weights back to what the shard started from; return what it has made of them."""
        taken = self.left()
        for number in taken.contents:
            self._bases[number].put_into(self.weights[number])
        return taken

    def put(self, taken: Taken) -> None:
        """Give the weights what a shard has made of them."""
        for number, content in taken.contents.items():
            content.put_into(self.weights[number])

    def left(self) -> Taken:
        """Return what a shard has made of the weights."""
        contents = {number: Content.of(self.weights[number]) for number in self._changed()}
        return Taken(contents, (min(contents, default=-1) + 1, _checksum(contents)))

    def restore(self) -> None:
        """Begin another shard of the step."""
        for number in self._changed():
            self._bases[number].put_into(self.weights[number])

    def share(self, source: int) -> None:
        """Send what the shards of one rank have changed to ranks without a shard; called on every rank."""
        sent: list[list[int] | None] = [self._changed() if self.rank == source else None]
        dist.broadcast_object_list(sent, src=source)
        for number in sent[0] or ():
            broadcast(self.weights[number].data, src=source)

    def _changed(self) -> list[int]:
        found = []
        for number, base in self._bases.items():
            weight = self.weights[number]
            if not base.is_in(weight, thorough=self._is_thorough(weight)):
                found.append(number)
                self._ever.add(id(weight))
                if base.is_in(weight, thorough=False):
                    self._silent.add(id(weight))
        return found

    def _is_thorough(self, weight: Tensor) -> bool:
        """Return whether to compare a weight's content: on a GPU that waits for it."""
        return weight.is_cpu or self._steps == 1 or id(weight) in self._silent

    def _choose(self, updated: Iterable[Tensor]) -> list[int]:
        """Return the numbers of the weights to keep."""
        usable = [number for number, weight in enumerate(self.weights) if _has_own_memory(weight)]
        sizes = {number: self.weights[number].nbytes for number in usable}
        if self._steps == 1 and sum(sizes.values()) <= MOST_BYTES:
            return usable
        trained = {id(weight) for weight in updated if weight.requires_grad}
        others = [number for number in usable if id(self.weights[number]) not in trained]
        if 2 * sum(sizes[number] for number in others) > sum(sizes.values()):
            others = []
        return sorted({*others, *(number for number in usable if id(self.weights[number]) in self._ever)})


def _has_own_memory(weight: Tensor) -> bool:
    """Return whether a weight's elements fill its memory, each once."""
    return weight.layout == torch.strided and torch.empty_like(weight, device="meta").stride() == weight.stride()


def _checksum(contents: dict[int, Content]) -> int:
    """Return a checksum that is the same on every rank; 0 if nothing was changed."""
    if not contents:
        return 0
    parts = [
        (number, int(device_hash(each.values)) if each.values.is_cuda else zlib.crc32(tensor_bytes(each.values)))
        for number, each in contents.items()
    ]
    return 1 + (zlib.crc32(repr(parts).encode()) & EXACT_INTEGERS)
