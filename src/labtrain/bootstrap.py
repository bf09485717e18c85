"""Make the environment: a `.venv` with exactly what `requirements.lock` names, every file checked by hash.

It uses only the standard library, because it runs before anything is installed. In the repository it runs as
`PYTHONPATH=src python3 -m labtrain.bootstrap --editable`. In an experiment `setup.sh` checks the wheel in `vendor/`
against labtrain.lock and runs it from there. If the environment is up to date (same locks, same distributions, no file
missing or changed), it does nothing. Otherwise it repairs the environment.

pip, from Python's ensurepip, installs uv at the locked hash. uv installs everything else.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from labtrain import __version__
from labtrain.base.errors import LabtrainError
from labtrain.base.permissions import close_umask
from labtrain.record.installed import NEEDED, changes, names

PYTHONS = ((3, 11), (3, 14))  # from, below
DISK_BYTES = 9_000_000_000  # the environment takes 8.8 GB, with byte code
MEMORY_BYTES = 1_500_000_000
LOCK = "requirements.lock"
WHEEL_LOCK = "labtrain.lock"
STAMP = "labtrain-setup"


def main() -> None:
    """Run from the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python3 -m labtrain.bootstrap", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument(
        "--editable", action="store_true", help="install labtrain from this source tree instead of the wheel in vendor/"
    )
    arguments = parser.parse_args()
    close_umask()
    try:
        set_up(Path.cwd(), editable=arguments.editable)
    except LabtrainError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


def set_up(root: Path, *, editable: bool) -> None:
    """Make or update `root/.venv`.

    Raises:
        LabtrainError: Python, disk or memory does not suffice, or a step failed.
    """
    check_python(sys.version_info[:2])
    if not (root / LOCK).is_file():
        raise LabtrainError(f"{LOCK}: no such file in {root}", hint="cd to labtrain's repository, or to an experiment")
    venv = root / ".venv"
    python = venv / "bin" / "python"
    stamp = venv / STAMP
    state = fingerprint(root, editable=editable)
    damaged = damaged_distributions(venv)
    works = _version(python) == sys.version_info[:2]
    if works and not damaged and stamp.exists() and stamp.read_text() == f"{state}\n{_installed(venv)}":
        return
    stamp.unlink(missing_ok=True)
    if not (venv / "bin" / "uv").exists():
        check_disk(shutil.disk_usage(root).free)
    check_memory(available_memory())

    environment = installer_variables()
    if not works:
        damaged = {}
        _make(venv, environment)
    damaged = _install_uv(venv, damaged, environment, lock=(root / LOCK).read_text())
    say("installing requirements.lock, by hash (the first time: 4.4 GB to download, 8.8 GB installed)")
    again = [name for name in damaged if name not in ("uv", "labtrain")]
    _remove_damaged(venv, {name: damaged[name] for name in again}, environment)
    _install(venv, environment, again=again, editable=editable)
    say("compiling to byte code")
    folders = [*(venv / "lib").glob("python*/site-packages"), *([root / "src"] if editable else [])]
    _run([str(python), "-m", "compileall", "-q", "-j0", *map(str, folders)], environment, may_fail=True)
    if damaged := damaged_distributions(venv):
        raise LabtrainError(
            f"files still missing or changed after reinstalling: {', '.join(damaged)}", hint="rm -r .venv; make setup"
        )
    stamp.write_text(f"{state}\n{_installed(venv)}")
    say("done: .venv matches requirements.lock")


def installer_variables() -> dict[str, str]:
    """Return the environment variables of pip and uv."""
    left_out = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    if "PIP_INDEX_URL" in environment:  # one variable for both, behind a mirror
        environment.setdefault("UV_DEFAULT_INDEX", environment["PIP_INDEX_URL"])
    if "PIP_CERT" in environment:
        environment.setdefault("SSL_CERT_FILE", environment["PIP_CERT"])
    return environment


def _install_uv(venv: Path, damaged: dict[str, Path], environment: dict[str, str], *, lock: str) -> dict[str, Path]:
    """Install uv if it is damaged or not the locked version; return what is still damaged."""
    python = venv / "bin" / "python"
    if "uv" not in damaged and _is_pinned_uv(venv / "bin" / "uv", lock):
        return damaged
    say("installing uv, by hash")
    if not _has_pip(python):
        subprocess.run([str(python), "-m", "ensurepip"], env=environment, capture_output=True, check=False)
    if not _has_pip(python):  # pip itself is damaged, and ensurepip believes that it is installed
        damaged = {}
        _make(venv, environment)
    options = ["--quiet", "--force-reinstall", "--require-hashes", "--no-deps", "--disable-pip-version-check", "-r"]
    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch) / "uv.txt"
        pinned.write_text(locked_block(lock, "uv"))
        _run([str(python), "-m", "pip", "install", *options, str(pinned)], environment)
    return damaged


def _remove_damaged(venv: Path, damaged: dict[str, Path], environment: dict[str, str]) -> None:
    """Remove what uv cannot replace."""
    if not damaged:
        return
    say(f"reinstalling packages with missing or changed files: {', '.join(damaged)}")
    for folder in damaged.values():
        if not all((folder / file).exists() for file in NEEDED):
            shutil.rmtree(folder)  # uv does not touch what it cannot read
    # If uv's cache is hard-linked, a file changed in place is changed in the cache too.
    _run([str(venv / "bin" / "uv"), "cache", "clean", "--quiet", *damaged], environment, may_fail=True)


