import json
from pathlib import Path

import torch

from labtrain.callbacks import checksum, clock, cut_trail, device_checksum


def write(path: Path, steps: int, tail: str = "") -> None:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, steps + 1)) + tail)


def test_a_trail_is_cut_at_the_step_that_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "trail.jsonl"
    write(path, 9)
    cut_trail(path, last_step=5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_line_that_a_crash_cut_short_goes(tmp_path: Path) -> None:
    path = tmp_path / "trail.jsonl"
    write(path, 3, tail='{"step": 4, "lo')
    cut_trail(path, last_step=9)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    cut_trail(tmp_path / "nothing.jsonl", last_step=9)


def test_every_bit_of_every_weight_reaches_the_checksums() -> None:
    """One flipped bit, anywhere: the CPU's digest differs, and so does the sum that is computed on a GPU."""
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    here, there = {checksum([x])}, {device_checksum(x).item()}
    for index in range(x.numel()):
        for bit in (0, 1, 22, 23, 30):
            y = x.clone()
            y.view(-1).view(torch.int32)[index] ^= 1 << bit
            here.add(checksum([y]))
            there.add(device_checksum(y).item())
    assert len(here) == len(there) == 1 + x.numel() * 5


def test_a_checksum_knows_order_and_place() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    assert checksum([x, y]) != checksum([y, x])
    assert device_checksum(x) != device_checksum(y)
    assert device_checksum(torch.empty(0)) == 0


def test_a_clock_reads_as_people_write_it() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 90061)] == ["0:00:00", "0:01:00", "0:59:59", "25:01:01"]
