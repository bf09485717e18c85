"""The sums of the trail: each bit, the order and the place reach them, on the CPU and as a GPU computes them."""

import pytest
import torch

from labtrain.exact import checksums
from labtrain.exact.checksums import device_hash, shown_sums, two_sums
from labtrain.record.digests import tensor_bytes


def digest(*tensors: torch.Tensor) -> str:
    return shown_sums(two_sums(enumerate(tensors)).tolist())


def test_every_bit_of_every_weight_reaches_the_sums() -> None:
    """One flipped bit, anywhere: the CPU's hash differs, and so does the one that is computed on a GPU."""
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    here, there = {digest(x)}, {device_hash(x).item()}
    for index in range(x.numel()):
        for bit in (0, 1, 22, 23, 30):
            y = x.clone()
            y.view(-1).view(torch.int32)[index] ^= 1 << bit
            here.add(digest(y))
            there.add(device_hash(y).item())
    assert len(here) == len(there) == 1 + x.numel() * 5


def test_a_sum_knows_order_and_place() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    assert digest(x, y) != digest(y, x)
    assert device_hash(x) != device_hash(y)
    assert device_hash(torch.empty(0)) == 0
    assert len(digest(x)) == 32


def test_a_tensor_of_any_dtype_and_layout_has_a_hash_of_its_values() -> None:
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.complex64,
        torch.complex128,
    ):
        x = (torch.arange(24).view(4, 6) % 5 % 2).to(dtype)
        assert device_hash(x.t().contiguous().t()) == device_hash(x)
        assert digest(x.t().contiguous().t()) == digest(x)
        assert device_hash(x[:2]) != device_hash(x[2:])
        for y in (x, x.t(), x[0, 0], x[:0], torch.nn.Parameter(x, requires_grad=x.is_floating_point())):
            assert bytes(tensor_bytes(y)) == bytes(y.detach().contiguous().untyped_storage())[: y.nbytes]


def test_a_large_tensor_is_summed_in_blocks_that_know_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two equal blocks exchanged, or one bit of any of them flipped, the hash is another."""
    monkeypatch.setattr(checksums, "BLOCK", 100)
    checksums._weights.cache_clear()
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    found = {device_hash(x).item(), device_hash(torch.cat([x[100:200], x[:100], x[200:]])).item()}
    for index in range(0, 1000, 7):
        y = x.clone()
        y.view(torch.int32)[index] ^= 1 << (index % 32)
        found.add(device_hash(y).item())
    assert len(found) == 2 + len(range(0, 1000, 7))
    checksums._weights.cache_clear()
