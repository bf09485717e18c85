"""The doctor's kernels, on CPUs as far as these stand in for a GPU, and CUDA's errors in words."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from labtrain.environment.doctor import cuda_errors, kernels, kernels_process
from labtrain.environment.doctor.verdicts import of_conv3d, of_later_wheels
from labtrain.training.speed import costly_convolutions
from tests.conftest import ROOT
from tests.support.waiting import wait_until

NVIDIA = Path(torch.__file__).parents[1] / "nvidia"
CPU = torch.device("cpu")


def test_two_devices_pass_and_equal_results_are_one_line() -> None:
    """Each check that a CPU has, in two processes, and gloo in place of NCCL."""
    found = {check.name: check for check in kernels.checks("cpu", 2, {})}
    assert {name: check.status for name, check in found.items() if check.status != "ok"} == {
        f"CPU 0-1 {name}": "skipped" for name in ("matmul tf32", "Conv3d", "Triton")
    }
    for name in ("memory", "matmul fp32", "matmul bf16", "cuBLAS repeated", "cuDNN", "attention"):
        assert f"CPU 0-1 {name}" in found
    assert found["gloo all-reduce"].found.endswith("GB/s bus bandwidth")
    assert {"gloo send/recv", "P2P copies"} <= set(found)


def running() -> list[psutil.Process]:
    """Return the doctor's processes of this one."""
    return [each for each in psutil.Process().children() if kernels.PROCESS in each.cmdline()]


def test_a_check_that_does_not_end_is_named() -> None:
    """The limit is over before torch is imported."""
    (check,) = kernels.checks("cpu", 1, {}, timeout_s=0.5)
    assert (check.name, check.status) == ("CPU 0 start", "failed")
    assert check.found == "it did not end: no answer in 0.5 seconds"
    assert "dmesg" in check.hint
    assert not running()


def test_a_crash_is_named_with_its_signal() -> None:
    """A card or driver can end a process; the doctor goes on."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(kernels.checks("cpu", 1, {})))
    thread.start()
    wait_until(running)
    running()[0].send_signal(signal.SIGSEGV)
    thread.join()
    (check,) = found
    assert (check.status, check.found) == ("failed", "SIGSEGV")


def flipped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function whose results have one wrong number."""

    def wrong(*arguments: object, **options: object) -> Tensor:
        result = function(*arguments, **options)
        return result.index_add(0, torch.tensor([0]), torch.ones_like(result[:1]))

    return wrong


