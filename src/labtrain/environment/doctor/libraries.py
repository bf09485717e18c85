"""Check torch and the CUDA libraries that it loads, in a separate process with a time limit."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from labtrain.base.console import few
from labtrain.base.contracts import Options
from labtrain.base.errors import DamagedError
from labtrain.environment.doctor.environment import REPAIR
from labtrain.environment.doctor.processes import run_together
from labtrain.environment.doctor.report import Check, judged, skipped
from labtrain.environment.doctor.verdicts import Build
from labtrain.environment.lock import Pin
from labtrain.record.identity import route

GROUP = "libraries"
TIMEOUT_S = 120.0
# /proc/self/maps shows the files that the dynamic linker really loaded.
PROBE = """
import json, torch
found = {"torch": torch.__version__, "CUDA runtime": torch.version.cuda, "GPUs": torch.cuda.device_count()}
if torch.version.cuda:
    number = torch.backends.cudnn.version()
    found["cuDNN"] = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    # torch.cuda.get_arch_list() says nothing on a machine without a GPU.
    found["architectures"] = (torch._C._cuda_getArchFlags() or "").split()
    try:
        from triton import knobs
        found["assembler"] = knobs.nvidia.ptxas.version
    except Exception:  # no Triton, or its assembler is in another place
        pass
with open("/proc/self/maps") as maps:
    found["loaded"] = sorted({line.split()[-1] for line in maps if "/libcu" in line or "/libnccl" in line})
print(json.dumps(found))
"""
# What the probe reports, and the locked distribution with the expected version.
PROBED = {
    "torch": "torch",
    "CUDA runtime": "nvidia-cuda-runtime-cu12",
    "cuDNN": "nvidia-cudnn-cu12",
    "NCCL": "nvidia-nccl-cu12",
}
DRIVER_LIBRARY = "libcuda.so"


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """What a process found that imported torch.

    Attributes:
        found: versions by name, and the files that it loaded; empty if it could not import torch.
        reason: why it could not.
    """

    found: Options
    reason: str

    @property
    def build(self) -> Build | None:
        """What torch was built with; None if it cannot be imported, or is a build for CPUs."""
        if not self.found.get("CUDA runtime"):
            return None
        cuda, cudnn = (tuple(map(int, self.found[name].split("."))) for name in ("CUDA runtime", "cuDNN"))
        numbers = re.findall(r"\d+", str(self.found.get("assembler") or ""))[:2]
        return Build(
            cuda=cuda[:2], architectures=tuple(self.found["architectures"]), cudnn=cudnn,
            assembler=tuple(map(int, numbers)) or None,
        )  # fmt: skip


def probe(*, python: str = sys.executable, timeout_s: float = TIMEOUT_S) -> Probed:
    """Import torch in its own process, and ask it for its versions."""
    (ended,) = run_together([[python, "-c", PROBE]], timeout_s)
    if ended.code is None:
        return Probed(found={}, reason=f"no answer in {timeout_s:.0f} seconds")
    if ended.code:
        return Probed(found={}, reason=(ended.errors.strip().splitlines() or [ended.reason])[-1])
    try:
        return Probed(found=json.loads(ended.output), reason="")
    except ValueError:
        return Probed(found={}, reason="unexpected output")


def checks(pins: dict[str, Pin], probed: Probed, forge: Mapping[str, str] | None = None) -> Iterator[Check]:
    """Yield the group's checks: compare the loaded versions with the lock.

    Args:
        pins: of requirements.lock.
        probed: what torch loaded.
        forge: in a conda environment, the versions in its lock, by the names of PROBED.
    """
    found, reason = probed.found, probed.reason
    if not found:
        yield judged(
            GROUP, "torch", False, reason, "a torch that can be imported", explain_missing(reason) or REPAIR[route()]
        )
        return
    for name, distribution in PROBED.items():
        wanted = pins[distribution].version if distribution in pins else None
        wanted = wanted if forge is None else forge.get(name)
        value = found.get(name)
        if value is None or wanted is None:
            yield skipped(GROUP, name, value or "not in this build", wanted or "not locked")
            continue
        yield judged(GROUP, name, f"{wanted}.".startswith(f"{value.split('+')[0]}."), value, wanted, REPAIR[route()])
    prefix = str(Path(sys.prefix).resolve())
    outside = [
        path
        for path in found["loaded"]
        if not str(Path(path).resolve()).startswith(prefix) and DRIVER_LIBRARY not in path
    ]
    count = f"{len(found['loaded'])}, all from this environment"
    yield judged(
        GROUP,
        "CUDA libraries",
        not outside,
        few(outside) or count,
        "from this environment",
        "unset LD_PRELOAD LD_LIBRARY_PATH",
    )


def of_conda(folder: Path) -> dict[str, str] | None:
    """Return the versions in the conda lock of this environment; None if it is not conda's, empty without a lock."""
    from labtrain.environment.lock.derive import stack

    if not route().startswith("conda"):
        return None
    try:
        return stack(folder)[route()]
    except DamagedError:
        return {}


def explain_missing(reason: str) -> str:
    """Return which file needs a missing shared library, such as `libcudart.so.11.0`, and a hint.

    The library's name is in the dynamic section of the file that needs it, so a byte search finds that file.
    """
    match = re.search(r"(lib[\w.+-]+\.so[.\d]*): cannot open shared object file", reason)
    if match is None:
        return ""
    library = match.group(1)
    needy = []
    for entry in map(Path, dict.fromkeys(sys.path)):
        for path in (
            entry.glob("*/**/*.so*") if entry.name == "site-packages" or list(entry.glob("*.dist-info")) else ()
        ):
            if path.is_file() and path.stat().st_size < 50_000_000 and library.encode() + b"\0" in path.read_bytes():
                needy.append(f"{path.relative_to(entry)}")
    asks = f"{few(needy, 3)} needs {library}" if needy else f"no file in this environment names {library}"
    return f"{asks}: that package was built for another CUDA. {REPAIR[route()]}"
