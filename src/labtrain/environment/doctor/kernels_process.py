"""Run one GPU's kernels and compare each result with one that is known: the process that kernels.py starts.

It prints JSON lines: {"begin": name}, and after it {"name", "status", "found"}. So whoever reads them knows what ran
when the process crashed or hung. Matrices hold -1, 0 and 1 and their sums stay below 256, so each format, and each
order of addition, must give the same integers.

Run: python -m labtrain.environment.doctor.kernels_process cuda:0
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

SIZE_BYTES = 256 << 20  # of the memory check
# SDPA's words for a kernel that this device or this torch does not have.
NO_KERNEL = ("No available kernel", "No viable backend")
THROUGH_CUDNN = "through cuDNN"
AMPERE = (8, 0)  # the first with bf16 and TF32
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


class NotHereError(Exception):
    """A check that does not apply to this device."""


class WrongError(Exception):
    """A kernel gave a wrong result."""


class CostlyError(Exception):
    """A kernel is right, but not the one that it should be."""


def memory(device: torch.device) -> str:
    """Write a pattern to the device, copy it there, and read it back."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else SIZE_BYTES
    count = min(SIZE_BYTES, free // 4) // 8
    pattern = torch.arange(count, dtype=torch.int64).mul_(0x9E3779B97F4A7C15 - (1 << 64))
    there = pattern.to(device)
    copied = there.clone()
    if not torch.equal(copied.cpu(), pattern):
        raise WrongError(f"{count * 8 / 1e6:.0f} MB read back differ from what was written")
    return f"{count * 8 / 1e6:.0f} MB written, copied and read back"


def product(device: torch.device, dtype: torch.dtype, *, tf32: bool = False) -> str:
    """Multiply two matrices."""
    if device.type == "cuda" and (tf32 or dtype == torch.bfloat16) and capability(device) < AMPERE:
        raise NotHereError("needs compute capability 8.0")
    if device.type != "cuda" and tf32:
        raise NotHereError("needs a GPU")
    left_MK, right_KN = small(1024, 256), small(256, 1024)
    wanted_MN = left_MK @ right_KN
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        found_MN = left_MK.to(device, dtype) @ right_KN.to(device, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    same(found_MN, wanted_MN, "product")
    return "1024x256 by 256x1024, exact"


def convolution(device: torch.device) -> str:
    """Convolve and differentiate; cuDNN's algorithms may round, so the nearest integers count."""
    images_NCHW, kernels = small(8, 16, 32, 32), small(32, 16, 3, 3)
    wanted, found = (convolved(images_NCHW.to(where), kernels.to(where)) for where in ("cpu", device))
    for name, one, other in zip(("output", "gradient of images", "gradient of kernels"), found, wanted, strict=True):
        same(one.round(), other, name)
    seen = route(images_NCHW.to(device), kernels.to(device))
    if device.type == "cuda" and seen != THROUGH_CUDNN:
        raise WrongError(f"torch convolves {seen}")
    return f"forward and backward, {seen}"


def convolved(images_NCHW: Tensor, kernels: Tensor) -> tuple[Tensor, ...]:
    """Return a convolution and the gradients of its even outputs."""
    images_NCHW, kernels = images_NCHW.clone().requires_grad_(), kernels.clone().requires_grad_()
    output = functional.conv2d(images_NCHW, kernels, padding=1)
    return output.detach(), *(torch.autograd.grad(output[:, ::2].sum(), (images_NCHW, kernels)))


def convolution_3d(device: torch.device) -> str:
    """Compare the memory of a Conv3d in bf16 with one in fp32: with some cuDNN torch goes around it (verdicts.py)."""
    if device.type != "cuda":
        raise NotHereError("needs a GPU")
    if capability(device) < AMPERE:
        raise NotHereError("needs compute capability 8.0")
    peaks, routes = [], []
    for dtype in (torch.float32, torch.bfloat16):
        volumes_NCDHW, kernels = small(1, 16, 32, 64, 64).to(device, dtype), small(16, 16, 3, 3, 3).to(device, dtype)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        functional.conv3d(volumes_NCDHW, kernels, padding=1)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
        routes.append(route(volumes_NCDHW, kernels))
    found = f"bf16 {routes[1]}, with {peaks[1] / peaks[0]:.1f} times the memory of fp32"
    if routes[1] != THROUGH_CUDNN:
        raise CostlyError(found)
    return found


def route(images: Tensor, kernels: Tensor) -> str:
    """Return whether torch convolves through cuDNN.

    Args:
        images: (N, C, H, W) or (N, C, D, H, W).
        kernels: (K, C, H, W) or (K, C, D, H, W).
    """
    ones = [1] * (kernels.ndim - 2)
    zeros = [0] * len(ones)
    backend = str(torch._C._select_conv_backend(images, kernels, None, ones, ones, ones, False, zeros, 1))
    return THROUGH_CUDNN if "cudnn" in backend.lower() else f"without cuDNN ({backend.rpartition('.')[2]})"


def attention(device: torch.device) -> str:
    """Run each kernel of scaled_dot_product_attention that there is, and its backward."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    query = torch.randn(2, 4, 128, 64, generator=torch.Generator().manual_seed(0))
    wanted = functional.scaled_dot_product_attention(query.double(), query.double(), query.double(), is_causal=True)
    ran, absent = [], []
    for name, backend in ATTENTION.items():
        mine = query.to(device, dtype).requires_grad_()
        try:
            with sdpa_kernel(backend):
                found = functional.scaled_dot_product_attention(mine, mine, mine, is_causal=True)
            found.sum().backward()
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_KERNEL):
                raise
            absent.append(name)
            continue
        off = (found.detach().cpu().double() - wanted).abs().max().item()
        if not off < 1e-2 or mine.grad is None or not mine.grad.isfinite().all():
            raise WrongError(f"{name} is off by {off:.2g}")
        ran.append(name)
    return ", ".join(ran) + (f"; not on this device: {', '.join(absent)}" if absent else "")


def repeated(device: torch.device) -> str:
    """Multiply twice with deterministic algorithms; the bits must be equal."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(2048, 2048, generator=generator).to(device) for _ in range(2))
    torch.use_deterministic_algorithms(True)
    try:
        digests = [hashlib.sha256((left @ right).cpu().numpy().tobytes()).hexdigest() for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    if digests[0] != digests[1]:
        raise WrongError(f"two products of the same matrices differ: {digests[0][:12]} and {digests[1][:12]}")
    return f"two products of the same matrices: {digests[0][:12]}"


def compiled(device: torch.device) -> str:
    """Compile a kernel of Triton's and run it."""
    if device.type != "cuda":
        raise NotHereError("needs a GPU")
    if capability(device) < (7, 0):
        raise NotHereError("Triton needs compute capability 7.0")
    from labtrain.environment.doctor import triton_kernel

    numbers = torch.arange(10_000, device=device)
    same(triton_kernel.add_one(numbers), torch.arange(1, 10_001), "sum")
    import triton

    return f"compiled by Triton {triton.__version__}"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "memory": memory,
    "matmul fp32": lambda device: product(device, torch.float32),
    "matmul tf32": lambda device: product(device, torch.float32, tf32=True),
    "matmul bf16": lambda device: product(device, torch.bfloat16),
    "cuBLAS repeated": repeated,
    "cuDNN": convolution,
    "Conv3d": convolution_3d,
    "attention": attention,
    "Triton": compiled,
}


def small(*shape: int) -> Tensor:
    """Return -1, 0 and 1 as float32, the same for the same shape."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def same(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise WrongError unless two tensors hold the same numbers."""
    wrong = int((found.cpu().to(wanted.dtype) != wanted).sum())
    if wrong:
        raise WrongError(f"{wrong} of {wanted.numel()} numbers of the {what} are wrong")


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability."""
    return torch.cuda.get_device_capability(device)


@contextmanager
def caches() -> Iterator[None]:
    """Give Triton an empty cache, so that it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        yield


def said(**fields: object) -> None:
    """Print one line."""
    print(json.dumps(fields), flush=True)


def run(name: str, check: Callable[[torch.device], str], device: torch.device) -> None:
    """Run one check and print its result."""
    said(begin=name)
    try:
        found, status = check(device), "ok"
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except NotHereError as error:
        found, status = str(error), "skipped"
    except CostlyError as error:
        found, status = str(error), "warned"
    except Exception as error:  # a broken driver, library or card may raise anything
        found, status = f"{type(error).__name__}: {' '.join(str(error).split())}", "failed"
    said(name=name, status=status, found=found)


def main(where: str) -> None:
    """Run all checks on a device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    said(begin="start")
    device = torch.device(where)
    torch.zeros(1, device=device)
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""
    said(name="start", status="ok", found="", uuid=uuid)
    with caches():
        for name, check in CHECKS.items():
            run(name, check, device)


if __name__ == "__main__":
    main(sys.argv[1])
