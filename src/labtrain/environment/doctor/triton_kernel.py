"""A kernel for the doctor. It has a file to itself because Triton reads its source, and not every torch has Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _add_one(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(target + offsets, tl.load(source + offsets, mask=mask) + 1, mask=mask)


def add_one(numbers: Tensor) -> Tensor:
    """Return each number plus one, by a kernel that Triton compiles.

    Args:
        numbers: integers on a GPU.
    """
    sums = torch.empty_like(numbers)
    _add_one[(triton.cdiv(numbers.numel(), BLOCK),)](numbers, sums, numbers.numel(), BLOCK=BLOCK)
    return sums
