"""Check Python, the route, every installed distribution and its files, and what shadows them."""

import os
import platform
import re
import site
import sys
from collections.abc import Iterator
from pathlib import Path

from labtrain.base.console import few, shown
from labtrain.environment.doctor.report import Check, judged, skipped
from labtrain.environment.lock import Pin, read_lock
from labtrain.record import installed
from labtrain.record.identity import LOCK_FILE, ROUTES, route
from labtrain.record.provenance import distributions
from labtrain.record.sources import shadowing

GROUP = "environment"
GLIBC = (2, 28)
# How to restore the locked environment, by route.
REPAIR = {
    "wheels": "make setup",
    "conda": "create it again from conda-lock.yml: docs/start/install.md",
    "conda-cpu": "create it again from conda-lock-cpu.yml: docs/start/install.md",
    "nix": "nix develop creates it again",
}
CUDA_LIBRARIES = ("libcudart", "libcublas", "libcudnn", "libnccl", "libcufft", "libcusparse", "libcusolver", "libnvrtc")


def checks(pins: dict[str, Pin], lock: Path, *, deep: bool = False) -> Iterator[Check]:
    """Yield the group's checks."""
    yield check_python()
    yield check_glibc()
    yield check_packages(pins, lock)
    yield check_files(deep=deep)
    yield from check_strays()


def check_python(version: tuple[int, ...] = sys.version_info[:2]) -> Check:
    """Check the interpreter's version, and show which route made the environment."""
    found = f"{version[0]}.{version[1]}, {route()} route"
    return judged(GROUP, "Python", (3, 11) <= version < (3, 14), found, "3.11 to 3.13", "make PYTHON=python3.12 setup")


def check_glibc() -> Check:
    """Check that glibc is new enough for the wheels."""
    name, version = platform.libc_ver()
    wanted = f"glibc {GLIBC[0]}.{GLIBC[1]} or later"
    if name != "glibc":
        return judged(
            GROUP,
            "glibc",
            False,
            name or "another C library",
            wanted,
            "use another Linux distribution, or the container",
        )
    found = tuple(int(part) for part in version.split(".")[:2])
    return judged(GROUP, "glibc", found >= GLIBC, version, wanted, "use a newer Linux distribution, or the container")


def check_packages(pins: dict[str, Pin], lock: Path) -> Check:
    """Compare the version of every installed distribution with requirements.lock."""
    if route().startswith("conda"):
        return skipped(
            GROUP,
            "packages",
            f"{len(distributions())} distributions, built by conda",
            "conda list --explicit --md5",
        )
    wrong = not_as_locked(pins)
    found = few(wrong) if wrong else f"all {len(pins)} as locked"
    return judged(GROUP, "packages", not wrong, found, shown(lock), REPAIR[route()])


def not_as_locked(pins: dict[str, Pin]) -> list[str]:
    """Return each distribution that differs from requirements.lock: another version, missing, or not locked."""
    here = distributions()
    wrong = [
        f"{name} {here.get(name, 'missing')} (locked {pin.version})"
        for name, pin in pins.items()
        if here.get(name) != pin.version
    ]
    return wrong + [f"{name} {here[name]} (not locked)" for name in sorted(set(here) - set(pins) - {"labtrain"})]


def unlike_lock(root: Path) -> list[str]:
    """Return each package of this environment that differs from the experiment's lock for its route.

    Args:
        root: the experiment's folder; if it has no lock, the result is empty.
    """
    lock, *beside = ROUTES[route()]
    missing = [name for name in (lock, *beside) if not (root / name).exists()]
    if missing:
        # An experiment of an older labtrain has no lock for a CPU, but has the file beside it.
        return [] if len(missing) == 1 + len(beside) else [f"{name} is missing in {root}" for name in missing]
    if not beside:
        return not_as_locked(read_lock(root / LOCK_FILE))
    text, here = (root / lock).read_text(), distributions()
    locked = set(re.findall(r"/([^/\s]+)\.(?:conda|tar\.bz2)\s*$", text, re.MULTILINE))
    there = {path.stem for path in Path(sys.prefix, "conda-meta").glob("*.json")}
    wrong = [f"{name} (not locked)" for name in sorted(there - locked)]
    wrong += [f"{name} missing" for name in sorted(locked - there)]
    pins = read_lock(root / "requirements-conda.lock").values()
    return wrong + [f"{pin.name} {here.get(pin.name, 'missing')} (locked {pin.version})"
                    for pin in pins if here.get(pin.name) != pin.version]  # fmt: skip


def check_files(*, deep: bool = False) -> Check:
    """Compare installed files with the hashes in each distribution's RECORD."""
    changed, files = installed.changed_files(deep=deep)
    found = few(changed) if changed else f"{files} files {'hashed' if deep else 'unchanged since the installation'}"
    return judged(
        GROUP,
        "files",
        not changed,
        found,
        "as in each RECORD",
        REPAIR[route()],
    )


def check_strays() -> Iterator[Check]:
    """Check what could shadow the locked files: PYTHONPATH, the user's site, LD_LIBRARY_PATH."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    packages = [path for path in paths if any(Path(path).glob("*.dist-info"))]
    shadows = shadowing(list(dict.fromkeys([*paths, *sys.path])))
    wrong = [f"{few(packages)} contains packages"] if packages else []
    wrong += [f"{few(shadows)} from it shadows the environment's"] if shadows else []
    yield judged(
        GROUP,
        "PYTHONPATH",
        not wrong,
        "; ".join(wrong) or os.environ.get("PYTHONPATH", "") or "not set",
        "nothing that shadows the lock",
        "unset PYTHONPATH",
    )
    user = site.getusersitepackages()
    seen = bool(site.ENABLE_USER_SITE) and user in sys.path
    yield judged(
        GROUP,
        "user site",
        not seen,
        f"{user} is searched" if seen else "not searched",
        "not searched",
        "export PYTHONNOUSERSITE=1",
    )
    folders = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    cuda = [
        f"{folder}/{path.name}"
        for folder in folders
        for name in CUDA_LIBRARIES
        for path in sorted(Path(folder).glob(f"{name}.so*"))[:1]
    ]
    yield judged(
        GROUP,
        "LD_LIBRARY_PATH",
        not cuda,
        f"another CUDA: {few(cuda)}" if cuda else few(folders) or "not set",
        "no CUDA library except the environment's",
        "unset LD_LIBRARY_PATH; torch finds the environment's libraries",
    )
