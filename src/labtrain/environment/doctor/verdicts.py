"""Which drivers and GPUs run an installed torch, and why: the data of `labtrain doctor` and of docs/reference/gpus.md.

A GPU runs code that was compiled for its own compute capability, or for an earlier minor version of the same major
version. Otherwise the driver compiles the PTX code in the library, if there is any, and only if the driver's CUDA is
not older than the compiler's. Each verdict names its source.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Version = tuple[int, ...]
Result = Literal["runs", "warns", "fails"]

SOURCES = {
    "minor versions": "NVIDIA, CUDA Compatibility, Minor Version Compatibility:"
    " https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html",
    "release notes": "NVIDIA, CUDA Toolkit Release Notes, driver versions and new architectures:"
    " https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/",
    "binaries": "NVIDIA, CUDA C++ Programming Guide, Binary Compatibility and PTX Compatibility:"
    " https://docs.nvidia.com/cuda/cuda-c-programming-guide/",
    "unix drivers": "NVIDIA, Unix graphics feature deprecation schedule, R580 and Maxwell to Volta:"
    " https://nvidia.custhelp.com/app/answers/detail/a_id/3142",
    "cudnn": "NVIDIA, cuDNN support matrix:"
    " https://docs.nvidia.com/deeplearning/cudnn/backend/latest/reference/support-matrix.html",
    "triton": "PyTorch, torch/_inductor/exc.py, GPUTooOldForTriton: compute capability 7.0",
    "assembler": "Triton's ptxas, whose --help lists compute capabilities; triton-lang/triton issue 8539",
    "torch": "the installed torch: torch.cuda.get_arch_list()",
    "wheels": "PyTorch, RELEASE.md; pytorch/pytorch issues 172352 (2.11), 178665 (2.12) and 190385 (2.15), and pull"
    " request 196028 for the day of 2.15",
    "conv3d": "PyTorch, 2.9.1 release notes and pytorch/pytorch issues 163539 and 166643",
}

LEAST_DRIVER: Version = (525, 60, 13)  # for any CUDA 12.x
QUIET_DRIVER: Version = (530, 30, 2)  # CUDA 12.1, which labtrain is made for
LAST_DRIVER_BEFORE_TURING = 580
# It runs every card of the tables: a later one has no support for cards before Turing.
NEWER_DRIVER = "install NVIDIA's driver R580, a long-term branch; the CUDA toolkit need not change"
TURING: Version = (7, 5)
TRITON: Version = (7, 0)
CUDNN_WITHOUT_VOLTA: Version = (9, 11)  # this cuDNN and later ones need compute capability 7.5
# The first CUDA whose driver knows GPUs of this compute capability; the others are older than CUDA 11.
KNOWN_SINCE: dict[Version, Version] = {
    (8, 0): (11, 0), (8, 6): (11, 1), (8, 7): (11, 4), (8, 9): (11, 8), (9, 0): (11, 8),
    (10, 0): (12, 8), (12, 0): (12, 8), (10, 3): (12, 9), (12, 1): (12, 9), (11, 0): (13, 0),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """What an installed torch was built with.

    Attributes:
        cuda: the version of its CUDA compiler and runtime.
        architectures: of torch.cuda.get_arch_list(), such as sm_90 (compiled) and compute_90 (PTX).
        cudnn: the installed cuDNN; None if there is none.
        assembler: the CUDA of Triton's assembler (ptxas), which decides what torch.compile can compile for; None if
            it is not known.
    """

    cuda: Version
    architectures: tuple[str, ...]
    cudnn: Version | None = None
    assembler: Version | None = None

    @property
    def compiled(self) -> list[Version]:
        """The compute capabilities that it has code for."""
        return sorted(_capabilities(self.architectures, "sm"))

    @property
    def ptx(self) -> list[Version]:
        """The compute capabilities that it has PTX code for."""
        return sorted(_capabilities(self.architectures, "compute"))

    def has_code(self, capability: Version) -> bool:
        """Return whether it has compiled code for GPUs of a compute capability."""
        if f"sm_{capability[0]}{capability[1]}a" in self.architectures:  # for this capability alone
            return True
        forward = _capabilities(self.architectures, "sm", only_forward=True)
        return any(major == capability[0] and minor <= capability[1] for major, minor in forward)


# The builds in the locks. The wheels' list is what torch 2.9.1+cu128 prints; conda-forge's is its feedstock's
# TORCH_CUDA_ARCH_LIST of pytorch 2.9.1, build 301.
BUILDS = {
    "wheels, Nix": Build(
        cuda=(12, 8),
        architectures=("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
        cudnn=(9, 10, 2),
        assembler=(12, 8),
    ),
    "conda": Build(
        cuda=(12, 9),
        architectures=("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120",
                       "compute_120"),
        cudnn=(9, 10, 2),
        assembler=(12, 9),
    ),
}  # fmt: skip


# Of the table in docs/reference/gpus.md: drivers with their CUDA, and cards.
DRIVERS: tuple[tuple[str, Version], ...] = (
    ("515.105.01", (11, 7)), ("525.60.13", (12, 0)), ("525.147.05", (12, 0)), ("530.30.02", (12, 1)),
    ("535.183.01", (12, 2)), ("550.54.14", (12, 4)), ("570.86.15", (12, 8)), ("580.65.06", (13, 0)),
    ("590.44.01", (13, 1)),
)  # fmt: skip
CARDS: dict[Version, str] = {
    (5, 2): "GTX 900 series, M40", (6, 1): "GTX 10 series, P40", (7, 0): "V100", (7, 5): "RTX 20 series, T4",
    (8, 0): "A100", (8, 6): "RTX 30 series, A40", (8, 9): "RTX 40 series, L40", (9, 0): "H100, H200",
    (10, 0): "B200", (10, 3): "B300", (12, 0): "RTX 50 series", (12, 1): "GB10 (Arm)",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheels:
    """PyTorch's wheels for one CUDA.

    Attributes:
        build: its CUDA and the compute capabilities that it has code for.
        last: the last release with them.
    """

    build: Build
    last: Version


_TO_HOPPER = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
# The last wheels for a driver of CUDA 12; those for CUDA 13 need R580 and compute capability 7.5.
WHEELS = (
    Wheels(build=Build(cuda=(12, 6), architectures=("sm_50", "sm_60", *_TO_HOPPER)), last=(2, 14)),
    Wheels(build=Build(cuda=(12, 8), architectures=(*_TO_HOPPER[1:], "sm_100", "sm_120")), last=(2, 11)),
    Wheels(build=Build(cuda=(12, 8), architectures=(*_TO_HOPPER, "sm_100", "sm_120")), last=(2, 10)),
)
DRIVER_OF_CUDA_13 = 580
# torch 2.9 goes around these cuDNN in Conv3d: [first, end). Before 2.9 they gave wrong results.
CUDNN_WITHOUT_CONV3D: tuple[Version, Version] = ((9, 8), (9, 15))
CONV3D_HINT = "only for models with Conv3d: cuDNN 9.15, or these layers in fp32: docs/guides/speed.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a combination runs.

    Attributes:
        result: runs, warns or fails.
        why: one sentence.
        hint: what to do; empty if it runs.
        source: a key of SOURCES.
    """

    result: Result
    why: str
    source: str
    hint: str = ""


