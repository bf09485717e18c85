"""Collects the wheels that a machine with a torch of its own lacks: `make gpu-wheels`. Then no network is needed there.

    python -m tests.gpu.wheels FOLDER              of the versions and hashes in requirements.lock, for Python 3.12 on
                                                   x86-64; and of this labtrain
    python3 -m tests.gpu.wheels --install FOLDER   there: unpack those that its Python lacks into its site-packages

That machine has torch, lightning, torchmetrics, numpy, scipy, scikit-learn, rich, psutil, xxhash, safetensors,
nvidia-ml-py, tensorboard, click, fsspec, jinja2, pyyaml, packaging, wheel and what they need.
"""

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# labtrain's other requirements, and what those need. Without plotly and rocrate, which only reports and crates import.
LACKING = (
    "hydra-core", "omegaconf", "antlr4-python3-runtime", "fastjsonschema", "cookiecutter", "binaryornot", "arrow",
    "python-slugify", "text-unidecode", "python-dateutil", "six", "tzdata", "requests", "charset-normalizer", "idna",
    "urllib3", "certifi",
)  # fmt: skip
SOURCES = ("antlr4-python3-runtime",)  # there is no wheel of it
MOST_BYTES = 64 << 20
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pinned(names: tuple[str, ...], lock: str) -> str:
    """Return the lock's entries of some packages, with their hashes and without markers."""
    entries = {
        match[1]: match for match in re.finditer(r"^([\w.-]+)==(\S+)[^\n]*((?:\n +--hash=\S+(?: \\)?)+)", lock, re.M)
    }
    missing = [name for name in names if name not in entries]
    if missing:
        raise SystemExit(f"error: not in requirements.lock: {', '.join(missing)}")
    return "".join(f"{name}=={entries[name][2]} \\{entries[name][3].rstrip()}\n" for name in names)


def collect(folder: Path) -> int:
    """Put the wheels into an empty folder; return their bytes."""
    lock = (ROOT / "requirements.lock").read_text()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    foreign = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    foreign += [f"--platform={each}" for each in PLATFORMS]
    with tempfile.TemporaryDirectory() as scratch:
        wheels, sources = Path(scratch, "wheels.txt"), Path(scratch, "sources.txt")
        wheels.write_text(pinned(tuple(name for name in LACKING if name not in SOURCES), lock))
        sources.write_text(pinned(SOURCES, lock))
        common = ["--no-deps", "--require-hashes", "-r"]
        subprocess.run([*pip, "download", *foreign, "-d", str(folder), *common, str(wheels)], check=True)
        subprocess.run([*pip, "wheel", "-w", str(folder), *common, str(sources)], check=True)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder.resolve())]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    if size > MOST_BYTES:
        raise SystemExit(f"error: {size} bytes of wheels, at most {MOST_BYTES}")
    return size


def install(folder: Path) -> list[str]:
    """Unpack the wheels of distributions that this Python lacks, and labtrain's; return their names. Needs no pip."""
    target, names = sysconfig.get_path("purelib"), []
    for wheel in sorted(folder.glob("*.whl")):
        name = wheel.name.partition("-")[0]
        if name != "labtrain" and _is_there(name):
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        names.append(name)
    return names


def _is_there(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def main(arguments: list[str]) -> None:
    """Run the command."""
    folder = Path(arguments[-1])
    if arguments[:-1] == ["--install"]:
        print(f"{sysconfig.get_path('purelib')}: {', '.join(install(folder)) or 'nothing new'}")
    else:
        size = collect(folder)
        print(f"{folder}: {len([*folder.glob('*.whl')])} wheels, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
