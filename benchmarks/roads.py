"""Measure each road from an empty home folder to the first trained step of a new experiment.

python benchmarks/roads.py                 all roads whose programs are on this machine
python benchmarks/roads.py make uv         these
python benchmarks/roads.py --home DIR uv   with a home folder that keeps its caches: what a second experiment takes

It downloads 4.4 GB for each road, unless DIR has them. A road is the commands that docs/start/install.md names. The
first step is trained when the trail has its line.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONDA = "-r requirements-conda.lock -r labtrain.lock"
# The programs that a road needs, and its commands, in a new experiment.
ROADS = {
    "make": (["make", "python3"], "make train"),
    "uv": (
        ["uv"],
        "uv venv -q && uv pip sync -q --require-hashes --build-constraints requirements.lock"
        " requirements.lock labtrain.lock && uv run train.py",
    ),
    "nix": (["nix"], "git init -q && git add -A && nix develop -c python train.py"),
    "conda": (
        ["conda", "conda-lock"],
        "conda-lock install -p ./conda conda-lock-cpu.yml && ./conda/bin/python -m pip install -q --no-deps"
        f" --require-hashes {CONDA} && ./conda/bin/python train.py",
    ),
    "pixi": (["pixi"], "pixi run --locked -e cpu train"),
    "devcontainer": (
        ["devcontainer", "docker"],
        "devcontainer up --workspace-folder . && devcontainer exec --workspace-folder . python train.py",
    ),
}


def first_step(command: str, experiment: Path, home: Path) -> float | None:
    """Run a road until the first step is in a trail; return its seconds, or None if it ended before."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "XDG_", "UV_CACHE"))
    }
    environment = kept | {"HOME": str(home)}
    started = time.monotonic()
    with subprocess.Popen(["sh", "-c", command], cwd=experiment, env=environment, stdout=sys.stderr) as process:
        found = None
        while found is None and process.poll() is None:
            time.sleep(0.05)
            if any(path.stat().st_size for path in experiment.glob("runs/*/*/trail.jsonl")):
                found = time.monotonic() - started
    return found if process.returncode == 0 else None


def main() -> None:
    """Print a line for each road."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roads", nargs="*", metavar="ROAD", help=", ".join(ROADS))
    parser.add_argument("--home", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    labtrain = Path(sys.executable).with_name("labtrain")
    for road in arguments.roads or ROADS:
        programs, command = ROADS[road]
        if missing := [name for name in programs if shutil.which(name) is None]:
            print(f"{road:<13}not run: no {', '.join(missing)} here", flush=True)
            continue
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
            experiment, home = Path(scratch, "digits"), (arguments.home or Path(scratch, "home")).resolve()
            home.mkdir(parents=True, exist_ok=True)
            subprocess.run([labtrain, "new", experiment], check=True, capture_output=True)
            seconds = first_step(command, experiment, home)
            print(f"{road:<13}{'failed' if seconds is None else f'{seconds:.0f} s'}  {command}", flush=True)


if __name__ == "__main__":
    main()
