"""Determinism: settings before and after the import of torch, and the seeding of every draw.

======== =================================================================================================
mode     what it does
======== =================================================================================================
off      nothing: after the one initial seed, labtrain changes no variable, flag or global generator
warn     as strict, but an operation without a deterministic kernel warns
strict   deterministic kernels only, a fixed number of CPU threads, every draw a function of (seed, place)
portable strict, and the same bits on every x86-64 CPU: baseline kernels, one thread
======== =================================================================================================

Sources: https://docs.pytorch.org/docs/2.9/notes/randomness.html for the flags; for `portable`, each library's own
switch of its CPU dispatch: ATEN_CPU_CAPABILITY (torch), MKL_CBWR (oneMKL, conditional numerical reproducibility),
ONEDNN_MAX_CPU_ISA (oneDNN), GLIBC_TUNABLES (libm's FMA variants), NPY_DISABLE_CPU_FEATURES (numpy's loops) and
OPENBLAS_CORETYPE (numpy's matrix product).
"""

import hashlib
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from labtrain.base.console import warn
from labtrain.base.contracts import Flags
from labtrain.base.errors import ConfigError
from labtrain.record.sources import FROM_SOURCE

if TYPE_CHECKING:
    import torch

STRICT_MODES = ("strict", "portable")

PORTABLE_VARIABLES = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "OPENBLAS_CORETYPE": "Prescott",
}
# The receipt records every variable that can change bits, whoever set it: all of the libraries that compute ...
RECORDED_PREFIXES = (
    "ATEN_", "BLIS_", "CUBLAS", "CUDNN_", "DNNL_", "GOMP_", "GOTO_", "KMP_", "MKL_", "NCCL_", "NPY_", "OMP_", "ONEDNN_",
    "OPENBLAS_", "PYTORCH_", "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TRITON_",
)  # fmt: skip
RECORDED_VARIABLES = (
    "CUDA_DISABLE_PTX_JIT",
    "CUDA_FORCE_PTX_JIT",
    "DISABLE_ADDMM_CUDA_LT",
    "GLIBC_TUNABLES",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "MKL_DEBUG_CPU_TYPE",
    "NVIDIA_TF32_OVERRIDE",
    "PYTHONHASHSEED",
    "PYTHONOPTIMIZE",
)
# ... except those for file paths, printing, timeouts and networks. sklearn and Lightning set some of these themselves.
NO_BITS = re.compile(
    r"\w+_(?:HOME|DIR|PATH|FILE\w*|CACHE\w*|LOGS?|LOG_\w+|\w*VERBOS\w*|\w*DEBUG\w*|\w*TRACE\w*|\w*TIMEOUT\w*|VERSION"
    r"|ADDR2LINE\w*|CHECK|DISPLAY_\w+|BLOCKTIME|SETTINGS|WARNINGS|WAIT_POLICY|INIT_AT_FORK|DUPLICATE_LIB_OK)"
    r"|TORCH_(?:NCCL|FR|SHOW|DISTRIBUTED)_\w+|NCCL_(?:ASYNC|COMM|CONF|HOSTID|IB|NET|OOB|SOCKET)\w*"
)
# Variables that a training sets in its process if they are not set, until its end.
SET_BY_LABTRAIN = ("CUBLAS_WORKSPACE_CONFIG", "GLOO_SOCKET_IFNAME", FROM_SOURCE)


def variables(mode: str, *, threads: int) -> dict[str, str]:
    """Return the variables that must be in the environment before torch is imported.

    Raises:
        ConfigError: `portable` with more than one thread.
    """
    if mode == "off":
        return {}
    if mode == "portable" and threads != 1:
        raise ConfigError(
            f"determinism.threads={threads}: portable mode needs one thread",
            hint="determinism.threads=1, or determinism.mode=strict",
        )
    wanted = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
    }
    return wanted | PORTABLE_VARIABLES if mode == "portable" else wanted


def is_recorded(name: str) -> bool:
    """Return whether a variable can change bits: the receipt records it, and labtrain compares it."""
    return name in RECORDED_VARIABLES or (name.startswith(RECORDED_PREFIXES) and not NO_BITS.fullmatch(name))


def apply(mode: str, *, threads: int, tf32: bool = False) -> None:
    """Set torch's flags for `mode`, before the model is made; `run` restores them.

    Args:
        mode: determinism.mode.
        threads: determinism.threads.
        tf32: speed.tf32, in any mode. Of torch's settings for it, this one gives no warning, and `flags` can read
            it.

    Raises:
        ConfigError: `portable`, but the process was started without its variables.
    """
    import torch

    if tf32:
        torch.set_float32_matmul_precision("high")
    if mode == "off":
        return
    if mode == "portable":
        absent = [
            f"{key}={value}" for key, value in variables(mode, threads=threads).items() if os.environ.get(key) != value
        ]
        if absent:
            raise ConfigError(
                f"determinism.mode=portable, but this process was started without {' '.join(absent)}",
                hint="start it with train.py, which sets them before torch is imported",
            )
        from labtrain.exact import portable

        portable.install()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS makes its first handle
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=mode == "warn")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    fill_new_memory(on=True)


