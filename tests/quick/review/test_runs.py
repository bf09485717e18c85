"""`labtrain note` and `labtrain rm`, on recorded runs."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import labtrain
from labtrain.record import receipt
from labtrain.review.catalog.listing import list_runs
from tests.conftest import LABTRAIN, ROOT, changed

IDS = ("24c29285cf19", "906ca0b1c2d3")


def command(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([LABTRAIN, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in IDS:
        left_out = shutil.ignore_patterns("old", "public.json")
        shutil.copytree(ROOT / "tests" / "golden", tmp_path / "runs" / "digits" / name, ignore=left_out)
    return tmp_path / "runs" / "digits"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_note_is_shown_and_replaced_and_removed(runs: Path) -> None:
    """In ls, the table and the report; the receipt is unchanged."""
    before = files(runs)
    command("note", "24c2", "rate too <high>\n for this model, try a tenth of it")
    assert "rate too <high> for t..." in command("ls").stdout
    row = next(row for row in json.loads(command("ls", "--json").stdout) if row["id"] and IDS[0] in row["run"])
    assert row["note"] == "rate too <high> for this model, try a tenth of it"
    assert sorted(labtrain.runs("runs")["note"]) == ["", row["note"]]
    command("report", *IDS, "-o", "page.html")
    assert "rate too &lt;high&gt; for this model" in Path("page.html").read_text()
    assert {name: data for name, data in files(runs).items() if "note" not in name} == before
    command("note", IDS[0], "better")
    assert [row.note for row in list_runs([runs / IDS[0]])] == ["better"]
    command("note", IDS[0], " ")
    assert files(runs) == before
    command("note", IDS[0], "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("dead", "x"), "dead: no run of this id in runs"),
        (("runs", "x"), "runs is not a run: looked for receipt.json"),
        ((IDS[0], "x" * 10_001), "a note has at most 10,000 bytes"),
    ],
)
def test_a_note_that_cannot_be_kept_is_an_error(arguments: tuple[str, str], says: str, runs: Path) -> None:
    before = files(runs)
    done = command("note", *arguments, code=2)
    assert f"error: {says}" in done.stderr
    assert "\n\nhint: " in done.stderr
    assert files(runs) == before


def test_a_note_that_is_a_link_or_a_pipe_is_not_read(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (runs / IDS[0] / "note.txt").symlink_to(tmp_path / "secret")
    os.mkfifo(runs / IDS[1] / "note.txt")
    assert [row.note for row in list_runs([runs])] == ["", ""]
    command("note", IDS[0], "mine")
    assert (tmp_path / "secret").read_text() == "secret"


def test_runs_are_removed_with_what_is_printed(runs: Path) -> None:
    (runs / IDS[0] / "checkpoints" / "step-0000000300").mkdir(parents=True)
    (runs / IDS[0] / "checkpoints" / "step-0000000300" / "big").write_bytes(bytes(2_000_000))
    (runs / f".{IDS[0]}.fetched").mkdir()
    done = command("rm", "--yes", "24c2", str(runs / IDS[0]))
    assert done.stdout.startswith(f"runs/digits/{IDS[0]}  complete, 300 steps, 2.")
    assert done.stdout.endswith(" MB\n")
    assert [each.name for each in runs.iterdir()] == [IDS[1]]


def test_checkpoints_outside_its_folder_are_removed_too(runs: Path, tmp_path: Path) -> None:
    """Those of this run alone: its folder below checkpoint.url."""
    changed(runs / IDS[0], "config/checkpoint/url", str(tmp_path / "store"))
    for name in IDS:
        (tmp_path / "store" / name / "step-0000000300").mkdir(parents=True)
        (tmp_path / "store" / name / "step-0000000300" / "weights.safetensors").write_bytes(bytes(1_000_000))
    assert f"1 checkpoints with 1.0 MB in {tmp_path}/store/{IDS[0]}" in command("rm", "--yes", IDS[0]).stdout
    assert not list((tmp_path / "store" / IDS[0]).glob("*"))
    assert (tmp_path / "store" / IDS[1] / "step-0000000300" / "weights.safetensors").exists()


def test_nothing_is_removed_without_a_yes(runs: Path) -> None:
    before = files(runs)
    done = command("rm", *IDS, code=2)
    assert done.stdout.count("complete, 300 steps") == 2
    assert f"nothing was removed: there is no terminal to ask on\n\nhint: labtrain rm --yes {IDS[0]}" in done.stderr
    assert files(runs) == before


def test_one_that_is_no_run_keeps_all(runs: Path, tmp_path: Path) -> None:
    """Folders of something else, with another program's receipt.json, links, and what does not exist."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data").write_text("x")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "receipt.json").write_text('{"total": 3}')
    Path("link").symlink_to(runs / IDS[0])
    before = files(tmp_path)
    for name, says in (("mine", "mine is not a run"), ("runs", "runs is not a run"), ("runs/digits", "is not a run"),
                       ("shop", "shop/receipt.json is broken"), ("link", "link is a link, must be a run's folder"),
                       ("nothing", "nothing is not a run"), ("dead", "dead: no run of this id")):  # fmt: skip
        done = command("rm", "--yes", IDS[0], name, code=2)
        assert says in done.stderr, name
        assert "\n\nhint: " in done.stderr
        assert files(tmp_path) == before


def test_a_broken_run_can_be_removed(runs: Path) -> None:
    (runs / IDS[0] / receipt.FILE).write_text("{")
    assert command("rm", "--yes", str(runs / IDS[0])).stdout.startswith(f"runs/digits/{IDS[0]}  broken, ")
    assert [each.name for each in runs.iterdir()] == [IDS[1]]


def test_an_interrupted_removal_leaves_no_run_and_is_continued(runs: Path) -> None:
    """Killed while it removes thousands of files; by its id or its folder."""
    many = runs / IDS[0] / "checkpoints"
    many.mkdir()
    for number in range(30_000):
        (many / str(number)).touch()
    left = runs / f".{IDS[0]}.removing"
    child = subprocess.Popen([LABTRAIN, "rm", "--yes", IDS[0]], stdout=subprocess.DEVNULL)
    while not left.exists():
        assert child.poll() is None
    child.kill()
    child.wait()
    assert left.exists(), "it was faster than the signal"
    assert not (runs / IDS[0]).exists()
    assert [row.run for row in list_runs([runs])] == [f"runs/digits/{IDS[1]}"]
    command("rm", "--yes", IDS[0])
    assert [each.name for each in runs.iterdir()] == [IDS[1]]
    shutil.copytree(runs / IDS[1], left)
    command("rm", "--yes", str(runs / IDS[0]))
    assert [each.name for each in runs.iterdir()] == [IDS[1]]
