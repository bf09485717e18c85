"""Sums over shards with the same bits on any number of ranks: ONE binary tree over shards 0..L-1, whoever holds them.

Floating-point addition is not associative, so a sum depends on its order, and an all-reduce uses the order of its ring.
Here the order depends only on the number of leaves: leaf 0 + leaf 1, leaf 2 + leaf 3, then those two sums, and so on.
If L is not a power of two, the remaining sums are added from the right.

Each rank holds a contiguous range of leaves and adds those of one subtree in place, like a binary counter: at most
log2(L) + 1 partial sums exist. Across ranks, one rank adds each element. The ranks exchange their subtrees. Each rank
receives its part of every subtree (a reduce-scatter by hand), finishes the tree there, and sends the sums back (an
all-gather). That moves as many bytes as a ring all-reduce, for any number of ranks. Every rank sums a small bucket
itself, along the same tree: one exchange instead of two.

Tensors are exchanged in buckets, as in DistributedDataParallel (S. Li et al., VLDB 2020,
https://arxiv.org/abs/2006.15704). A bucket is sent as soon as the last shard's backward has filled it, always in the
same order, whichever gradient arrives first.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# DistributedDataParallel's sizes: a small first bucket leaves early.
FIRST_BUCKET_BYTES = 1 << 20
BUCKET_BYTES = 25 << 20
# The largest small bucket.
WHOLE_BYTES = 1 << 18

T = TypeVar("T")


def shard_range(shards: int, rank: int, world: int) -> range:
    """Return the shards of `rank`: contiguous, their numbers differ by one at most, and rank 0 has one if any has."""
    return range(-(-shards * rank // world), -(-shards * (rank + 1) // world))


def shard_ranges(shards: int, world: int) -> list[range]:
    """Return the shards of each rank."""
    return [shard_range(shards, rank, world) for rank in range(world)]


@contextmanager
def alone() -> Iterator[None]:
    """Hide the process group: a shard's result must not depend on the number of processes."""
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    group = dist.GroupMember.WORLD
    dist.GroupMember.WORLD = None
    try:
        yield
    finally:
        dist.GroupMember.WORLD = group


class Tree(Generic[T]):
    """Adds leaves in their order along the binary tree: a binary counter of partial sums.

    Args:
        add: adds its second argument to its first, in place.
    """

    def __init__(self, add: Callable[[T, T], object]) -> None:
        self.add = add
        self.nodes: list[tuple[int, int, T]] = []  # first leaf, number of leaves, their sum

    def push(self, first: int, size: int, value: T) -> None:
        """Add the sum of leaves first..first+size-1: the next subtree on the right."""
        while self.nodes:
            left_first, left_size, left = self.nodes[-1]
            if left_size != size or left_first + size != first or left_first % (2 * size):
                break
            self.nodes.pop()
            self.add(left, value)
            first, size, value = left_first, 2 * size, left
        self.nodes.append((first, size, value))

    def root(self) -> T:
        """Return the sum of all leaves."""
        while len(self.nodes) > 1:
            right = self.nodes.pop()[2]
            self.add(self.nodes[-1][2], right)
        return self.nodes[0][2]


def subtrees(leaves: range) -> list[tuple[int, int]]:
    """Return the subtrees, (first leaf, number of leaves) each, that a rank holding `leaves` has the sums of."""
    tree: Tree[None] = Tree(lambda left, right: None)
    for leaf in leaves:
        tree.push(leaf, 1, None)
    return [(first, size) for first, size, _ in tree.nodes]


