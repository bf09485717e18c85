"""Where a run comes from: its code, its environment, its machine. Facts for the receipt and the doctor; no torch."""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from labtrain.base.contracts import Code, Installed, as_options
from labtrain.base.git import GitError, ask_git, run_git
from labtrain.record.identity import Job, route
from labtrain.record.sources import labtrain_sources, read_code, sources

PATCH = "code.patch"  # of a run's folder
INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile")


def timestamp() -> str:
    """Return the time now: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def code_digests(job: Job, *, path: list[str] | None = None) -> dict[str, object]:
    """Return what the code is, by its bytes: no git, and nothing is imported.

    Returns:
        digest; sources: the sha256 of each of the experiment's; outside, where there are some: of each that is imported
        from outside of the environment; shadows, where there are some: the names of modules that come before those of
        the environment; labtrain: the digest of its own.
    """
    code = read_code(Path(job.root), as_options(job.config), path=path)
    return {
        "digest": code.digest,
        "sources": code.sources,
        **({"outside": code.outside} if code.outside else {}),
        **({"shadows": code.shadows} if code.shadows else {}),
        "labtrain": hashlib.sha256(json.dumps(labtrain_sources()).encode()).hexdigest(),
    }


def code_state(job: Job) -> Code:
    """Return what the code is, and what git says of it where the experiment is in a repository.

    For a run of one's own: git does what the repository's configuration says, filters and a file system monitor too.

    Returns:
        what `code_digests` does; commit, branch and dirty; folder: of the experiment in its repository; untracked: the
        sources that git does not know; ignored: those that it is told to ignore; patch: what turns the commit into this
        code, the untracked with it, None where git fails.
    """
    root = job.root
    commit = ask_git(root, "rev-parse", "HEAD").strip()
    untracked, ignored = unknown_sources(root) if commit else ([], [])
    found = code_digests(job) | {
        "commit": commit or None,
        "folder": ask_git(root, "rev-parse", "--show-prefix").strip().rstrip("/") if commit else None,
        "branch": ask_git(root, "rev-parse", "--abbrev-ref", "HEAD").strip() or None,
        "dirty": bool(ask_git(root, "status", "--porcelain", "--", ".").strip()) if commit else None,
        "untracked": untracked,
        "ignored": ignored,
        "patch": uncommitted_change(root, untracked) if commit else "",
    }
    return cast(Code, found)


def unknown_sources(root: str) -> tuple[list[str], list[str]]:
    """Return the Python sources of an experiment that git does not know, and those that it is told to ignore."""
    here = {path.relative_to(root).as_posix() for path in sources(Path(root))}
    known = set(ask_git(root, "ls-files", "-z", "--", ".").split("\0"))
    new = set(ask_git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", ".").split("\0"))
    return sorted(here & new), sorted(here - new - known)


def uncommitted_change(root: str, untracked: list[str]) -> str | None:
    """Return what turns HEAD into the experiment's folder as it is: `git diff HEAD`, with the sources that it lacks.

    Those are added to an index of our own, and to objects of our own: the repository is as it was. What git is told to
    ignore is not taken: credentials lie there. None where git fails.
    """
    diff = ("-c", "core.quotepath=off", "diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv",
            "--no-relative", "-U3", "--submodule=short", "--src-prefix=a/", "--dst-prefix=b/",
            "HEAD", "--", ".")  # fmt: skip
    if not untracked:
        return _or_none(root, *diff)
    objects = ask_git(root, "rev-parse", "--path-format=absolute", "--git-path", "objects").strip()
    with TemporaryDirectory() as scratch:
        own = dict(os.environ) | {
            "GIT_INDEX_FILE": f"{scratch}/index",
            "GIT_OBJECT_DIRECTORY": scratch,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects,
        }
        index = Path(ask_git(root, "rev-parse", "--path-format=absolute", "--git-path", "index").strip())
        if index.exists():  # with what is staged: a new file is known to git by it alone
            shutil.copyfile(index, own["GIT_INDEX_FILE"])
        if _or_none(root, "add", "--", *untracked, variables=own) is None:
            return None
        return _or_none(root, *diff, variables=own)


def _or_none(root: str, *arguments: str, variables: dict[str, str] | None = None) -> str | None:
    try:
        return run_git(root, *arguments, variables=variables)
    except GitError:
        return None


def environment_state(job: Job) -> Installed:
    """Return the route, its lock's digest, Python, and every installed distribution's version."""
    return {
        "route": route(),
        "lock_digest": job.lock_digest or None,
        "python": platform.python_version(),
        "distributions": distributions(),
    }


def distributions() -> dict[str, str]:
    """Return the version of each installed distribution, by normalised name.

    Read from the names of the `.dist-info` folders: two hundred METADATA files would cost a fifth of a second.
    """
    found: dict[str, str] = {}
    for entry in reversed(sys.path):  # the first on the path wins
        for folder in Path(entry).glob("*.dist-info") if entry else ():
            name, _, version = folder.name.removesuffix(".dist-info").partition("-")
            found[normalised(name)] = version
    return dict(sorted(found.items()))


def normalised(name: str) -> str:
    """Return a distribution's name as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def memory_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine() -> dict[str, object]:
    """Return the processor, its instruction sets, the memory and the operating system."""
    cpu = _cpuinfo()
    flags = cpu.get("flags", "").split()
    return {
        "cpu": _model(cpu),
        "instruction_sets": [flag for flag in INSTRUCTION_SETS if flag in flags],
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
    }


def _model(cpu: dict[str, str]) -> str:
    """Return a processor's name and its numbers: a virtual machine's name may say no more than Xeon."""
    numbers = [f"{name} {cpu[key]}" for name, key in (("family", "cpu family"), ("model", "model"),
                                                       ("stepping", "stepping")) if key in cpu]  # fmt: skip
    return (cpu.get("model name") or platform.machine()) + (f" ({', '.join(numbers)})" if numbers else "")


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
