"""ResNet-18, ResNet-50 and a GPT of 124 million weights in bf16 on one GPU: labtrain against a bare PyTorch loop.

labtrain trains on one shard with everything on: strict, a trail line at every step, a checkpoint every 25 steps. The
other sides are the bare loop and labtrain with determinism.mode=off. Each side is a process of its own; sides take
turns, and the median of the rounds' ratios of times counts. Random data: nothing is learned. Prints a table, and writes
results-gpu.json. `--all` adds labtrain without its trail, without checkpoints and in four shards.

Without a GPU small networks take CPU time and nothing is written: it shows that the benchmark runs.

Run: make bench-gpu
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench import measure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "resnet_gpt"))
from networks import BATCH, LARGE  # noqa: E402

ROUNDS = 3 if LARGE else 1
BUDGET_S = 480  # no round begins that would end later
OURS = ["checkpoint.every_n_steps=25"]
VARIANTS = {
    "labtrain": OURS,
    "labtrain, off": [*OURS, "determinism.mode=off"],
}
MORE = {
    "labtrain, no trail": [*OURS, "trail.every_n_steps=0"],
    "labtrain, no checkpoints": [],
    "labtrain, 4 shards": [*OURS, "determinism.shards=4"],
}
TARGETS = (("labtrain", "bare", 1.02), ("labtrain", "labtrain, off", 1.05))  # ratios of times, at most


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="measure more variants of labtrain")
    variants = VARIANTS | (MORE if parser.parse_args().all else {})
    where = torch.cuda.get_device_name() if LARGE else "no GPU: small networks, CPU time"
    print(where, flush=True)
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in BATCH}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        folder = Path(scratch) / "resnet_gpt"
        shutil.copytree(HERE / "resnet_gpt", folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HERE / "fashion" / "train.py", folder)
        for done in range(ROUNDS):
            if done and (time.monotonic() - began) * (done + 1) / done > BUDGET_S:
                print(f"stopped after {done} rounds, because {BUDGET_S} seconds would be over")
                break
            for name in BATCH:
                sides = {"bare": [sys.executable, "bare.py", name]}
                sides |= {variant: command(name, scratch, keys) for variant, keys in variants.items()}
                rounds[name].append({side: measure(each, folder) for side, each in sides.items()})
                shutil.rmtree(Path(scratch) / "runs")
    table = {f"{name}: {side}": row for name, found in rounds.items() for side, row in rows(found).items()}
    show(table)
    if LARGE:
        versions = {"python": platform.python_version(), "torch": str(torch.__version__), "cuda": torch.version.cuda}
        results = {"device": where, "sides": table, "versions": versions, "rounds": len(rounds["gpt"])}
        (HERE / "results-gpu.json").write_text(json.dumps(results, indent=1) + "\n")


def command(name: str, scratch: str, keys: list[str]) -> list[str]:
    """Return the command that trains a network by labtrain."""
    return [
        sys.executable, "train.py", "resume=never", f"paths.runs={scratch}/runs", f"model.network={name}",
        f"data.batch_size={BATCH[name]}", f"trainer.accelerator={'gpu' if LARGE else 'cpu'}",
        f"+callbacks.clock={{_target_:large.StepClock,batch_size:{BATCH[name]}}}", *keys,
    ]  # fmt: skip


def rows(found: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the median speed, the largest memory and the median ratio of times to the bare loop, for each side."""
    return {
        side: {
            "samples_per_second": round(statistics.median(each[side]["samples_per_second"] for each in found), 1),
            "ratio_to_bare": round(ratio(found, side, "bare"), 3),
            "ratio_to_off": round(ratio(found, side, "labtrain, off"), 3),
            "memory_gb": round(max(each[side].get("memory_gb", 0.0) for each in found), 2),
        }
        for side in found[0]
    }


def ratio(found: list[dict[str, dict[str, float]]], side: str, other: str) -> float:
    """Return the median ratio of times."""
    return statistics.median(each[other]["samples_per_second"] / each[side]["samples_per_second"] for each in found)


def show(table: dict[str, dict[str, float]]) -> None:
    """Print the table and the targets."""
    print(f"{'':<40}{'samples/s':>12}{'time / bare':>13}{'time / off':>12}{'GB':>7}")
    for name, row in table.items():
        figures = f"{row['samples_per_second']:>12.1f}{row['ratio_to_bare']:>13.3f}{row['ratio_to_off']:>12.3f}"
        print(f"{name:<40}{figures}{row['memory_gb']:>7.1f}")
    for side, other, most in TARGETS:
        key = "ratio_to_bare" if other == "bare" else "ratio_to_off"
        found = {name.partition(":")[0]: row[key] for name, row in table.items() if name.endswith(f": {side}")}
        print(f"{side} / {other}, at most {most}: {', '.join(f'{name} {each}' for name, each in found.items())}")


if __name__ == "__main__":
    main()