class ShardSum:
    """Sums a list of tensors over the shards of one step at a time.

    Args:
        like: tensors with the shapes, dtypes, devices and strides of those to be summed.
        rank: this process.
        world: the number of processes.
    """

    def __init__(self, like: Sequence[Tensor], *, rank: int, world: int) -> None:
        self.like, self.rank, self.world = list(like), rank, world
        self._buckets = [_Bucket(indices) for indices in _assign(self.like, BUCKET_BYTES if world > 1 else 0)]
        self._place = {
            index: (bucket, number) for bucket in self._buckets for number, index in enumerate(bucket.indices)
        }
        self._layouts: list[list[tuple[int, int]]] = []
        self._started = self._last = 0

    def begin(self, ranges: list[range]) -> None:
        """Begin a step, in which each rank has the shards of its range: `shard_ranges`."""
        self._layouts = [subtrees(shards) for shards in ranges]
        self._started = 0
        self._last = ranges[self.rank].stop - 1
        for bucket in self._buckets:
            bucket.begin()

    def push(self, shard: int, index: int, tensor: Tensor) -> None:
        """Add one tensor of a shard; its memory may hold the sum. Shards come in order, tensors in any order."""
        like = self.like[index]
        if tensor.stride() != like.stride():  # one layout, whatever the route: a norm over it depends on the layout
            laid_out = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
            tensor = laid_out.copy_(tensor)
        bucket, number = self._place[index]
        bucket.leaf[number] = tensor
        if len(bucket.leaf) < len(bucket.indices):
            return
        bucket.tree.push(shard, 1, [bucket.leaf[number] for number in range(len(bucket.indices))])
        bucket.leaf = {}
        bucket.full = shard == self._last
        if self.world > 1:
            self._start()

    def send(self) -> None:
        """Send the remaining buckets: after the last shard, and on a rank that has no shard in this step.

        Every rank calls it at the same place of a step, so exchanges have one order on all ranks. NCCL needs that.
        """
        if self.world > 1:
            for bucket in self._buckets:
                bucket.full = True
            self._start()

    def total(self) -> list[Tensor]:
        """Return the sums over all shards of all ranks, in the order of `like`; the same bits on every rank.

        Every rank must call `send` before. With several ranks the sums are views of one vector a bucket. A later step
        uses its memory again after all views are gone.
        """
        if self.world == 1:
            return self._in_order(bucket.tree.root() for bucket in self._buckets)
        for bucket in self._buckets:
            self._finish_tree(bucket)
        return self._in_order(self._collect(bucket) for bucket in self._buckets)

    def _in_order(self, sums: Iterable[list[Tensor]]) -> list[Tensor]:
        ordered: list[Tensor] = [torch.empty(0)] * len(self.like)
        for bucket, tensors in zip(self._buckets, sums, strict=True):
            for index, tensor in zip(bucket.indices, tensors, strict=True):
                ordered[index] = tensor
        return ordered

    def _start(self) -> None:
        """Send the full buckets, in order, and start to receive this rank's part of the buckets of other ranks."""
        while self._started < len(self._buckets) and self._buckets[self._started].full:
            bucket = self._buckets[self._started]
            self._started += 1
            first = self.like[bucket.indices[0]]
            numel = sum(self.like[index].numel() for index in bucket.indices)
            pieces = 1 if numel * first.element_size() <= WHOLE_BYTES else self.world
            chunk = -(-numel // pieces)
            mine = [
                _flatten(tensors, bucket.vector(("sent", number), pieces * chunk, first))
                for number, (_, _, tensors) in enumerate(bucket.tree.nodes)
            ]
            bucket.pieces, bucket.numel = pieces, pieces * chunk
            starts = [rank * chunk if pieces > 1 else 0 for rank in range(self.world)]
            bucket.parts = [[part[start : start + chunk] for part in mine] for start in starts]
            bucket.received = [
                bucket.parts[rank]
                if rank == self.rank
                else [bucket.vector((rank, number), chunk, first) for number in range(len(self._layouts[rank]))]
                for rank in range(self.world)
            ]
            operations = []
            for rank in range(self.world):
                if rank != self.rank:
                    operations += [dist.P2POp(dist.isend, part, rank) for part in bucket.parts[rank]]
                    operations += [dist.P2POp(dist.irecv, part, rank) for part in bucket.received[rank]]
            bucket.pending = dist.batch_isend_irecv(operations)

    def _finish_tree(self, bucket: "_Bucket") -> None:
        """Add up this rank's part of all subtrees, and start to exchange the sums."""
        for work in bucket.pending:
            work.wait()
        bucket.sums = bucket.unused("sums", bucket.numel, self.like[bucket.indices[0]])
        sums = bucket.sums.chunk(bucket.pieces)
        mine = sums[self.rank if bucket.pieces > 1 else 0]
        additions = sum(map(len, self._layouts)) - 1

        def add(left: Tensor, right: Tensor) -> None:
            nonlocal additions
            additions -= 1
            torch.add(left, right, out=left if additions else mine)  # the last sum goes to its final place

        tree: Tree[Tensor] = Tree(add)
        for layout, parts in zip(self._layouts, bucket.received, strict=True):
            for (first, size), part in zip(layout, parts, strict=True):
                tree.push(first, size, part)
        root = tree.root()
        if sum(map(len, self._layouts)) == 1:
            mine.copy_(root)
        operations = []
        for rank in range(self.world) if bucket.pieces > 1 else ():
            if rank != self.rank:
                operations.append(dist.P2POp(dist.isend, mine, rank))
                operations.append(dist.P2POp(dist.irecv, sums[rank], rank))
        bucket.pending = dist.batch_isend_irecv(operations) if operations else []

    def _collect(self, bucket: "_Bucket") -> list[Tensor]:
        for work in bucket.pending:
            work.wait()
        assert bucket.sums is not None
        tensors, offset = [], 0
        for index in bucket.indices:
            like = self.like[index]
            tensors.append(bucket.sums.as_strided(like.shape, like.stride(), offset))
            offset += like.numel()
        bucket.begin()
        return tensors


@dataclass
class _Bucket:
    """Tensors that are exchanged at once: of one dtype and device."""

    indices: list[int]
    tree: Tree[list[Tensor]] = field(init=False)
    leaf: dict[int, Tensor] = field(init=False)
    full: bool = field(init=False)
    parts: list[list[Tensor]] = field(init=False)  # by receiving rank: of each subtree of this rank
    received: list[list[Tensor]] = field(init=False)  # by sending rank: of each of its subtrees, this rank's part
    pending: list[dist.Work] = field(init=False)
    pieces: int = field(init=False)  # into how many its sums are cut, one a rank; 1: every rank sums all of it
    numel: int = field(init=False)  # of its sums, padded
    sums: Tensor | None = field(init=False)
    vectors: dict[tuple[str | int, int], Tensor] = field(default_factory=dict)

    def vector(self, key: tuple[str | int, int], numel: int, like: Tensor) -> Tensor:
        """Return the vector of that name: the same memory in each step, for new pages cost more than the sum."""
        if key not in self.vectors:
            self.vectors[key] = like.new_empty(numel)
        return self.vectors[key]

    def unused(self, name: str, numel: int, like: Tensor) -> Tensor:
        """Return such a vector; a new one where code still holds a part of the old: `zero_grad(set_to_none=False)`."""
        vector = self.vectors.pop((name, 0), None)
        if vector is not None and torch._C._storage_Use_Count(vector.untyped_storage()._cdata) == 1:
            self.vectors[name, 0] = vector
        return self.vector((name, 0), numel, like)

    def begin(self) -> None:
        self.tree, self.leaf, self.full = Tree(torch._foreach_add_), {}, False
        self.parts, self.received, self.pending, self.sums = [], [], [], None


def _assign(like: Sequence[Tensor], bucket_bytes: int) -> list[list[int]]:
    """Return the indices of each bucket: from the last tensor to the first, the order in which a backward fills them.

    Args:
        like: the tensors.
        bucket_bytes: the size; 0 for one bucket a dtype and device.
    """
    done: list[list[int]] = []
    filling: dict[object, tuple[list[int], int]] = {}
    for index in reversed(range(len(like))):
        tensor = like[index]
        key = tensor.dtype, tensor.device
        indices, size = filling.pop(key, ([], 0))
        indices.append(index)
        size += tensor.numel() * tensor.element_size()
        if bucket_bytes and size >= (bucket_bytes if done else min(FIRST_BUCKET_BYTES, bucket_bytes)):
            done.append(indices)
        else:
            filling[key] = indices, size
    return done + [indices for indices, _ in filling.values()]


def _flatten(tensors: Sequence[Tensor], flat: Tensor) -> Tensor:
    """Put the tensors' memory, one after the other, in a vector and return it; the rest is zero."""
    parts = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
    used = sum(part.numel() for part in parts)
    torch.cat(parts, out=flat[:used])
    flat[used:].zero_()
    return flat
