"""The tree, alone and in several processes. What a training makes of it is in test_exact.py."""

import os
import socket
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from labtrain.exact import tree_sum as reduction
from labtrain.exact.tree_sum import ShardSum, Tree, _assign, _Bucket, shard_range, shard_ranges, subtrees
from labtrain.record.digests import digest_tree
from tests.support.exact import forkserver

SHAPES = [(3, 5), (7,), (), (2, 3, 4, 4), (11, 2)]


def like() -> list[torch.Tensor]:
    tensors = [torch.zeros(shape) for shape in SHAPES]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    return [*tensors, torch.zeros(6, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.float64)]


def leaf(shard: int) -> list[torch.Tensor]:
    """Numbers of very different size, so that each order of addition has bits of its own."""
    generator = torch.Generator().manual_seed(shard)
    made = []
    for tensor in like():
        values = torch.randn(tensor.shape, generator=generator) * 10.0 ** torch.randint(
            -3, 4, tensor.shape, generator=generator
        )
        made.append(torch.empty_like(tensor).copy_(values))
    return made


def total(leaves: int, rank: int = 0, world: int = 1, bucket_bytes: int = 80) -> list[torch.Tensor]:
    reduction.BUCKET_BYTES = bucket_bytes
    summed = ShardSum(like(), rank=rank, world=world)
    ranges = shard_ranges(leaves, world)
    summed.begin(ranges)
    for shard in ranges[rank]:
        values = leaf(shard)
        # In another order on each rank: gradients come as a backward makes them.
        for number in sorted(range(len(values)), key=lambda number: (number * (rank + 2)) % 7):
            summed.push(shard, number, values[number])
    summed.send()
    return summed.total()


def written_out(leaves: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The same tree, as a recursion: halves at the largest power of two, so that a smaller rest is on the right."""
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << (len(leaves) - 1).bit_length() - 1
    left, right = written_out(leaves[:half]), written_out(leaves[half:])
    return [a + b for a, b in zip(left, right, strict=True)]


@pytest.mark.parametrize("leaves", range(1, 18))
def test_the_sum_is_that_of_the_tree(leaves: int) -> None:
    assert digest_tree(total(leaves)) == digest_tree(written_out([leaf(shard) for shard in range(leaves)]))


def test_another_order_has_other_bits() -> None:
    """Or these tests would prove nothing."""
    one_by_one = leaf(0)
    for shard in range(1, 8):
        one_by_one = [a + b for a, b in zip(one_by_one, leaf(shard), strict=True)]
    assert digest_tree(total(8)) != digest_tree(one_by_one)


def test_a_layout_is_kept() -> None:
    """A norm over a gradient depends on the order of its memory: here channels last, on any number of ranks."""
    summed = total(4)
    assert [tensor.stride() for tensor in summed] == [tensor.stride() for tensor in like()]
    assert summed[3].is_contiguous(memory_format=torch.channels_last)


LEAVES = range(1, 9)


def work(rank: int, world: int, port: int, result: Connection) -> None:
    reduction.WHOLE_BYTES = 100  # some buckets whole, the others in pieces
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {
        f"{leaves} {bucket_bytes}": digest_tree(total(leaves, rank, world, bucket_bytes))
        for leaves in LEAVES
        for bucket_bytes in (80, 1 << 20)
    }
    result.send(found)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_the_same_bits_on_each_rank_of_any_world(world: int) -> None:
    """Any number of shards and of those that have samples; buckets small and large; ranks that have no shard at all."""
    context = forkserver()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [context.Process(target=work, args=(rank, world, port, pipes[rank][1])) for rank in range(world)]
    for process in ranks:
        process.start()
    for _, sender in pipes:
        sender.close()
    found = [receiver.recv() for receiver, _ in pipes]
    for process in ranks:
        process.join(30)
    expected = {
        f"{leaves} {bucket_bytes}": digest_tree(total(leaves)) for leaves in LEAVES for bucket_bytes in (80, 1 << 20)
    }
    assert all(each == expected for each in found)
    assert expected


def test_subtrees_of_a_range() -> None:
    assert subtrees(range(2, 5)) == [(2, 2), (4, 1)]
    assert subtrees(range(5, 8)) == [(5, 1), (6, 2)]
    assert subtrees(range(0, 8)) == [(0, 8)]
    assert subtrees(range(3, 3)) == []


@pytest.mark.parametrize("world", range(1, 9))
def test_the_ranks_share_the_shards(world: int) -> None:
    parts = [list(shard_range(8, rank, world)) for rank in range(world)]
    assert sum(parts, []) == list(range(8))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_rank_0_has_a_shard_of_each_batch() -> None:
    """It knows what is logged, and what a step returns, when other ranks have no shard."""
    assert shard_ranges(1, 4) == [range(0, 1), range(1, 1), range(1, 1), range(1, 1)]
    assert shard_ranges(2, 3) == [range(0, 1), range(1, 2), range(2, 2)]


def test_memory_that_code_still_holds_is_not_used_again() -> None:
    """A gradient that was zeroed in place, or a view of it, keeps its numbers in the next step."""
    bucket = _Bucket([0])
    first = bucket.unused("sums", 4, torch.zeros(1))
    held, address = first[1:3], first.data_ptr()
    del first
    assert bucket.unused("sums", 4, torch.zeros(1)).data_ptr() != address
    assert held.data_ptr() == address + 4
    again = bucket.unused("sums", 4, torch.zeros(1)).data_ptr()
    assert bucket.unused("sums", 4, torch.zeros(1)).data_ptr() == again


def test_a_counter_keeps_few_partial_sums() -> None:
    """At most log2(L) + 1 are alive, however many leaves have come."""
    tree: Tree[torch.Tensor] = Tree(torch.Tensor.add_)
    for number in range(1000):
        tree.push(number, 1, torch.ones(()))
        assert len(tree.nodes) <= 10
    assert tree.root() == 1000


def test_buckets_hold_one_dtype_and_begin_at_the_end() -> None:
    tensors = [torch.zeros(100), torch.zeros(10, dtype=torch.bfloat16), torch.zeros(100), torch.zeros(100)]
    assert _assign(tensors, 800) == [[3, 2], [1], [0]] or _assign(tensors, 800) == [[3, 2], [0], [1]]
    assert sorted(map(sorted, _assign(tensors, 0))) == [[0, 2, 3], [1]]
