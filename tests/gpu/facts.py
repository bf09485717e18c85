"""Prints what a report says about the machine, as JSON: GPUs, driver, versions."""

import importlib.metadata
import json
import platform
import subprocess
from contextlib import suppress
from typing import Any


def smi(fields: str, text: str | None = None) -> list[dict[str, str]]:
    """Return what nvidia-smi says of each GPU, by the field's name.

    Args:
        fields: separated by commas: `nvidia-smi --help-query-gpu`.
        text: its output, instead of running it.

    Raises:
        OSError: there is no nvidia-smi, or it fails.
    """
    if text is None:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        if done.returncode:
            raise OSError(f"nvidia-smi: {(done.stdout + done.stderr).strip()}")
        text = done.stdout
    names = fields.split(",")
    return [
        dict(zip(names, map(str.strip, line.split(",")), strict=True)) for line in text.splitlines() if line.strip()
    ]


def versions() -> dict[str, str | None]:
    """Return the versions that decide what runs."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("lightning", "torchmetrics", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
        found |= {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        with suppress(OSError):
            found["driver"] = smi("driver_version")[0]["driver_version"]
    return found


def gpus() -> list[dict[str, Any]]:
    """Return name and memory of each GPU that torch can use."""
    import torch

    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [{"name": card.name, "memory_gb": round(card.total_memory / 1e9, 1)} for card in cards]


if __name__ == "__main__":
    print(json.dumps({"gpus": gpus(), "versions": versions()}))