def _install(venv: Path, environment: dict[str, str], *, again: list[str], editable: bool) -> None:
    uv, target = [str(venv / "bin" / "uv"), "pip"], ["--python", str(venv / "bin" / "python")]
    # The one sdist in the lock is built with the locked setuptools, also checked by hash.
    reinstalled = [option for name in again for option in ("--reinstall-package", name)]
    by_hash = [*target, "--require-hashes"]
    _run([*uv, "sync", "--quiet", *by_hash, *reinstalled, "--build-constraints", LOCK, LOCK], environment)
    own = ["--no-build-isolation", "--editable", "."] if editable else ["--require-hashes", "-r", WHEEL_LOCK]
    _run([*uv, "install", "--quiet", *target, "--no-deps", *own], environment)


def damaged_distributions(venv: Path) -> dict[str, Path]:
    """Return the .dist-info of each distribution with a missing or changed file, by distribution name."""
    return {
        re.sub(r"[-_.]+", "-", info.name.partition("-")[0]).lower(): info
        for folder in _site_packages(venv)
        for info, _, fate in changes(folder)
        if fate
    }


def check_python(version: tuple[int, ...]) -> None:
    """Raise if labtrain is not locked for this Python."""
    first, below = PYTHONS
    if not first <= version < below:
        found, wanted = ".".join(map(str, version)), f"{first[0]}.{first[1]} to {below[0]}.{below[1] - 1}"
        raise LabtrainError(f"found Python {found}, need {wanted}", hint="make PYTHON=python3.12 setup")


def check_disk(free_bytes: int) -> None:
    """Raise if the environment does not fit on the disk."""
    if free_bytes < DISK_BYTES:
        raise LabtrainError(
            f"{free_bytes / 1e9:.1f} GB of disk free here, need {DISK_BYTES / 1e9:.1f} GB", hint="df -h ."
        )


def check_memory(available_bytes: int) -> None:
    """Raise if there is too little memory to import what is installed."""
    if available_bytes < MEMORY_BYTES:
        raise LabtrainError(
            f"{available_bytes / 1e9:.1f} GB of memory available, need {MEMORY_BYTES / 1e9:.1f} GB",
            hint="free -h",
        )


def available_memory() -> int:
    """Return the available memory in bytes, without swapping."""
    match = (
        re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if Path("/proc/meminfo").exists()
        else None
    )
    return int(match.group(1)) * 1024 if match else MEMORY_BYTES


def locked_block(lock: str, name: str) -> str:
    """Return one package's lines in a lock: its pin and its hashes."""
    match = re.search(rf"^{re.escape(name)}==.*?(?=^\S|\Z)", lock, re.MULTILINE | re.DOTALL)
    if match is None:
        raise LabtrainError(f"{LOCK} does not name {name}", hint="labtrain lock write")
    return "".join(line for line in match.group(0).splitlines(keepends=True) if not line.lstrip().startswith("#"))


def fingerprint(root: Path, *, editable: bool) -> str:
    """Return a hash of what the environment is made from: the locks, Python, and labtrain's version."""
    sha = hashlib.sha256(f"{sys.version} {editable} {__version__}".encode())
    for name in (LOCK, WHEEL_LOCK, *(["pyproject.toml", "README.md"] if editable else [])):
        path = root / name
        sha.update(path.read_bytes() if path.exists() else b"")
    return sha.hexdigest()


def say(text: str) -> None:
    """Print the current step to standard error."""
    sys.stderr.write(f"setup: {text}\n")
    sys.stderr.flush()


def _make(venv: Path, environment: dict[str, str]) -> None:
    say("making .venv")
    shutil.rmtree(venv, ignore_errors=True)
    if subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True, check=False).returncode:
        raise LabtrainError(
            "this Python cannot create an environment: ensurepip is missing", hint="apt-get install python3-venv"
        )
    _run([sys.executable, "-m", "venv", str(venv)], environment)


def _site_packages(venv: Path) -> list[Path]:
    return sorted((venv / "lib").glob("python*/site-packages"))


def _installed(venv: Path) -> str:
    """Return the installed distributions as the stamp records them."""
    return " ".join(names(_site_packages(venv)))


def _has_pip(python: Path) -> bool:
    return not subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False).returncode


def _is_pinned_uv(uv: Path, lock: str) -> bool:
    version = _said([str(uv), "--version"]).split()
    return len(version) > 1 and locked_block(lock, "uv").startswith(f"uv=={version[1]} ")


def _version(python: Path) -> tuple[int, ...]:
    return tuple(map(int, _said([str(python), "-c", "import sys; print(*sys.version_info[:2])"]).split()))


def _said(command: list[str]) -> str:
    """Return what a program prints; empty if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if not done.returncode else ""


def _run(command: list[str], environment: dict[str, str], *, may_fail: bool = False) -> None:
    code = subprocess.run(command, env=environment, check=False).returncode
    if code and not may_fail:
        raise LabtrainError(
            f"{' '.join(command[:4])} ended with exit code {code}",
            hint="see the lines above for the reason; then: make setup",
        )


if __name__ == "__main__":
    main()
