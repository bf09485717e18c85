"""A complete run, and a data file that was changed since: the next start says it."""

import json
import struct
import zoneinfo
from pathlib import Path
from typing import Any

import pytest

from labtrain.record import fingerprints, receipt
from labtrain.record.fingerprints import changed_files, files_now, files_read, noting_opened, places_in
from labtrain.review.inspection import state_differences
from tests.support.exact import configure

UTC = struct.pack(">4s16x6liBB4s", b"TZif", 0, 0, 0, 0, 1, 4, 0, 0, 0, b"UTC")  # the smallest file of a zone, RFC 8536


def test_a_changed_data_file_is_said_at_the_next_start(runner: Any, tmp_path: Path) -> None:
    """Named by the configuration, or read by the data's setup alone; verify names it, and the run stays complete."""
    root = tmp_path / "none"  # the experiment's folder, in these runs
    (root / "named").mkdir(parents=True)
    for path in (root / "named" / "a.txt", root / "noise.txt"):
        path.write_text("0.5")
    config = configure("mlp", trainer={"max_epochs": 1})
    config["model"] = {"_target_": "tests.support.names_models.Tiny"}
    config["data"] |= {"_target_": "tests.support.names_models.FromFile", "folder": str(root / "named")}
    run_dir = runner.run(config)
    found = receipt.read(run_dir)
    assert found is not None
    receipt.hold_against_schema(found, run_dir)
    assert {name for name in found["data"] if name.startswith("file ")} == {"file named", "file noise.txt"}
    runner.run(config)
    assert "changed since" not in runner.said()
    assert not [each for each in state_differences(found, root, root) if each.key.startswith("data.")]
    (root / "noise.txt").write_text("0.7")
    (root / "named" / "a.txt").write_text("0.6")
    assert runner.run(config) == run_dir
    assert "was trained: named, noise.txt (resume=never trains with the new data)" in runner.said()
    assert receipt.read(run_dir) == found
    keys = {each.key for each in state_differences(found, root, root) if each.matters}
    assert {"data.file named.digest", "data.file noise.txt.digest"} <= keys


def test_what_a_training_read_is_named_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the experiment's folder relative to it; a file below a folder that is named is part of that one."""
    root, other = tmp_path / "exp", tmp_path / "data" / "deep"
    for path in (root / "a.csv", root / "images" / "b.png", other / "c.npy", other / "d.npy"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    places: set[Path] = set(places_in({"x": [str(root / "images"), "no such place", 3, "\0"], "y": ""}))
    with noting_opened(places):
        for path in (root / "a.csv", root / "images" / "b.png", Path(json.__file__), Path("/proc/self/stat")):
            path.read_bytes()
        (root / "written.txt").write_text("")
        (other / "c.npy").open("rb").close()
    found = files_read(places, root)
    assert set(found) == {"file a.csv", "file images", f"file {other}/c.npy"}
    assert found == files_now(found, root)
    (other / "c.npy").write_text("other")
    (root / "a.csv").unlink()
    assert changed_files(found, root) == [f"{other}/c.npy"]
    monkeypatch.setattr("labtrain.record.fingerprints.MOST_PLACES", 1)
    assert set(files_read([other / "c.npy", other / "d.npy"], root)) == {f"file {other}"}


def test_the_systems_zones_are_no_data(tmp_path: Path) -> None:
    """An update of them is no change of data; beside them /usr/share holds datasets, which are."""
    zones = tmp_path / "share" / "zoneinfo"
    zones.mkdir(parents=True)
    data = tmp_path / "share" / "zoneinfo-dataset.csv"
    for path in (zones / "Mine", data):
        path.write_bytes(UTC)
    zoneinfo.reset_tzpath([str(zones)])
    fingerprints._systems_own.cache_clear()
    places: set[Path] = set()
    try:
        with noting_opened(places):
            assert zoneinfo.ZoneInfo.no_cache("Mine").key == "Mine"
            data.read_bytes()
    finally:
        zoneinfo.reset_tzpath()
        fingerprints._systems_own.cache_clear()
    assert places == {data}


def test_of_a_receipt_of_somebody_else_nothing_outside_of_the_experiment_is_read(tmp_path: Path) -> None:
    """It may name a private key, by a path or through a link, and its digest would be shown."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "key").write_text("private")
    (tmp_path / "lab" / "data.csv").write_text("1,2")
    (tmp_path / "lab" / "link").symlink_to(tmp_path / "key")
    data: dict[str, Any] = {f"file {tmp_path / 'key'}": {}, "file ../key": {}, "file link": {}, "file data.csv": {}}
    assert list(files_now(data, tmp_path / "lab", outside=False)) == ["file data.csv"]
    assert list(files_now(data, tmp_path / "lab")) == list(data)


def test_what_a_receipt_names_and_cannot_be_read_is_not_here(tmp_path: Path) -> None:
    """Memory of a process, a name that is too long, a name with a NUL."""
    (tmp_path / "there").write_text("x")
    names = ["file /proc/self/mem", "file /proc/kmsg", f"file {'a' * 5000}", "file a\0b", "file there"]
    assert list(files_now({name: {} for name in names}, tmp_path)) == ["file there"]
