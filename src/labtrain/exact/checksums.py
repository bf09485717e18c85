"""Fast checksums of tensors for the trail: two sums over the tensors' hashes, in 128 bits.

With h_i the 64-bit hash of tensor i, they are the sum of h_i and the sum of (2i+1)*h_i, modulo 2^64. If only one tensor
differs between two runs, the second difference is (2i+1) times the first, so the two numbers identify it (trail.py
`differing_tensor`). So a step's line stays short, whatever the number of tensors. It is the weighted checksum of
fault-tolerant matrix computations (Huang and Abraham, 1984, https://doi.org/10.1109/TC.1984.1676475).

On the CPU a hash is xxh3_64; on a GPU it is an integer sum, computed there without waiting.
"""

import functools
import struct
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.tensor import DTensor

from labtrain.record.digests import components, tensor_bytes

MASK = (1 << 64) - 1
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}  # by size in bytes
BLOCK = 1 << 22  # numbers of a tensor that are summed at once: 70 MB of scratch memory


def two_sums(tensors: Iterable[tuple[int, torch.Tensor]], *, spread: bool = False) -> torch.Tensor:
    """Return the two sums over tensors' hashes: int64, shape (2,), where the tensors are.

    Args:
        tensors: each with its number.
        spread: each rank has a part of some of them; call it on all ranks at once, and all get the same sums.
    """
    pairs = [
        (index, part)
        for index, tensor in tensors
        for part in components(tensor.to_local() if isinstance(tensor, DTensor) else tensor).values()
    ]
    device = next((tensor.device for _, tensor in pairs if not tensor.is_cpu), None)
    if device is None:
        hashes = [xxhash.xxh3_64_intdigest(tensor_bytes(tensor)) for _, tensor in pairs]
        if spread:
            hashes = _of_all_ranks(hashes)
        numbers = (
            _signed(sum(hashes)),
            _signed(sum((2 * index + 1) * hash_ for (index, _), hash_ in zip(pairs, hashes, strict=True))),
        )
        return torch.tensor(numbers, dtype=torch.int64)
    there = torch.stack([device_hash(tensor.to(device)) for _, tensor in pairs])
    if spread:
        there = torch.tensor([_signed(hash_) for hash_ in _of_all_ranks(there.tolist())], device=device)
    odd = torch.tensor([2 * index + 1 for index, _ in pairs]).to(device, non_blocking=True)
    return torch.stack([there.sum(), (there * odd).sum()])


def first_unlike(named: Sequence[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first tensor that differs between ranks; called on all of them at once.

    Args:
        named: the same names on each rank.
    """
    sums = two_sums(enumerate(tensor for _, tensor in named))
    if named and not named[0][1].is_cpu:
        sums = sums.to(named[0][1].device)
    gathered = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, sums)
    if all(each.tolist() == gathered[0].tolist() for each in gathered):
        return None
    hashes: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(hashes, [int(two_sums([(0, tensor)])[0]) for _, tensor in named])
    return next(name for (name, _), each in zip(named, zip(*hashes, strict=True), strict=True) if len(set(each)) > 1)


def unlike_names(values: Mapping[str, str], device: torch.device) -> list[str]:
    """Return the names whose texts differ between ranks, or that only some ranks have; called on all ranks at once.

    The ranks exchange one number, and the texts only if it differs.

    Args:
        values: a text by name; a name with an empty text on any rank is left out.
        device: of the exchange.
    """
    digest = xxhash.xxh3_64_intdigest(repr(sorted(values.items())).encode(errors="surrogateescape"))
    number = torch.tensor([_signed(digest)], device=device)
    gathered = [torch.empty_like(number) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, number)
    if len({int(each) for each in gathered}) == 1:
        return []
    ranks: list[Mapping[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, dict(values))
    names = sorted(set().union(*ranks))
    found = {name: {each.get(name) for each in ranks} for name in names}
    return [name for name, texts in found.items() if len(texts) > 1 and "" not in texts]


def device_hash(tensor: torch.Tensor) -> torch.Tensor:
    """Return an int64 scalar that depends on every bit of `tensor`, computed where the tensor is.

    A weighted sum modulo 2^64 of its elements' bits as integers: no order of summation can matter. Three kernels for
    each block, since a model has hundreds of tensors and each kernel is a launch.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(INTEGERS[tensor.element_size()])
    weights = _weights(tensor.device)
    sums = [
        (block.to(torch.int64) * weights[: block.numel()]).sum() * (2 * number + 1)
        for number, block in enumerate(raw.split(BLOCK))
    ]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    """Return the weights of a block's numbers: odd, so that each bit reaches the sum; 32 MB, kept on the device."""
    odd = torch.arange(1, 2 * BLOCK, 2, device=device)
    return odd * (odd ^ 0x5DEECE66C)


def shown_sums(sums: Sequence[int], *, bits: int = 64) -> str:
    """Return two sums as hex digits, of their lower `bits` bits each."""
    return "".join(f"{number & ((1 << bits) - 1):0{bits // 4}x}" for number in sums)


def _of_all_ranks(hashes: list[int]) -> list[int]:
    """Return one hash a tensor, from the hashes of its parts on each rank."""
    parts: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, hashes)
    columns = zip(*parts, strict=True)
    return [xxhash.xxh3_64_intdigest(b"".join(struct.pack("<Q", part & MASK) for part in column)) for column in columns]


def _signed(number: int) -> int:
    number &= MASK
    return number - (1 << 64) if number >> 63 else number
