import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from labtrain.base.errors import ConfigError
from labtrain.exact import determinism
from labtrain.record import receipt
from labtrain.review.inspection import state_differences

GOLDEN = Path(__file__).parents[2] / "golden"


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), np.random.rand()


def test_all_three_generators_are_a_function_of_the_place() -> None:
    determinism.seed_all(1, "step", 5)
    first = draw()
    draw()
    determinism.seed_all(1, "step", 5)
    assert draw() == first
    seen = {first}
    for place in ((1, "step", 6), (2, "step", 5), (1, "epoch", 5), (1, "step", 5, 0)):
        determinism.seed_all(*place)
        seen.add(draw())
    assert len(seen) == 5


def test_places_that_look_alike_when_joined_are_different() -> None:
    assert determinism.derive_seed(1, 23) != determinism.derive_seed(12, 3)


def test_off_sets_nothing() -> None:
    assert determinism.variables("off", threads=4) == {}


@pytest.mark.parametrize("mode", ["warn", "strict", "portable"])
def test_the_other_modes_fix_the_threads_and_the_hash_seed(mode: str) -> None:
    variables = determinism.variables(mode, threads=1)
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "1"
    assert variables["PYTHONHASHSEED"] == "0"
    assert (set(determinism.PORTABLE_VARIABLES) <= set(variables)) == (mode == "portable")


def test_portable_takes_one_thread() -> None:
    with pytest.raises(ConfigError, match=r"determinism\.threads=2: portable mode needs one thread"):
        determinism.variables("portable", threads=2)


def test_portable_is_refused_where_its_variables_came_too_late() -> None:
    """torch has chosen its kernels when it is imported: setting the variables after that would be a pretence."""
    code = "import torch; from labtrain.exact import determinism; determinism.apply('portable', threads=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "portable, but this process was started without" in done.stderr
    assert "ATEN_CPU_CAPABILITY=default" in done.stderr


@pytest.mark.parametrize(("mode", "outcome"), [("off", "ran"), ("warn", "ran"), ("strict", "refused")])
def test_an_operation_without_a_deterministic_kernel(mode: str, outcome: str) -> None:
    code = f"""
import torch
from labtrain.exact import determinism
determinism.apply({mode!r}, threads=1)
try:
    torch.empty(2).put_(torch.tensor([0]), torch.tensor([1.0]), accumulate=False)
    print("ran")
except RuntimeError as error:
    print("refused" if "deterministic" in str(error) else error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == outcome


def test_the_flags_that_can_change_bits_are_recorded() -> None:
    flags = determinism.flags()
    assert {"deterministic_algorithms", "threads", "cpu_capability", "float32_matmul_precision", "variables"} <= set(
        flags
    )
    assert flags["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(("mode", "flag"), [("off", True), ("strict", False)])
def test_the_fill_of_new_memory_is_left_alone_in_off(mode: str, flag: bool) -> None:
    code = f"""
import torch
from labtrain.exact import determinism
determinism.set_run(seed=1, mode={mode!r})
determinism.apply({mode!r}, threads=1)
assert torch.utils.deterministic.fill_uninitialized_memory
determinism.fill_new_memory(on=False)
print(torch.utils.deterministic.fill_uninitialized_memory)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(flag)


@pytest.mark.parametrize(
    "name",
    [
        "DISABLE_ADDMM_CUDA_LT", "LD_LIBRARY_PATH", "MKL_DEBUG_CPU_TYPE", "PYTHONOPTIMIZE", "TORCHDYNAMO_DISABLE",
        "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_DYNAMIC", "MKL_ENABLE_INSTRUCTIONS",
        "ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES", "GLIBC_TUNABLES", "LD_PRELOAD",
        "OMP_NUM_THREADS", "KMP_DETERMINISTIC_REDUCTION", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE",
        "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT", "NCCL_ALGO",
        "TORCH_LINEAR_FLATTEN_3D", "TORCH_CUDNN_USE_HEURISTIC_MODE_B", "PYTORCH_TUNABLEOP_ENABLED", "PYTHONHASHSEED",
        *determinism.variables("portable", threads=1),
    ],
)  # fmt: skip
def test_a_variable_that_can_change_bits_is_in_the_receipt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert determinism.flags()["variables"][name] == "1"


@pytest.mark.parametrize(
    "name",
    [
        "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "TORCH_HOME", "TORCH_LOGS", "TORCHINDUCTOR_CACHE_DIR",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCHELASTIC_RUN_ID", "DNNL_VERBOSE", "MKL_VERBOSE", "KMP_INIT_AT_FORK",
        "PYTORCH_NVML_BASED_CUDA_CHECK", "PYTORCH_VERSION", "CUDA_VISIBLE_DEVICES", "HOME", "TORCH_SHOW_CPP_STACKTRACES",
    ],
)  # fmt: skip
def test_a_variable_that_cannot_change_bits_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher sets some of them, so one run on two devices would be held for two."""
    monkeypatch.setenv(name, "1")
    assert name not in determinism.flags()["variables"]


def test_verify_compares_the_variables_without_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that only this machine has, and one that only the receipt has; labtrain sets its own for each training."""
    golden = receipt.read(GOLDEN)
    assert golden is not None
    for name in filter(determinism.is_recorded, list(os.environ)):
        monkeypatch.delenv(name)

    def told() -> dict[str, tuple[object, object]]:
        found = state_differences(golden, tmp_path, tmp_path)
        start = "determinism.variables."
        return {each.key.removeprefix(start): (each.a, each.b) for each in found if each.key.startswith(start)}

    assert told() == {}
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "SSE41")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    golden["determinism"]["variables"]["ONEDNN_DEFAULT_FPMATH_MODE"] = "BF16"
    assert told() == {"DNNL_MAX_CPU_ISA": (None, "SSE41"), "ONEDNN_DEFAULT_FPMATH_MODE": ("BF16", None)}