def of_driver(driver: str, cuda: Version) -> Verdict:
    """Return whether a driver runs programs of CUDA 12.

    Args:
        driver: its version, such as 550.54.14.
        cuda: the CUDA version that it reports.
    """
    number = version_of(driver)
    if cuda < (12, 0) or number < LEAST_DRIVER:
        old = f"; this one is for CUDA {shown(cuda)}, and CUDA 11 ended with PyTorch 2.7" if cuda < (12, 0) else ""
        return Verdict(
            result="fails",
            why=f"programs of CUDA 12 need driver {shown(LEAST_DRIVER)} or later{old}",
            hint=NEWER_DRIVER,
            source="minor versions",
        )
    if number < QUIET_DRIVER:
        return Verdict(
            result="warns",
            why=f"it is older than CUDA 12.1 ({shown(QUIET_DRIVER)}): programs of CUDA 12 run, but not their PTX code",
            hint=NEWER_DRIVER,
            source="minor versions",
        )
    return Verdict(result="runs", why=f"it runs programs of any CUDA 12.x ({shown(cuda)})", source="minor versions")


def of_gpu(driver: str, cuda: Version, capability: Version, build: Build) -> Verdict:
    """Return whether a GPU runs an installed torch under a driver.

    Args:
        driver: its version, such as 550.54.14.
        cuda: the CUDA version that the driver reports.
        capability: the GPU's compute capability.
        build: the installed torch.
    """
    by_driver = of_driver(driver, cuda)
    if by_driver.result == "fails":
        return by_driver
    if capability < TURING and version_of(driver)[0] > LAST_DRIVER_BEFORE_TURING:
        return Verdict(
            result="fails",
            why=f"drivers after R{LAST_DRIVER_BEFORE_TURING} do not support compute capability {shown(capability)}",
            hint=NEWER_DRIVER,
            source="unix drivers",
        )
    known = KNOWN_SINCE.get(capability, (0,))
    if cuda < known:
        return Verdict(
            result="fails",
            why=f"a driver for CUDA {shown(cuda)} does not know compute capability {shown(capability)}, which came with"
            f" CUDA {shown(known)}",
            hint=NEWER_DRIVER,
            source="release notes",
        )
    return _of_code(cuda, capability, build) or by_driver