@pytest.mark.parametrize(
    ("check", "place", "name"),
    [
        (kernels_process.memory, torch.Tensor, "clone"),
        (lambda device: kernels_process.product(device, torch.bfloat16), torch.Tensor, "__matmul__"),
        (kernels_process.convolution, kernels_process.functional, "conv2d"),
        (kernels_process.attention, kernels_process.functional, "scaled_dot_product_attention"),
        (kernels_process.repeated, torch.Tensor, "__matmul__"),
    ],
)
def test_a_wrong_number_is_noticed(
    check: Callable[[torch.device], str], place: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second result has a wrong number."""
    right, calls = getattr(place, name), []

    def sometimes(*arguments: object, **options: object) -> Tensor:
        calls.append(name)
        return (flipped(right) if len(calls) % 2 == 0 or name == "clone" else right)(*arguments, **options)

    monkeypatch.setattr(place, name, sometimes)
    with pytest.raises(kernels_process.WrongError):
        check(CPU)


def test_the_triton_kernel_is_right() -> None:
    """By Triton's interpreter, which needs no GPU."""
    code = (
        "import torch; from labtrain.environment.doctor.triton_kernel import add_one;"
        " print(torch.equal(add_one(torch.arange(5000)), torch.arange(1, 5001)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("number", "says"),
    [(209, "no code for this GPU"), (222, "cannot translate"), (804, "cuda-compat"), (803, "different versions"),
     (802, "NVSwitch"), (35, "older than CUDA 12"), (100, "finds no GPU"), (214, "cannot correct"), (2, "in use"),
     (700, "failed on this GPU"), (719, "failed on this GPU"), (46, "for itself"), (3, "could not start"), (805, "Multi-Process"), (999, "does not answer")],
)  # fmt: skip
def test_errors_of_the_locked_cuda_are_explained(number: int, says: str) -> None:
    """The texts are those of the locked libcudart, so a new one that words them differently fails here."""
    runtime = ctypes.CDLL(str(NVIDIA / "cuda_runtime/lib/libcudart.so.12"))
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    words = cuda_errors.in_words(f"RuntimeError: CUDA error: {runtime.cudaGetErrorString(number).decode()}")
    assert words is not None
    assert says in words.why
    assert words.hint


@pytest.mark.parametrize("number", [1002, 3000, 3007, 5000])
def test_errors_of_the_locked_cudnn_are_explained(number: int) -> None:
    library = ctypes.CDLL(str(NVIDIA / "cudnn/lib/libcudnn.so.9"))
    library.cudnnGetErrorString.restype = ctypes.c_char_p
    assert cuda_errors.in_words(f"cuDNN error: {library.cudnnGetErrorString(number).decode()}") is not None


def test_the_choices_of_nccl_are_read_from_its_log() -> None:
    """The lines have the formats that stand in the locked libnccl."""
    binary = (NVIDIA / "nccl/lib/libnccl.so.2").read_bytes().decode("latin-1")
    algorithm = re.search(r"%s: %ld Bytes -> Algo %s proto %s channel[^\0]*", binary)
    transport = re.search(r"Channel %02d : %d\[%d\] -> %d\[%d\] via SHM/%s/%s", binary)
    peers = re.search(r"Channel %02d/%01d : %d\[%d\] -> %d\[%d\] via P2P/%s[^\0]*", binary)
    assert algorithm
    assert transport
    assert peers
    log = "\n".join(
        f"host:1:2 [0] NCCL INFO {line}"
        for line in (
            algorithm[0].replace("%ld", "%d") % ("AllReduce", 4, "TREE", "LL", 0, 0),
            algorithm[0].replace("%ld", "%d") % ("AllReduce", 268435456, "RING", "SIMPLE", 0, 15),
            transport[0] % (0, 0, 0, 1, 1, "direct", "direct"),
            peers[0].replace("%s", "IPC", 1).replace("%s", "") % (0, 0, 0, 0, 1, 1),
        )
    )
    assert kernels.chosen(log) == "; RING, SIMPLE; via P2P/IPC, SHM"
    assert kernels.chosen("") == ""


def test_spans() -> None:
    assert kernels.spans([0, 1, 2, 5, 7, 6]) == "0-2,5-7"


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "result"),
    [("2.9.1+cu128", (9, 10, 2), "warns"), ("2.9.1", (9, 15, 0), "runs"), ("2.9.0", (9, 15, 0), "warns"),
     ("2.11.0+cu130", (9, 20, 0), "runs"), ("2.10.0", (9, 14, 1), "warns"), ("2.9.1", None, "runs")],
)  # fmt: skip
def test_conv3d_without_cudnn_is_told(torch_version: str, cudnn: tuple[int, ...] | None, result: str) -> None:
    """Of PyTorch's code: no cuDNN from 9.8 to 9.14; in 2.9.0 no later one either."""
    assert of_conv3d(torch_version, cudnn).result == result


def test_a_training_with_conv3d_in_bf16_is_warned() -> None:
    """By the locked cuDNN 9.10.2; a model without Conv3d, and fp32, are not concerned."""
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.ConvTranspose3d(2, 1, 3))
    for precision in ("bf16-mixed", "16-mixed", "bf16-true"):
        said = costly_convolutions(model, precision)
        assert said.startswith(f"0; 2: torch {torch.__version__} does not use cuDNN 9.10.2 for Conv3d")
    assert costly_convolutions(model, "32-true") == costly_convolutions(nn.Conv2d(1, 1, 3), "bf16-mixed") == ""


@pytest.mark.parametrize(
    ("driver", "capability", "last"),
    [("550.54.14", (8, 0), "2.14"), ("570.86.15", (12, 0), "2.11"), ("580.65.06", (7, 0), "2.14"),
     ("580.65.06", (8, 0), ""), ("590.44.01", (12, 1), ""), ("535.183.01", (6, 1), "2.14"), ("575.51.03", (10, 0), "2.11")],
)  # fmt: skip
def test_the_last_pytorch_of_a_driver_and_a_card(driver: str, capability: tuple[int, int], last: str) -> None:
    found = of_later_wheels(driver, capability)
    assert found.result == ("warns" if last else "runs")
    assert f"PyTorch {last} is the last" in found.why or not last


def test_the_process_prints_one_line_for_each_check() -> None:
    """Whoever reads it knows what ran when it crashed."""
    done = subprocess.run([sys.executable, "-m", kernels.PROCESS, "cpu"], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["begin"] for line in lines if "begin" in line] == ["start", *kernels_process.CHECKS]
