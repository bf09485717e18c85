"""A run's code, environment and machine: facts for the receipt and the doctor. No torch."""

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

from labtrain.base.contracts import CodeRecord, Hardware, Installed, as_options
from labtrain.base.files import text_sha256
from labtrain.base.git import GitError, ask_git, run_git
from labtrain.record.identity import Job, route
from labtrain.record.sources import labtrain_sources, read_code, sources

PATCH = "code.patch"  # in a run's folder
INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile")


def timestamp() -> str:
    """Return the current time: UTC, ISO 8601, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def code_digests(job: Job, *, path: list[str] | None = None) -> dict[str, object]:
    """Return the digests of the code, by content: run no git and import nothing.

    Returns:
        digest; sources: the sha256 of each of the experiment's files; outside, if any: of each file imported from
        outside the environment; shadows, if any: names of modules that shadow the environment's; labtrain: the digest
        of labtrain's own sources.
    """
    code = read_code(Path(job.root), as_options(job.config), path=path)
    return {
        "digest": code.digest,
        "sources": code.sources,
        **({"outside": code.outside} if code.outside else {}),
        **({"shadows": code.shadows} if code.shadows else {}),
        "labtrain": text_sha256(json.dumps(labtrain_sources())),
    }


def code_state(job: Job) -> CodeRecord:
    """Return the digests of the code, and git's state if the experiment is in a repository.

    Only for the user's own runs: git runs the programs in the repository's configuration, such as filters.

    Returns:
        the result of `code_digests`; commit, branch and dirty; folder: of the experiment in its repository; untracked:
        sources unknown to git; ignored: sources that git ignores; patch: from the commit to this code, including
        untracked sources; None if git fails.
    """
    root = job.root
    commit = ask_git(root, "rev-parse", "HEAD").strip()
    untracked, ignored = unknown_sources(root) if commit else ([], [])
    changed = _or_none(root, "status", "--porcelain", "--", ".") if commit else None
    found = code_digests(job) | {
        "commit": commit or None,
        "folder": ask_git(root, "rev-parse", "--show-prefix").strip().rstrip("/") if commit else None,
        "branch": ask_git(root, "rev-parse", "--abbrev-ref", "HEAD").strip() or None,
        "dirty": None if changed is None else bool(changed.strip()),
        "untracked": untracked,
        "ignored": ignored,
        "patch": uncommitted_change(root, untracked) if commit else "",
    }
    return cast(CodeRecord, found)


def unknown_sources(root: str) -> tuple[list[str], list[str]]:
    """Return an experiment's Python sources that are unknown to git, and those that git ignores; none if git fails."""
    here = {path.relative_to(root).as_posix() for path in sources(Path(root))}
    listed = _or_none(root, "ls-files", "-z", "--", ".")
    others = _or_none(root, "ls-files", "-z", "--others", "--exclude-standard", "--", ".")
    if listed is None or others is None:
        return [], []
    known, new = set(listed.split("\0")), set(others.split("\0"))
    return sorted(here & new), sorted(here - new - known)


def uncommitted_change(root: str, untracked: list[str]) -> str | None:
    """Return the patch from HEAD to the experiment's folder: `git diff HEAD` with untracked sources; None if git fails.

    Untracked sources are added to a separate index and object folder, so the repository does not change. Files that git
    ignores are left out: they may contain credentials.
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
        if index.exists():  # keep what is staged: only the index knows a new file
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

    Read from the names of the `.dist-info` folders: reading two hundred METADATA files takes 0.2 seconds.
    """
    found: dict[str, str] = {}
    for entry in reversed(sys.path):  # the first on the path wins
        for folder in Path(entry).glob("*.dist-info") if entry else ():
            name, _, version = folder.name.removesuffix(".dist-info").partition("-")
            found[normalised(name)] = version
    return dict(sorted(found.items()))


def normalised(name: str) -> str:
    """Normalise a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def memory_bytes() -> int:
    """Return this machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine() -> Hardware:
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
    """Return a processor's name and model numbers: in a virtual machine the name may be only "Xeon"."""
    numbers = [f"{name} {cpu[key]}" for name, key in (("family", "cpu family"), ("model", "model"),
                                                       ("stepping", "stepping")) if key in cpu]  # fmt: skip
    return (cpu.get("model name") or platform.machine()) + (f" ({', '.join(numbers)})" if numbers else "")


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
