"""The same bits on every x86-64 CPU, for `determinism.mode=portable`: the part that no environment variable can set.

labtrain turns off two libraries, since torch decides by the CPU whether they run: oneDNN (bf16) and NNPACK (AVX2).

labtrain replaces some element-wise functions. torch computes them with oneMKL's vector math, whose baseline code starts
from RSQRTPS and RCPPS. Each CPU may approximate these in its own way (12 bits are guaranteed). An emulator gives other
values than Intel, and MKL_CBWR=COMPATIBLE does not change that. 13 of 100 float32 square roots, and so each step of
Adam, then differ between a CPU of 2023 and an emulated one of 2008. Here numpy computes them: SQRTPS, which IEEE 754
defines to the last bit, and libm for the rest.

MKL's Cholesky decomposition of float32 starts in the same way, for matrices of 5 to 16 rows. labtrain computes it in
float64, which has no such instruction, and rounds.

Found by running the same operations natively and under `qemu-x86_64 -cpu Nehalem`
(tests/full/exact/test_portable.py).
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

# The operations that differed; exp, sin, cos, tanh, erf and the others tried did not.
FUNCTIONS: dict[str, np.ufunc] = {
    "sqrt": np.sqrt,
    "log": np.log,
    "log2": np.log2,
    "log10": np.log10,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
}

POWERS: dict[float, Callable[[torch.Tensor], torch.Tensor]] = {
    0.5: torch.sqrt,
    -0.5: torch.rsqrt,
    2: lambda x: x * x,
    3: lambda x: x * x * x,
    -1: torch.reciprocal,
    -2: lambda x: torch.reciprocal(x * x),
}

# Operations computed in float64: (the operation, its variant that writes to a given tensor).
IN_DOUBLE = (("linalg_cholesky_ex", "linalg_cholesky_ex.L"), ("cholesky", "cholesky.out"))

Kernel = Callable[..., torch.Tensor]

_library: torch.library.Library | None = None
_before: tuple[bool, bool] = (True, True)  # whether oneDNN and NNPACK were on


def install() -> None:
    """Switch off oneDNN and NNPACK, and replace torch's CPU kernels of FUNCTIONS, powers (x ** 0.5) and IN_DOUBLE."""
    global _library, _before
    if _library is not None:
        return
    _before = torch.backends.mkldnn.set_flags(False)[0], torch.backends.nnpack.set_flags(False)[0]
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, function in FUNCTIONS.items():
            _replace(_library, partial(_by_numpy, function), name, f"{name}_", f"{name}.out")
        _replace(_library, _power, "pow.Tensor_Scalar", "pow_.Scalar", "pow.Tensor_Scalar_out")
        for name, out_variant in IN_DOUBLE:
            _compute_in_double(_library, name, out_variant)


def uninstall() -> None:
    """Restore what `install` changed; do nothing if it was not called."""
    global _library
    if _library is not None:
        torch.backends.mkldnn.set_flags(_before[0])
        torch.backends.nnpack.set_flags(_before[1])
        _library._destroy()
        _library = None


def _replace(library: torch.library.Library, kernel: Kernel, functional: str, in_place: str, out_variant: str) -> None:
    def compute_in_place(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        return x.copy_(kernel(x, *arguments))

    def compute_out(x: torch.Tensor, *arguments: object, out: torch.Tensor) -> torch.Tensor:
        return out.resize_(x.shape).copy_(kernel(x, *arguments))

    library.impl(functional, kernel, "CPU", allow_override=True)
    library.impl(in_place, compute_in_place, "CPU", allow_override=True)
    library.impl(out_variant, compute_out, "CPU", allow_override=True)


def _compute_in_double(library: torch.library.Library, name: str, out_variant: str) -> None:
    own, keys = torch.library.get_kernel(f"aten::{name}", "CPU"), torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def compute(x: torch.Tensor, *arguments: object, **options: object) -> Any:
        if x.dtype != torch.float32:
            return own.call_boxed(keys, x, *arguments, **options)
        found = own.call_boxed(keys, x.double(), *arguments, **options)
        return found.float() if isinstance(found, torch.Tensor) else (found[0].float(), *found[1:])

    def compute_out(x: torch.Tensor, *arguments: object, **options: Any) -> object:
        places = [options.pop(key) for key in ("out", "L", "info") if key in options]
        found = compute(x, *arguments, **options)
        for place, each in zip(places, [found] if isinstance(found, torch.Tensor) else found, strict=True):
            place.resize_(each.shape).copy_(each)
        return places[0] if len(places) == 1 else tuple(places)

    library.impl(name, compute, "CPU", allow_override=True)
    library.impl(out_variant, compute_out, "CPU", allow_override=True)


def _by_numpy(function: np.ufunc, x: torch.Tensor) -> torch.Tensor:
    dtype = x.dtype if x.is_floating_point() or x.is_complex() else torch.get_default_dtype()
    wide = (
        torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    )  # as torch does, and numpy has no bfloat16
    with np.errstate(all="ignore"):
        y = function(x.detach().to(wide).resolve_conj().resolve_neg().numpy())
    return torch.from_numpy(np.asarray(y)).to(dtype)


def _power(x: torch.Tensor, exponent: float) -> torch.Tensor:
    # The cases of ATen's pow_tensor_scalar_kernel (aten/src/ATen/native/cpu/PowKernel.cpp), which calls sqrt's own
    # kernel for 0.5; any other exponent goes to the kernel of two tensors.
    if x.dtype in (torch.float16, torch.bfloat16):
        return _power(x.float(), exponent).to(x.dtype)
    if x.is_floating_point() and exponent in POWERS:
        return POWERS[exponent](x)
    dtype = torch.result_type(x, exponent)
    return torch.pow(x.to(dtype), torch.tensor(exponent, dtype=dtype))