def of_later_wheels(driver: str, capability: Version) -> Verdict:
    """Return whether PyTorch's later wheels run on a driver and a GPU, or which release is the last.

    Args:
        driver: its version.
        capability: the GPU's compute capability.
    """
    branch = version_of(driver)[0]
    if branch >= DRIVER_OF_CUDA_13 and capability >= TURING:
        return Verdict(result="runs", why="wheels for CUDA 13 run", source="wheels")
    fit = [each for each in WHEELS if each.build.has_code(capability)]
    last = max(fit, key=lambda each: each.last, default=None)
    if last is None:
        return Verdict(result="fails", why="no wheels for CUDA 12 fit", hint=NEWER_DRIVER, source="wheels")
    old = capability < TURING
    return Verdict(
        result="warns",
        why=f"PyTorch {shown(last.last)} is the last with wheels (CUDA {shown(last.build.cuda)}) for compute capability"
        f" {shown(capability)}" + ("" if old else f" and driver R{branch}"),
        hint="conda-lock.yml: conda-forge still builds for such cards; or a newer card" if old else NEWER_DRIVER,
        source="wheels",
    )


def of_conv3d(torch: str, cudnn: Version | None) -> Verdict:
    """Return whether torch uses cuDNN for Conv3d in bf16 and fp16.

    Args:
        torch: its version, such as 2.9.1+cu128.
        cudnn: the installed one; None if there is none.
    """
    first, end = CUDNN_WITHOUT_CONV3D
    release = tuple(map(int, re.findall(r"\d+", torch)[:3]))
    if cudnn is None or cudnn < first or (cudnn >= end and release != (2, 9, 0)):
        return Verdict(result="runs", why="through cuDNN", source="conv3d")
    return Verdict(
        result="warns",
        why=f"torch {torch} does not use cuDNN {shown(cudnn)} for Conv3d in bf16 and fp16: three times the memory of"
        " fp32, and slower",
        hint=CONV3D_HINT,
        source="conv3d",
    )


def _of_code(cuda: Version, capability: Version, build: Build) -> Verdict | None:
    """Return what is wrong with the code that a torch has for a GPU; None if nothing is."""
    built = " ".join(map(shown, build.compiled))
    if not build.has_code(capability):
        if not any(each <= capability for each in build.ptx):
            return Verdict(
                result="fails",
                why=f"torch has code for {built}, none for {shown(capability)} (error 209, no kernel image)",
                hint="create the environment from conda-lock.yml, whose torch has code for it: docs/start/install.md"
                if BUILDS["conda"].has_code(capability)
                else "use another GPU, or a torch that was built for this one",
                source="torch",
            )
        if cuda < build.cuda:
            return Verdict(
                result="fails",
                why=f"torch has only PTX code for {shown(capability)}, and a driver for CUDA {shown(cuda)} cannot"
                f" compile PTX of CUDA {shown(build.cuda)} (error 222)",
                hint=NEWER_DRIVER,
                source="binaries",
            )
        return Verdict(
            result="warns",
            why=f"torch has only PTX code for {shown(capability)}: the driver compiles it at the first start",
            hint="use a torch that was built for this GPU",
            source="binaries",
        )
    if build.cudnn is not None and build.cudnn >= CUDNN_WITHOUT_VOLTA and capability < TURING:
        return Verdict(
            result="fails",
            why=f"cuDNN {shown(build.cudnn)} has no code for {shown(capability)}; 9.10 is the last that has",
            hint="restore the locked cuDNN 9.10.2: make setup, or create the conda environment again",
            source="cudnn",
        )
    return _of_compiler(capability, build)


def _of_compiler(capability: Version, build: Build) -> Verdict | None:
    """Return what stands against torch.compile, which uses Triton, on a GPU; None if nothing does."""
    if capability < TRITON:
        return Verdict(
            result="warns",
            why=f"torch runs on {shown(capability)}, but Triton, which torch.compile uses, needs {shown(TRITON)}",
            hint="speed.compile=false",
            source="triton",
        )
    known = KNOWN_SINCE.get(capability, (0,))
    if build.assembler is not None and build.assembler < known:
        return Verdict(
            result="warns",
            why=f"torch runs on {shown(capability)}, but the assembler of Triton, which torch.compile uses, is of CUDA"
            f" {shown(build.assembler)} and does not know it",
            hint="speed.compile=false; or conda-lock.yml, whose assembler is of CUDA 12.9",
            source="assembler",
        )
    return None


def version_of(driver: str) -> Version:
    """Return the numbers of a driver's version."""
    return tuple(map(int, re.findall(r"\d+", driver)[:3]))


def shown(version: Version) -> str:
    """Return a version as text; a driver's has two digits in each later part."""
    if version[0] > 99:
        return ".".join(f"{number:02}" for number in version)
    return ".".join(map(str, version))


def _capabilities(architectures: Iterable[str], kind: str, *, only_forward: bool = False) -> Iterator[Version]:
    """Yield compute capabilities; `only_forward`: without code that later minor versions cannot run (suffix a)."""
    for name in architectures:
        if (found := re.fullmatch(rf"{kind}_(\d+)(\d)([af]?)", name)) and not (only_forward and found[3] == "a"):
            yield int(found[1]), int(found[2])
