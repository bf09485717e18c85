"""The trail: cut at the step that is gone on from, and the first step, phase and tensor that differ."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from labtrain.base.errors import DamagedError
from labtrain.exact.checksums import shown_sums, two_sums
from labtrain.record.trail import (
    TRAIL,
    Record,
    cut_trail,
    differing_tensor,
    first_step,
    is_as_recorded,
    missing_steps,
    phase_of,
    read_trail,
)


def write(path: Path, steps: int, tail: str = "") -> None:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, steps + 1)) + tail)


def test_a_trail_is_cut_at_the_step_that_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / TRAIL
    write(path, 9)
    cut_trail(path, last_step=5)
    assert [line["step"] for line in read_trail(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_line_that_a_crash_cut_short_goes(tmp_path: Path) -> None:
    path = tmp_path / TRAIL
    write(path, 3, tail='{"step": 4, "lo')
    assert len(read_trail(tmp_path)) == 3
    cut_trail(path, last_step=9)
    assert path.read_bytes().endswith(b'{"step": 3}\n')
    cut_trail(tmp_path / "nothing.jsonl", last_step=9)


def test_a_trail_that_is_not_to_be_cut_is_not_written(tmp_path: Path) -> None:
    """A crash in the middle of that would cost the trail."""
    path = tmp_path / TRAIL
    write(path, 9)
    os.utime(path, ns=(1, 1))
    cut_trail(path, last_step=9)
    assert path.stat().st_mtime_ns == 1
    cut_trail(path, last_step=0)
    assert path.read_bytes() == b""


def test_a_line_that_is_broken_in_the_middle_is_refused(tmp_path: Path) -> None:
    (tmp_path / TRAIL).write_text('{"step": 1}\n{broken\n{"step": 3}\n')
    with pytest.raises(DamagedError, match=r"trail.jsonl is broken"):
        read_trail(tmp_path)


def trail(folder: Path, steps: int, *, every: int = 1, first: int = 1, other_from: int | None = None) -> Path:
    draw = random.Random(0)
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        weights = f"{draw.getrandbits(128):032x}"
        if other_from is not None and step >= other_from:
            weights = f"{int(weights, 16) ^ 1:032x}"
        if step >= first and step % every == 0:
            line = {"step": step, "epoch": 0, "loss": step / 7, "batch": "b", "weights": weights}
            lines.append(json.dumps(line) + "\n")
    (folder / TRAIL).write_text("".join(lines))
    return folder


@pytest.mark.parametrize("step", [1, 2, 499, 500, 1000])
def test_the_first_step_is_found(tmp_path: Path, step: int) -> None:
    one, other = trail(tmp_path / "a", 1000), trail(tmp_path / "b", 1000, other_from=step)
    found = first_step(one, other)
    assert found == (step, "update", None)


def test_trails_of_other_steps(tmp_path: Path) -> None:
    """Written less often, begun later, ended earlier, cut by a crash."""
    one = trail(tmp_path / "a", 100)
    assert first_step(one, trail(tmp_path / "b", 100, every=5)) is None
    assert first_step(one, trail(tmp_path / "c", 100, first=40)) is None
    found = first_step(one, trail(tmp_path / "d", 100, every=10, other_from=42))
    assert found == (50, "update", None)
    found = first_step(one, trail(tmp_path / "e", 90))
    assert found == (91, "length", None)
    cut = trail(tmp_path / "f", 100)
    (cut / TRAIL).write_bytes((cut / TRAIL).read_bytes()[:-5])
    found = first_step(one, cut)
    assert found == (100, "length", None)
    assert first_step(one, tmp_path / "none") is None


def test_a_trail_that_is_written_less_often_ends_where_the_other_does(tmp_path: Path) -> None:
    assert first_step(trail(tmp_path / "a", 100), trail(tmp_path / "b", 100, every=3)) is None
    assert first_step(trail(tmp_path / "c", 100, every=3), trail(tmp_path / "d", 100)) is None
    lines = (tmp_path / "a" / TRAIL).read_text()
    shutil.copytree(tmp_path / "a", tmp_path / "e")
    (tmp_path / "e" / TRAIL).write_text(lines.replace('"step": 7, "epoch": 0', '"step": 7, "epoch": 1'))
    found = first_step(tmp_path / "a", tmp_path / "e")
    assert found == (7, "epoch", None)


def test_the_phase_is_the_first_that_differs() -> None:
    line = {"step": 3, "epoch": 0, "batch": "b", "loss": 0.5, "gradients": "g", "weights": "w"}
    assert phase_of(line, dict(line)) is None
    for change, phase in (
        ({"batch": "c", "loss": 1, "weights": "x"}, "batch"),
        ({"loss": 1.0, "gradients": "h"}, "loss"),
        ({"gradients": "h", "weights": "x"}, "gradient"),
        ({"weights": "x"}, "update"),
    ):
        assert phase_of(line, line | change) == phase


@pytest.mark.parametrize("seed", range(20))
def test_one_tensor_that_differs_is_told_from_any_number_of_them(seed: int) -> None:
    """By any bit of it, in weights and in gradients; two that differ are none."""
    draw = random.Random(seed)
    tensors = [torch.randn(draw.randrange(1, 9), draw.randrange(1, 9)) for _ in range(draw.randrange(2, 2000))]
    names = [f"layer{number}" for number in range(len(tensors))]

    def line() -> dict[str, object]:
        sums = two_sums(enumerate(tensors)).tolist()
        return {"step": 1, "gradients": shown_sums(sums, bits=32), "weights": shown_sums(sums)}

    def flip(number: int) -> None:
        flat = tensors[number].view(-1).view(torch.int32)
        flat[draw.randrange(len(flat))] ^= 1 << draw.randrange(32)

    before, (number, other) = line(), draw.sample(range(len(tensors)), 2)
    flip(number)
    now = line()
    assert phase_of(before, now) == "gradient"
    assert differing_tensor(before, now, names) == names[number]
    now["gradients"] = before["gradients"]
    assert phase_of(before, now) == "update"
    assert differing_tensor(before, now, names) == names[number]
    flip(other)
    assert differing_tensor(before, line(), names) is None
    assert differing_tensor(before, {**before, "loss": 1}, names) is None


def test_the_steps_that_a_trail_lacks(tmp_path: Path) -> None:
    """Held against what a checkpoint's manifest says of it; what had been lost before stays lost."""
    path = tmp_path / "trail.jsonl"
    lines = [b'{"step": %d, "loss": 0.5}\n' % step for step in range(1, 10)]

    def missing(now: list[bytes] | None, *, first: int = 1, known: Any = (), every_n_steps: int = 1) -> list[list[int]]:
        path.write_bytes(b"".join(lines))
        said = Record(path).up_to(sum(len(line) for line in lines if json.loads(line)["step"] <= 7)) | {
            "first": first,
            "missing": known,
        }
        path.unlink()
        if now is not None:
            path.write_bytes(b"".join(now))
        return missing_steps(tmp_path, {"step": 7, "trail": said}, every_n_steps=every_n_steps)

    assert missing(lines) == missing(lines[:7]) == missing([*lines[:7], b'{"ste']) == []
    assert missing(lines[:3]) == [[4, 7]]
    assert missing([*lines[:3], lines[3][:5]]) == [[4, 7]]
    assert missing([*lines[:1], *lines[2:4], *lines[6:]]) == [[2, 2], [5, 6]]
    assert missing([lines[0].replace(b"0.5", b"0.6"), *lines[1:]]) == [[1, 7]]
    assert missing([lines[1], lines[0], *lines[2:]]) == [[1, 7]]
    assert missing(None) == missing([]) == missing([b"x", b"[]\n", b'{"step": {}}\n']) == [[1, 7]]
    assert missing(lines, known=[[2, 3]]) == [[2, 3]]
    assert missing(lines[:5], known=[[2, 3]]) == [[2, 3], [6, 7]]
    lines = [b'{"step": %d, "loss": 0.5}\n' % step for step in (3, 6, 9)]
    assert missing(lines[:1], first=3, every_n_steps=3) == [[6, 6]]
    assert missing([], first=3, every_n_steps=3) == [[3, 6]]


