"""`labtrain ls`: a real run while it is trained, killed and gone on with; recorded ones in every other state."""

import fcntl
import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import labtrain
from labtrain.record import receipt
from labtrain.review.catalog import listing
from tests.conftest import LABTRAIN, QUICK, ROOT, Experiment, changed
from tests.support.waiting import wait_until

GOLDEN = ROOT / "tests" / "golden"


def ls(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([LABTRAIN, "ls", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recorded runs as `runs/lab/NAME`: complete, interrupted, failed, broken."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "lab"
    for name in ("best", "worse", "stopped", "failed", "broken"):
        (folder / name).mkdir(parents=True)
        shutil.copy(GOLDEN / "receipt.json", folder / name)
    changed(folder / "best", "config/checkpoint/monitor", "val/acc")
    found = receipt.read(folder / "worse")
    assert found is not None
    found["results"]["metrics"] |= {"test/acc": 0.5, "val/acc": float("nan")}
    found["segments"][0] |= {"started": "2030-01-01T10:00:00+00:00", "ended": "2030-01-01T11:02:03+00:00"}
    receipt.write(folder / "worse", found)
    for name, status in (("stopped", "interrupted"), ("failed", "failed")):
        stopped = receipt.read(folder / name)
        assert stopped is not None
        receipt.write(folder / name, stopped | {"status": status, "results": {}})
        changed(folder / name, "segments", [found["segments"][0] | {"status": status, "to_step": 7}])
    line = {"step": 5, "metrics": {"val/acc": 0.25, "val/loss": 2.0}}
    (folder / "stopped" / "history.jsonl").write_text(json.dumps(line) + '\n{"step": 6, "met')
    text = (folder / "broken" / "receipt.json").read_text()
    (folder / "broken" / "receipt.json").write_text(text[: len(text) // 2])
    # What is no run of its own: a copy in a run, one in a hidden folder.
    for inside in (folder / "best" / "copies" / "x", tmp_path / "runs" / ".sweep" / "x"):
        shutil.copytree(folder / "worse", inside)
    return folder


def test_the_table_holds_each_run_with_its_metric(runs: Path) -> None:
    """checkpoint.monitor where there is one, else a test metric; of an unfinished run what its history says last."""
    done = ls()
    heading, *rows = cells(done.stdout)
    assert heading == ["run", "status", "steps", "metric", "size", "time", "started"]
    by_run = {row[0]: row[1:] for row in rows}
    assert set(by_run) == {f"runs/lab/{name}" for name in ("best", "worse", "stopped", "failed", "broken")}
    assert by_run["runs/lab/best"][:4] == ["complete", "300", "val/acc", "0.9963"]
    size = (runs / "worse" / "receipt.json").stat().st_size
    assert by_run["runs/lab/worse"] == [
        *["complete", "300", "test/acc", "0.5000", f"{size / 1e3:.1f}", "kB", "1:02:03", "2030-01-01", "10:00"]
    ]
    assert by_run["runs/lab/stopped"][:4] == ["interrupted", "7", "val/acc", "0.2500"]
    assert by_run["runs/lab/failed"][:2] == ["failed", "7"]
    assert by_run["runs/lab/broken"] == ["broken"]
    assert "receipt.json is broken" in done.stderr
    assert "\x1b" not in done.stdout
    assert len({line.find("2030") for line in done.stdout.splitlines() if "2030" in line}) == 1


@pytest.mark.parametrize("damage", ["{}", '{"step": "x", "metrics": {}}'])
def test_a_damaged_history_counts_up_to_its_damage(damage: str, runs: Path) -> None:
    """The run stays in the list: no result depends on its history."""
    file = runs / "stopped" / "history.jsonl"
    file.write_text(f"{json.dumps({'step': 50, 'metrics': {'val/acc': 0.5}})}\n{damage}\n{file.read_text()}")
    row = listing.row_of(runs / "stopped")
    assert (row.status, row.steps, row.metric, row.value) == ("interrupted", 50, "val/acc", 0.5)


def test_it_is_sorted_and_machines_can_read_it(runs: Path) -> None:
    heading, *rows = cells(ls("runs", "--metric", "test/acc", "--sort", "-metric").stdout)
    assert heading[3] == "test/acc"
    assert heading[-1] == "weights"
    assert [row[0].rpartition("/")[2] for row in rows][:2] == ["best", "worse"]
    assert cells(ls("--sort", "metric", "--metric", "test/acc").stdout)[1][0] == "runs/lab/worse"
    found = {
        row["run"]: row for row in json.loads(ls("runs/lab", "runs/lab/best", "--json", "--metric", "val/acc").stdout)
    }
    assert len(found) == 5
    assert found["runs/lab/best"]["weights_digest"].startswith("b9934c4d1878")
    assert found["runs/lab/worse"]["value"] is None  # it is NaN, which JSON has not
    assert "is broken" in found["runs/lab/broken"]["error"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere"], 2, "error: nowhere: no such folder\n\nhint: labtrain ls DIR"),
        (
            ["--metric", "val/typo"],
            2,
            "error: no run has a metric val/typo\n\nhint: the default without --metric is test/acc, val/acc",
        ),
        (["--sort", "colour"], 2, "colour"),
        (["empty"], 0, "no runs found in empty\n\nhint: python train.py"),
    ],
)
def test_what_is_not_there_is_said(runs: Path, arguments: list[str], code: int, says: str) -> None:
    Path("empty").mkdir()
    done = ls(*arguments, code=code)
    assert says in done.stderr
    assert done.stdout == ""


def test_a_run_is_running_only_while_a_process_trains_it(experiment: Experiment) -> None:
    """The receipt says `running` after SIGKILL too; the lock tells, and asking for it takes nothing from the trainer."""
    command = experiment.command(*QUICK, "paths.runs=runs", "trainer.max_epochs=5000")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = lambda: [path for path in Path().glob("runs/*/*/history.jsonl") if "val/acc" in path.read_text()]  # noqa: E731
    wait_until(found, process=process)
    (run_dir,) = (path.parent for path in found())
    for _ in range(3):
        assert cells(ls().stdout)[1][1] == "running"
    with (run_dir / ".lock").open("r+") as file, pytest.raises(BlockingIOError):  # it is held as before
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (row,) = listing.list_runs(["runs"])
    assert (row.status, row.metric) == ("killed", "val/acc")
    assert row.steps is not None
    assert row.steps >= 20
    assert Path(row.run).samefile(run_dir)


@pytest.mark.parametrize("started", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "x"])
def test_a_time_that_is_none_is_one_line_of_the_table(started: str, tmp_path: Path) -> None:
    found = json.loads((ROOT / "tests/golden/receipt.json").read_text())
    found["segments"][0]["started"] = started
    receipt.write(tmp_path, found)
    row = listing.row_of(tmp_path)
    assert row.status == "broken"
    assert row.error


def test_a_table_has_a_column_for_each_metric_and_each_key_that_differs(runs: Path) -> None:
    """One row a run, also a broken one; execution keys are no columns."""
    changed(runs / "worse", "config/seed", 7)
    changed(runs / "best", "config/data/num_workers", 3)
    frame = labtrain.runs("runs")
    by_name = frame.set_index(frame["run"].map(lambda each: Path(each).name))
    assert list(frame.columns[: len(listing.COLUMNS)]) == list(listing.COLUMNS)
    assert set(by_name.index) == {"best", "worse", "stopped", "failed", "broken"}
    assert by_name["status"]["broken"] == "broken"
    assert (by_name["seed"]["worse"], by_name["seed"]["best"]) == (7, 42)
    assert by_name["val/acc"]["stopped"] == 0.25
    assert by_name["test/acc"]["worse"] == 0.5
    assert by_name["device"]["best"] == "cpu"
    assert str(by_name["started"]["worse"]) == "2030-01-01 10:00:00+00:00"
    assert by_name["size_bytes"]["stopped"] == sum(file.stat().st_size for file in (runs / "stopped").iterdir())
    assert not [name for name in frame.columns if "num_workers" in name or "paths" in name]
    assert list(frame.columns)[-1] == "seed"


def test_an_experiment_without_runs_has_an_empty_table(own_experiment: Experiment) -> None:
    frame = labtrain.runs(own_experiment.root / "notebooks")
    assert (len(frame), list(frame.columns)) == (0, list(listing.COLUMNS))


def test_a_table_of_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(labtrain.LabtrainError, match="no such folder"):
        labtrain.runs(tmp_path / "nowhere")


def test_a_run_is_named_by_its_id_and_by_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 100 columns: keys that differ go before times and weights; a heading is as short as it can be."""
    monkeypatch.chdir(tmp_path)
    ids = ("24c29285cf19", "906ca0b1c2d3", "906ca0b1c2d3-2")
    for place, name in enumerate(ids):
        folder = tmp_path / "runs" / "digits" / name
        folder.mkdir(parents=True)
        shutil.copy(GOLDEN / "receipt.json", folder)
        changed(folder, "config/seed", place)
        changed(folder, "config/model/width", 16 * (place + 1))
        changed(folder, "config/data/width", f"{place} a long text of many words")
        changed(folder, "config/data/num_workers", place)  # an execution key
        changed(folder, "config/experiment", "digits")
    (tmp_path / "runs/digits" / ids[0] / "checkpoints").mkdir()
    (tmp_path / "runs/digits" / ids[0] / "checkpoints" / "big").write_bytes(bytes(2_500_000))
    done = ls("--sort", "run")
    heading, first, *_ = done.stdout.splitlines()
    assert heading.split()[:7] == ["run", "status", "steps", "test/acc", "seed", "model.width", "data.width"]
    assert first.split()[:6] == [ids[0], "complete", "300", "0.9963", "0", "16"]
    assert "2.5 MB" in first
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert [row[0] for row in cells(ls("--sort", "-size").stdout)[1:2]] == [ids[0]]
    for row in json.loads(ls("--json").stdout):
        assert set(row["differs"]) == {"seed", "model.width", "data.width"}
        assert row["size_bytes"] > 10_000
        assert row["id"]
        assert "config" not in row
    for place, name in enumerate(ids):
        for letter in "abcdefgh":
            changed(tmp_path / "runs/digits" / name, f"config/model/{letter * 12}", place)
    crowded = ls()
    assert max(map(len, crowded.stdout.splitlines())) <= 100
    assert "no room for " in crowded.stderr
    assert "model.hhhhhhhhhhhh; data.width, which differ too (labtrain ls --json)" in crowded.stderr
    changed(tmp_path / "runs/digits" / ids[0], "config/experiment", "other")
    (tmp_path / "runs/digits" / ids[0]).rename(tmp_path / "runs" / ids[0])
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs" / ids[0]).rename(tmp_path / "runs/other" / ids[0])
    assert {row[0] for row in cells(ls().stdout)[1:]} == {f"other/{ids[0]}", *(f"digits/{name}" for name in ids[1:])}
