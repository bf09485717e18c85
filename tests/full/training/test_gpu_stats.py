"""A real training on the CPU beside a driver library of our own: what is read through NVML, and where it ends up."""

from pathlib import Path

from tests.real.training.test_gpu_stats import train
from tests.support.doctor import driver


def test_a_card_that_is_nearly_full_is_said_once(tmp_path: Path) -> None:
    _, _, said = train(tmp_path, **driver(tmp_path, USED="23000000000ULL"))
    lines = [line for line in said.splitlines() if line.startswith("warning: GPU")]
    assert [line.partition(",")[0] for line in lines] == [
        f"warning: GPU {number} is nearly full: 23.0 of 24.0 GB" for number in (0, 1)
    ]
