"""What strict costs by kernel: forward and backward of common layers, with deterministic algorithms and without.

On the GPU where there is one, else on one thread of the CPU. Both sides run in turn in one process; the median of
their ratios counts. CPU time on a CPU; on a GPU its own clock, between two events. `refused` is a layer that has no
deterministic kernel there. Prints a table and writes results-kernels.json beside this file.

Run: make bench-kernels
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from labtrain.exact import determinism
from labtrain.record.provenance import machine

HERE = Path(__file__).resolve().parent
ROUNDS, SECONDS = 15, 0.02  # of each side in a round, at least

Step = Callable[[], None]


def cases() -> dict[str, tuple[Callable[[Tensor], Any], Tensor]]:
    """Return layers, each with what it is given, by name, on torch's default device."""
    images = torch.randn(16, 64, 32, 32)
    table, tokens = torch.randn(20_000, 64), torch.randint(20_000, (8, 512))
    rows = torch.randint(256, (65_536,))
    return {
        "linear": (nn.Linear(1024, 1024), torch.randn(128, 1024)),
        "convolution": (nn.Conv2d(64, 64, 3, padding=1, bias=False), images),
        "transposed convolution": (nn.ConvTranspose2d(64, 64, 2, stride=2), images),
        "BatchNorm": (nn.BatchNorm2d(64), images),
        "max pooling": (nn.MaxPool2d(2), images),
        "adaptive average pooling": (nn.AdaptiveAvgPool2d(5), images),
        "bilinear interpolation": (nn.Upsample(scale_factor=2, mode="bilinear"), images),
        "reflection padding": (nn.ReflectionPad2d(2), images),
        "attention, causal": (_attention, torch.randn(8, 4, 256, 32)),
        "LSTM": (nn.LSTM(64, 64, batch_first=True), torch.randn(16, 64, 64)),
        "embedding": (lambda weight: functional.embedding(tokens, weight), table),
        "indexing": (lambda weight: weight[tokens], table),
        "index_add": (lambda x: x.new_zeros(256, 64).index_add(0, rows, x), torch.randn(65_536, 64)),
        "scatter_add": (
            lambda x: x.new_zeros(256, 64).scatter_add(0, rows[:, None].expand_as(x), x),
            torch.randn(65_536, 64),
        ),
        "cumsum": (lambda x: x.cumsum(1), torch.randn(256, 4096)),
        "cross entropy of pixels": (
            lambda x: functional.cross_entropy(x, x.detach().argmax(1)), torch.randn(16, 8, 64, 64)
        ),
    }  # fmt: skip


def _attention(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def prepared(layer: Callable[[Tensor], Any], inputs: Tensor) -> Step:
    """Return a function that does a forward and a backward."""
    inputs = inputs.detach().requires_grad_()

    def forward() -> Tensor:
        outputs = layer(inputs)
        return cast(Tensor, outputs[0] if isinstance(outputs, tuple) else outputs)  # an LSTM returns its state too

    gradient = torch.ones_like(forward())

    def step() -> None:
        forward().backward(gradient)
        inputs.grad = None

    return step


def set_mode(mode: str) -> None:
    """Set torch's flags as a run in `mode` has them, strict or off, after its first step."""
    determinism.set_run(seed=0, mode="strict")
    determinism.apply("strict", threads=1)
    determinism.fill_new_memory(on=False)
    if mode == "off":
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def seconds(step: Step, count: int, device: torch.device) -> float:
    """Return the seconds of one step, of `count`."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(count):
            step()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / count
    began = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - began) / count


def measure(step: Step, device: torch.device) -> dict[str, float] | None:
    """Return the milliseconds of a step in off and in strict, and the ratio; None where strict refuses it."""
    set_mode("strict")
    try:
        step()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        return None
    count = max(1, round(SECONDS / max(seconds(step, 3, device), 1e-6)))
    rounds = []
    for number in range(ROUNDS):
        found = {}
        for mode in ("off", "strict") if number % 2 else ("strict", "off"):
            set_mode(mode)
            found[mode] = seconds(step, count, device)
        rounds.append(found)
    off, strict = (statistics.median(found[mode] for found in rounds) * 1e3 for mode in ("off", "strict"))
    ratio = statistics.median(found["strict"] / found["off"] for found in rounds)
    return {"off_milliseconds": round(off, 3), "strict_milliseconds": round(strict, 3), "ratio": round(ratio, 3)}


def main() -> None:
    """Measure, print and write."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else machine()["cpu"]
    torch.manual_seed(0)
    with device:
        layers = cases()
    table = {}
    print(f"{where}, forward and backward\n{'':<28}{'off, ms':>9}{'strict, ms':>12}{'ratio':>8}")
    for name, (layer, inputs) in layers.items():
        set_mode("off")
        found = table[name] = measure(prepared(layer, inputs), device)
        if found is None:
            print(f"{name:<28}{'refused':>21}")
        else:
            off, strict, ratio = found.values()
            print(f"{name:<28}{off:>9.2f}{strict:>12.2f}{ratio:>8.2f}")
    results = {"device": where, "kernels": table, "python": platform.python_version(), "torch": str(torch.__version__)}
    (HERE / "results-kernels.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
