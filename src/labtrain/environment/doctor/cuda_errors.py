"""The errors of CUDA and its libraries in words, each with what to do: https://docs.nvidia.com/cuda/cuda-runtime-api/."""

import re
from dataclasses import dataclass

from labtrain.environment.doctor.verdicts import NEWER_DRIVER

GPUS_IN_CONTAINER = "in a container, start it with --gpus all, and with NVIDIA_DRIVER_CAPABILITIES=compute,utility"


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """An error in words.

    Attributes:
        pattern: of the library's own text; a regular expression.
        why: one sentence.
        hint: what to do.
    """

    pattern: str
    why: str
    hint: str


ERRORS = (
    Words(
        pattern="no kernel image is available",
        why="this torch has no code for this GPU (error 209)",
        hint="see the check of this GPU: its hint names the environment that has code for it",
    ),
    Words(
        pattern="PTX was compiled with an unsupported toolchain",
        why="the driver is older than the compiler of this torch's PTX code, and cannot translate it (error 222)",
        hint=NEWER_DRIVER,
    ),
    Words(
        pattern="forward compatibility was attempted on non supported HW",
        why="a libcuda of cuda-compat was loaded, which works with data centre cards only (error 804)",
        hint="remove cuda-compat's folder from LD_LIBRARY_PATH; on a driver for CUDA 12 nothing here needs it",
    ),
    Words(
        pattern="unsupported display driver / cuda driver combination",
        why="libcuda and the kernel's NVIDIA module have different versions (error 803)",
        hint="reboot after a driver's update; in a container, remove a libcuda that the image brings",
    ),
    Words(
        pattern="system not yet initialized",
        why="the NVSwitch fabric is not ready (error 802)",
        hint="systemctl status nvidia-fabricmanager: it must run, in the driver's version",
    ),
    Words(
        pattern="driver version is insufficient",
        why="the driver is older than CUDA 12 allows, or libcuda is missing (error 35)",
        hint=f"{NEWER_DRIVER}; {GPUS_IN_CONTAINER}",
    ),
    Words(
        pattern="Found no NVIDIA driver|no CUDA-capable device|No CUDA GPUs are available",
        why="CUDA finds no GPU, although the driver's management library lists one",
        hint=f"{GPUS_IN_CONTAINER}; else: ls -l /dev/nvidia*",
    ),
    Words(
        pattern="busy or unavailable",
        why="another process has this GPU for itself (error 46)",
        hint="nvidia-smi -q -d COMPUTE; nvidia-smi -c 0 allows several processes",
    ),
    Words(
        pattern="MPS (?:client|server|daemon)",
        why="CUDA's Multi-Process Service does not answer (error 805 and others)",
        hint="echo quit | nvidia-cuda-mps-control, or unset CUDA_MPS_PIPE_DIRECTORY",
    ),
    Words(
        pattern="initialization error",
        why="CUDA could not start on this GPU (error 3)",
        hint="nvidia-smi; dmesg | grep -i nvidia",
    ),
    Words(
        pattern="uncorrectable ECC error",
        why="this GPU's memory has an error that it cannot correct (error 214)",
        hint="nvidia-smi -q -d ECC,ROW_REMAPPER; reset the GPU, and replace it if the error comes back",
    ),
    Words(
        pattern="illegal memory access|unspecified launch failure|misaligned address|hardware stack error",
        why="a kernel that is right elsewhere failed on this GPU",
        hint="dmesg | grep Xid, and look the number up in NVIDIA's list of Xid errors",
    ),
    Words(
        pattern="out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        why="this GPU's memory is in use",
        hint="nvidia-smi lists the processes that hold it",
    ),
    Words(
        pattern="CUDA unknown error|unknown error",
        why="the driver does not answer, often after the machine slept (error 999)",
        hint="rmmod nvidia_uvm && modprobe nvidia_uvm, or reboot",
    ),
    Words(
        pattern="CUDNN_STATUS_.*VERSION_MISMATCH|Could not load library libcudnn|libcudnn.*cannot open",
        why="cuDNN's parts have different versions, or one is missing",
        hint="restore the locked cuDNN: labtrain doctor names what differs in `packages` and `files`",
    ),
    Words(
        pattern="CUDNN_STATUS_(?:NOT_SUPPORTED|ARCH_MISMATCH|EXECUTION_FAILED)|unable to find an engine",
        why="cuDNN has no kernel for this GPU; 9.11 and later need compute capability 7.5",
        hint="restore the locked cuDNN 9.10.2: make setup, or create the conda environment again",
    ),
    Words(
        pattern="CUBLAS_STATUS_NOT_INITIALIZED",
        why="cuBLAS could not start, mostly because this GPU's memory is in use",
        hint="nvidia-smi lists the processes that hold it",
    ),
    Words(
        pattern="Duplicate GPU detected",
        why="two processes use one GPU, which NCCL refuses",
        hint="one process for each GPU: trainer.devices=1 on a machine with one",
    ),
    Words(
        pattern="no answer in",
        why="it did not end",
        hint="dmesg | grep Xid; between several GPUs also: NCCL_P2P_DISABLE=1 labtrain doctor tells whether P2P hangs",
    ),
    Words(
        pattern="[Tt]imed out|[Tt]imeout",
        why="a GPU did not answer the other ones in time",
        hint="NCCL_P2P_DISABLE=1 labtrain doctor: if this check passes then, turn PCIe ACS off in the BIOS",
    ),
    Words(
        pattern="unhandled (?:system|cuda) error|nccl(?:System|UnhandledCuda|Internal)Error|remote process exited",
        why="NCCL failed, mostly for a lack of shared memory or a driver that refuses P2P",
        hint="see the check `shared memory`; NCCL_P2P_DISABLE=1 labtrain doctor tells whether P2P is the cause",
    ),
    Words(
        pattern="Failed to find C compiler|gcc.*not found",
        why="Triton compiles a launcher in C, and finds no compiler",
        hint="apt-get install gcc; torch.compile needs it, too",
    ),
    Words(
        pattern=r"Python\.h",
        why="Triton compiles a launcher in C, and finds no headers of Python",
        hint="apt-get install python3-dev",
    ),
    Words(
        pattern="[Pp]txas",
        why="Triton's assembler does not know this GPU",
        hint="use a newer torch, or speed.compile=false",
    ),
)


def in_words(text: str) -> Words | None:
    """Return an error in words; None for one that is not in the list.

    Args:
        text: what a library said.
    """
    return next((each for each in ERRORS if re.search(each.pattern, text)), None)
