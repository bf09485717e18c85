"""Samples a second of a ResNet-18 and a GPT of 124 million weights in bf16, against a bare PyTorch loop on one card.

labtrain in strict mode, on one shard, with its trail and receipt; then without the trail, in off, in four shards, and
with a checkpoint every 25 steps, to see what each takes. Each side is a process of its own; sides take turns; the
median of three rounds' ratios counts. Random data: nothing is learned. Prints a table, writes results-gpu.json.

Without a GPU small networks take CPU time and nothing is written: it shows that the benchmark runs.

Run: make bench-gpu
"""

import json
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from bench import measure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "resnet_gpt"))
from networks import BATCH, LARGE  # noqa: E402

ROUNDS, WANTED = (3 if LARGE else 1), 0.98
VARIANTS = {
    "labtrain": [],
    "labtrain, no trail": ["trail.every_n_steps=0"],
    "labtrain, off, no trail": ["determinism.mode=off", "trail.every_n_steps=0"],
    "labtrain, 4 shards": ["determinism.shards=4"],
    "labtrain, checkpoint every 25 steps": ["checkpoint.every_n_steps=25"],
}


def main() -> None:
    """Measure, print and write."""
    where = torch.cuda.get_device_name() if LARGE else "no GPU: small networks, CPU time"
    print(f"{where}\n{'samples a second':<44}{'median':>10}{'ratio':>8}{'GB':>7}   wanted {WANTED}")
    table = {}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        folder = Path(scratch) / "resnet_gpt"
        shutil.copytree(HERE / "resnet_gpt", folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HERE / "fashion" / "train.py", folder)
        accelerator = "gpu" if LARGE else "cpu"
        for name, batch_size in BATCH.items():
            ours = [
                sys.executable, "train.py", "resume=never", f"paths.runs={scratch}/runs", f"model.network={name}",
                f"data.batch_size={batch_size}", f"trainer.accelerator={accelerator}",
                f"+callbacks.clock={{_target_:large.StepClock,batch_size:{batch_size}}}",
            ]  # fmt: skip
            sides = {"bare": [sys.executable, "bare.py", name]}
            sides |= {variant: [*ours, *overrides] for variant, overrides in VARIANTS.items()}
            rounds = []
            for _ in range(ROUNDS):
                rounds.append({side: measure(command, folder) for side, command in sides.items()})
                shutil.rmtree(Path(scratch) / "runs")
            for side in sides:
                speed = statistics.median(found[side]["samples_per_second"] for found in rounds)
                ratio = statistics.median(
                    found[side]["samples_per_second"] / found["bare"]["samples_per_second"] for found in rounds
                )
                memory = max(found[side].get("memory_gb", 0.0) for found in rounds)
                print(f"{f'{name}: {side}':<44}{speed:>10.1f}{ratio:>8.3f}{memory:>7.1f}", flush=True)
                table[f"{name}: {side}"] = {
                    "samples_per_second": round(speed, 1), "ratio": round(ratio, 3), "memory_gb": round(memory, 2)
                }  # fmt: skip
    if LARGE:
        versions = {"python": platform.python_version(), "torch": str(torch.__version__), "cuda": torch.version.cuda}
        results = {"device": where, "sides": table, "versions": versions, "rounds": ROUNDS, "wanted": WANTED}
        (HERE / "results-gpu.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
