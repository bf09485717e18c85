"""Check what a training needs of the machine: shared memory, open files, NCCL's settings, disks and the clock."""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from labtrain.base.console import shown
from labtrain.base.errors import LabtrainError
from labtrain.environment.doctor.report import Check, judged
from labtrain.stores.backends import is_local
from labtrain.stores.layout import list_checkpoints
from labtrain.stores.store import Store

GROUP = "machine"
SHM = Path("/dev/shm")
SHM_BYTES = 64 * 2**20  # a container's default, too little for loader workers and NCCL
OPEN_FILES = 1024
DISK_BYTES = 5_000_000_000
KEPT_CHECKPOINTS = 3  # two by checkpoint.keep_last, and one being written


def checks(folder: Path, checkpoints: str | None = None) -> Iterator[Check]:
    """Yield the group's checks; `folder` is where a training would start."""
    yield check_shared_memory(SHM)
    yield check_open_files()
    yield check_nccl()
    yield check_disk(folder)
    yield check_checkpoints(folder, checkpoints)
    yield check_clock()


def check_shared_memory(shm: Path) -> Check:
    """Check the size of shared memory, which loader workers and NCCL use."""
    if not shm.is_dir():
        return judged(
            GROUP,
            "shared memory",
            False,
            f"no {shm}",
            f"more than {SHM_BYTES >> 20} MB",
            "mount -t tmpfs tmpfs /dev/shm",
        )
    size = shutil.disk_usage(shm).total
    hint = "docker run --shm-size=8g, or --ipc=host; in Kubernetes mount an emptyDir with medium Memory on /dev/shm"
    return judged(
        GROUP, "shared memory", size > SHM_BYTES, f"{size / 2**20:,.0f} MB", f"more than {SHM_BYTES >> 20} MB", hint
    )


def check_open_files() -> Check:
    """Check how many files a process may open; each rank and each loader worker needs some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if soft == resource.RLIM_INFINITY else str(soft)
    good = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    return judged(GROUP, "open files", good, found, f"{OPEN_FILES} or more", f"ulimit -n {hard if hard > 0 else 65536}")


def check_nccl() -> Check:
    """Check the NCCL_* variables: switching a transport off makes several GPUs slow, or hang."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")}
    off = [name for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE") if variables.get(name, "0") not in ("", "0")]
    found = " ".join(f"{name}={value}" for name, value in variables.items()) or "none set"
    return judged(
        GROUP, "NCCL variables", not off, found, "none that switches a transport off", f"unset {' '.join(off)}"
    )


def check_disk(folder: Path) -> Check:
    """Check the free disk space for runs."""
    free = shutil.disk_usage(folder).free
    hint = "checkpoint.url=/another/disk, or remove old runs"
    return judged(GROUP, "disk", free >= DISK_BYTES, f"{free / 1e9:.1f} GB free", f"{DISK_BYTES / 1e9:.0f} GB", hint)


def check_checkpoints(folder: Path, url: str | None) -> Check:
    """Check that the checkpoints' folder is writable and has room for a few of the last checkpoint's size."""
    name = "checkpoints"
    if url is not None and not is_local(url):
        return _check_remote(name, url)
    target = Path(url.removeprefix("file://")) if url else folder / "runs"
    place = target
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        return judged(
            GROUP,
            name,
            False,
            f"{shown(place)}: {error.strerror}",
            "a writable folder",
            f"ls -ld {shown(place)}",
        )
    free = shutil.disk_usage(place).free
    newest = max(
        target.glob("**/checkpoints") if not url else target.glob("*"),
        key=lambda path: path.stat().st_mtime,
        default=None,
    )
    last = list_checkpoints(newest)[-1:] if newest is not None else []
    if not last:
        return judged(GROUP, name, True, f"{shown(place)} is writable", "a writable folder", "")
    size = sum(file["size_bytes"] for file in last[0][1]["files"].values())
    found = f"{free / 1e6:,.0f} MB free, the last checkpoint has {size / 1e6:,.1f} MB"
    return judged(
        GROUP,
        name,
        free > KEPT_CHECKPOINTS * size,
        found,
        f"room for {KEPT_CHECKPOINTS} checkpoints",
        "checkpoint.url=/another/disk",
    )


def _check_remote(name: str, url: str) -> Check:
    wanted = "a writable store"
    try:
        Store(url).now()
    except LabtrainError as error:
        return judged(GROUP, name, False, str(error.args[0]), wanted, error.hint)
    return judged(GROUP, name, True, f"{url} is writable", wanted, "")


def check_clock() -> Check:
    """Check that the clock is not earlier than this environment's files: certificates would be refused."""
    written = Path(__file__).stat().st_mtime
    now = time.time()
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    wanted = f"later than labtrain's files, of {time.strftime('%Y-%m-%d', time.gmtime(written))}"
    return judged(GROUP, "clock", now > written - 86400, found, wanted, "timedatectl set-ntp true")