def fill_new_memory(*, on: bool) -> None:
    """Make torch fill new memory with NaN or the largest integer, in all modes but off.

    Only until the end of a run's first step: code that reads uninitialised memory then always finds NaN. A program that
    does not read such memory has the same bits with and without it, and it made a step of convolutions a tenth slower.
    Source: https://docs.pytorch.org/docs/2.9/deterministic.html.
    """
    import torch.utils.deterministic

    if _run_mode == "off":
        return
    torch.utils.deterministic.fill_uninitialized_memory = on  # type: ignore[attr-defined]  # a property of the module


def flags() -> Flags:
    """Return the current values of torch's flags and variables that can change bits."""
    import torch

    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if is_recorded(name)},
    }


def seed_all(*place: int | str) -> None:
    """Make the global generators of `random`, numpy and torch a function of `place`, such as (seed, "step", 3).

    Uses `torch.default_generator`: `torch.manual_seed` takes 60 microseconds and more, since each call queues a stack
    trace for a CUDA that is not initialised yet (torch/cuda/__init__.py, `_lazy_call`).
    """
    import numpy as np
    import torch

    seed = derive_seed(*place)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def derive_seed(*place: int | str) -> int:
    """Return 63 bits that are a function of `place`: blake2b of its text."""
    key = "\0".join(map(str, place)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def keep_draws() -> Callable[[], None]:
    """Save the states of the global generators of `random`, numpy and torch; calling the result restores them."""
    import numpy as np
    import torch

    python, numpy, torch_state = random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore


_run_seed = 0
_run_mode = "off"
_run_accelerator = "cpu"


_run_say: Callable[[str], None] = warn


def set_run(*, seed: int, mode: str, accelerator: str = "cpu") -> None:
    """Remember the seed, the mode and the accelerator of the run that this process trains."""
    global _run_seed, _run_mode, _run_accelerator
    _run_seed, _run_mode, _run_accelerator = seed, mode, accelerator


def set_say(say: Callable[[str], None]) -> None:
    """Remember the function that prints and records warnings of this run, until its end."""
    global _run_say
    _run_say = say


def run_say(text: str) -> None:
    """Print a warning and record it in the run's receipt; outside of a run, only print it."""
    _run_say(text)


@contextmanager
def run(*, seed: int, mode: str, accelerator: str, threads: int, tf32: bool) -> Iterator[None]:
    """Do `set_run` and `apply` for the time of one training.

    Afterwards this process is outside of a run again. labtrain restores torch's flags, the global generators and its
    own variables, so the rest of a notebook does not depend on the training. In mode off it restores nothing.
    """
    import torch

    run_before, precision = (_run_seed, _run_mode, _run_accelerator), torch.get_float32_matmul_precision()
    put_back = _remembered() if mode != "off" else None
    set_run(seed=seed, mode=mode, accelerator=accelerator)
    try:
        apply(mode, threads=threads, tf32=tf32)
        yield
    finally:
        if put_back is not None:
            put_back()
        if tf32:
            torch.set_float32_matmul_precision(precision)
        set_run(seed=run_before[0], mode=run_before[1], accelerator=run_before[2])
        set_say(warn)


def _remembered() -> Callable[[], None]:
    """Return a function that restores the current flags of `apply` and the global generators."""
    import torch

    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # a property of the module
    absent = [name for name in SET_BY_LABTRAIN if name not in os.environ]
    put_draws_back = keep_draws()

    def put_back() -> None:
        if "labtrain.exact.portable" in sys.modules:
            sys.modules["labtrain.exact.portable"].uninstall()
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        for name in absent:
            os.environ.pop(name, None)
        put_draws_back()

    return put_back


def run_seed() -> int:
    """Return the seed of the run that this process trains; 0 outside of one."""
    return _run_seed


def run_mode() -> str:
    """Return the determinism mode of the run that this process trains; off outside of one."""
    return _run_mode


def run_device() -> "torch.device":
    """Return the device that this process trains on: the GPU that Lightning chose, or the CPU."""
    import torch

    if _run_accelerator == "gpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def seed_place(*place: int | str) -> None:
    """Make the global generators a function of the run's seed and `place`; in mode off leave them alone."""
    if _run_mode != "off":
        seed_all(_run_seed, *place)