@pytest.mark.parametrize("manifest", [{"step": 7}, {"step": 7, "trail": None}])
def test_the_steps_that_a_trail_lacks_by_an_older_manifest(manifest: dict[str, Any], tmp_path: Path) -> None:
    """It does not say what the trail was: a trail that is gone, or ends before the checkpoint, is found all the same."""

    def missing(steps: Any = None, **options: Any) -> list[list[int]]:
        if steps is not None:
            (tmp_path / "trail.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
        return missing_steps(tmp_path, manifest, **{"every_n_steps": 1, **options})

    assert missing() == [[1, 7]]
    assert missing(from_step=4) == [[5, 7]]
    assert missing(from_step=7) == missing(every_n_steps=0) == missing(every_n_steps=10) == []
    assert missing(every_n_steps=3) == [[3, 6]]
    assert missing(every_n_steps=3, from_step=4) == [[6, 6]]
    assert missing(range(1, 10)) == missing(range(5, 8)) == []
    assert missing(range(1, 4)) == missing([1, 2, 3, 8, 9]) == [[4, 7]]
    assert missing([3, 6], every_n_steps=3) == []
    assert missing([]) == [[1, 7]]


def test_a_record_reads_what_is_new(tmp_path: Path) -> None:
    """Again and again as the file grows, and from its beginning where it was cut."""
    path = tmp_path / "trail.jsonl"
    record, content = Record(path), bytes(range(256)) * 10_000
    path.write_bytes(content)
    for size in (10, 2_000_000, 2_000_001, 5):
        found = {"size_bytes": size, "sha256": hashlib.sha256(content[:size]).hexdigest()}
        assert record.up_to(size) == found
        assert is_as_recorded(path, found)
    path.write_bytes(content[:4])
    assert not is_as_recorded(path, found)
