"""Restart in the job: real trainings on two processes, of which some are killed. Bits are compared by digest."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from labtrain.base.signals import WRITER_NAME
from labtrain.record.trail import read_trail
from tests.conftest import QUICK, Experiment, Run
from tests.support.slurm import break_rank
from tests.support.training import folders
from tests.support.waiting import wait_until

# An epoch has 158 steps, and its end is the first checkpoint: an earlier resume is from memory.
LONG = (*QUICK, "data.batch_size=8", "trainer.max_epochs=2", "paths.runs=runs")
TWO = (*LONG, "trainer.accelerator=cpu", "trainer.devices=2")
AT = 100


@pytest.fixture(scope="module")
def whole(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of one process, in which nothing fails."""
    return shared_experiment.train(*LONG, f"paths.runs={tmp_path_factory.mktemp('whole')}")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Training:
    """A start of train.py on two processes."""

    def __init__(self, experiment: Experiment, *overrides: str) -> None:
        self.process = subprocess.Popen(
            experiment.command(*TWO, *overrides),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks, rank 0 first."""
        zero = _trains(psutil.Process(self.process.pid))
        return zero + [each for rank in zero for each in _trains(rank)]

    def wait_for(self, step: int) -> None:
        wait_until(lambda: any(len(read_trail(run)) >= step for run in folders(Path("runs"))), process=self.process)

    def wait_for_start(self, number: int) -> None:
        wait_until(lambda: len(receipt()["segments"]) >= number, process=self.process)

    def end(self) -> Run:
        """Wait for the end; check that no process is left."""
        out, err = self.process.communicate(timeout=300)
        left = [each for each in psutil.process_iter(["cmdline", "cwd"]) if each.info["cwd"] == str(Path.cwd())
                and "labtrain.launch.job" in (each.info["cmdline"] or [])]  # fmt: skip
        assert left == []
        return Run(code=self.process.returncode, out=out, err=err, cwd=Path.cwd())


def _trains(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for each in process.children():
        with suppress(psutil.Error):  # it ends
            found += [each] if "labtrain.launch.job" in each.cmdline() and each.name() != WRITER_NAME else []
    return found


def receipt() -> dict:
    (run,) = folders(Path("runs"))
    return dict(json.loads((run / "receipt.json").read_text()))


def same(run: Run, whole: Run) -> None:
    assert run.code == 0, run.err
    assert run.out.split()[1:] == [whole.digest], "the result is printed once"
    for key in ("state_digest", "metrics"):
        assert run.receipt["results"][key] == whole.receipt["results"][key]
    assert run.trail() == whole.trail()


def test_a_killed_rank_0_is_started_again_from_the_state_in_the_memory_of_rank_1(
    experiment: Experiment, whole: Run
) -> None:
    training = Training(experiment)
    training.wait_for(AT)
    training.ranks()[0].kill()
    run = training.end()
    same(run, whole)
    first, second = run.receipt["segments"]
    assert first["why"] == "restarted: rank 0 was killed by SIGKILL"
    assert 0 < second["from_step"] <= 157
    assert f"resumes from step-{second['from_step']:010}" in run.err


@pytest.mark.release
def test_killed_ranks_and_one_that_raises_are_started_again(own_experiment: Experiment, whole: Run) -> None:
    """Rank 1 is killed, then all; rank 1 raises in a forward. One result, with the bits of a run without failures."""
    model = own_experiment.root / "model.py"
    line = "        images, labels = batch  # (B, 1, 8, 8), (B,)\n"
    once = "        import pathlib\n        if self.global_rank == 1 and self.global_step == 250 and not pathlib.Path('raised').exists():\n"
    once += "            pathlib.Path('raised').touch()\n            raise ArithmeticError('of rank 1')\n"
    text = model.read_text()
    assert line in text
    model.write_text(text.replace(line, line + once))
    training = Training(own_experiment)
    training.wait_for(AT)
    training.ranks()[1].kill()
    training.wait_for_start(2)
    training.wait_for(180)
    for rank in training.ranks():
        rank.kill()
    run = training.end()
    assert run.code == 0, run.err
    assert run.digest == whole.digest
    reasons = [segment["why"] for segment in run.receipt["segments"]]
    assert reasons[0] == "restarted: rank 1 was killed by SIGKILL"
    assert "SIGKILL" in reasons[1]
    assert reasons[2:] == ["restarted: rank 1 ended with exit code 1", None]
    assert "ArithmeticError: of rank 1" in run.err
    starts = [segment["from_step"] for segment in run.receipt["segments"]]
    assert 0 < starts[1] <= 157
    assert starts[2] == 158
    assert starts[3] > 158


@pytest.mark.release
def test_an_exception_that_comes_again_ends_the_run(own_experiment: Experiment) -> None:
    break_rank(own_experiment, 1)
    training = Training(own_experiment)
    run = training.end()
    assert run.code == 1
    assert run.out == ""
    assert run.err.count("ArithmeticError: of rank 1") in (2, 3)
    assert receipt()["status"] == "failed"


@pytest.mark.release
def test_an_exception_before_the_first_step_is_final(own_experiment: Experiment) -> None:
    model = own_experiment.root / "model.py"
    model.write_text(
        model.read_text().replace(
            "        images, labels = batch", "        raise ArithmeticError\n        images, labels = batch"
        )
    )
    run = Training(own_experiment).end()
    assert run.code == 1
    assert "starts all processes again" not in run.err


@pytest.mark.release
def test_three_deaths_at_one_step_end_the_run(own_experiment: Experiment) -> None:
    """A step that the out-of-memory killer ends each time: SIGKILL from outside of Python."""
    model = own_experiment.root / "model.py"
    line = "        images, labels = batch  # (B, 1, 8, 8), (B,)\n"
    dies = "        if self.global_rank == 1 and self.global_step == 120:\n            import os\n            os.kill(os.getpid(), 9)\n"
    model.write_text(model.read_text().replace(line, line + dies))
    run = Training(own_experiment, "checkpoint.every_n_steps=120").end()
    assert run.code == 137
    # labtrain tries a first step on rank 0 as rank 1 would make it: after a resume at step 120 that ends rank 0.
    assert run.err.count("was killed by SIGKILL: labtrain starts all processes again") == 2
    assert "died 3 times at step 120: no further restart (failures.max_restarts=2)" in run.err


@pytest.mark.release
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_again_ends_it(experiment: Experiment, number: int) -> None:
    training = Training(experiment)
    training.wait_for(AT)
    (first, *_) = training.ranks()
    first.kill()
    wait_until(lambda: [rank for rank in training.ranks()[:1] if rank != first], process=training.process)
    training.process.send_signal(number) if number == signal.SIGTERM else os.killpg(training.process.pid, number)
    run = training.end()
    assert run.code in (75, -number, 128 + number)
    assert run.out == ""
    same(experiment.train(*TWO), experiment.train(*LONG, "paths.runs=whole"))


@pytest.mark.release
@pytest.mark.parametrize("rank", [0, 1])
def test_without_restarts_a_hang_ends_the_run_with_one_error(own_experiment: Experiment, rank: int) -> None:
    """Rank 0 cannot say why it was killed: the process that started it says it, and closes the receipt."""
    how = "sum(iter(int, 1))"  # in C, with the interpreter's lock
    put_in_step(own_experiment, *hangs(20, how, rank=rank))
    run = Training(own_experiment, "failures.hang_seconds=3", "failures.max_restarts=0").end()
    assert run.code == 1
    assert run.out == ""
    assert run.err.count("error: ") == 1
    (error,) = (line for line in run.err.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: rank {rank} does not go on at ")
    assert error == f"error: {receipt()['segments'][0]['why']}"
    assert [receipt()["status"], receipt()["segments"][0]["status"]] == ["failed", "failed"]
    assert line_of(own_experiment, how) in error
    assert "hang.txt shows where each rank was; the same command resumes" in run.err
    assert Path("hung").exists()
    same(own_experiment.train(*TWO), own_experiment.train(*LONG, "paths.runs=whole"))


@pytest.mark.release
def test_a_loader_worker_that_hangs_is_found(own_experiment: Experiment, whole: Run) -> None:
    data = own_experiment.root / "data.py"
    line = "        image, m = self.images[index], self.max_shift\n"
    text = data.read_text()
    assert line in text
    hung = (
        "        import os, pathlib, signal\n"
        "        if os.environ.get('LOCAL_RANK') == '1' and pathlib.Path('hang').exists():\n"
        "            pathlib.Path('hang').unlink(missing_ok=True)\n"
        "            while True:\n"
        "                signal.pause()\n"
    )
    data.write_text(text.replace(line, hung + line))
    training = Training(own_experiment, "failures.hang_seconds=3", "data.num_workers=1")
    training.wait_for(20)
    Path("hang").touch()
    run = training.end()
    assert run.code == 0, run.err
    assert run.digest == whole.digest
    assert "data.py:" in run.receipt["segments"][0]["why"]


@pytest.mark.release
def test_no_restart_where_it_is_turned_off(experiment: Experiment) -> None:
    training = Training(experiment, "failures.max_restarts=0")
    training.wait_for(20)
    training.process.kill()
    assert training.end().code == -signal.SIGKILL


# ------------------------------------------------------------------------------------------------------------- hangs


def put_in_step(experiment: Experiment, *lines: str) -> None:
    """Put lines at the start of a model's step."""
    model = experiment.root / "model.py"
    line = "        images, labels = batch  # (B, 1, 8, 8), (B,)\n"
    text = model.read_text()
    assert line in text
    model.write_text(text.replace(line, line + "".join(f"        {each}\n" for each in lines)))


def hangs(step: int, how: str, *, rank: int = 1) -> tuple[str, ...]:
    """Return the lines with which a rank hangs once."""
    return (
        "import pathlib, threading",
        f"if self.global_rank == {rank} and self.global_step == {step} and not pathlib.Path('hung').exists():",
        "    pathlib.Path('hung').touch()",
        f"    {how}",
    )


def line_of(experiment: Experiment, how: str) -> str:
    lines = (experiment.root / "model.py").read_text().splitlines()
    return f"model.py:{next(number for number, line in enumerate(lines, 1) if how in line)}"


@pytest.mark.release
def test_a_rank_that_sleeps_and_one_that_is_stopped_are_found_and_started_again(
    own_experiment: Experiment, whole: Run
) -> None:
    how = "threading.Event().wait()"
    put_in_step(own_experiment, *hangs(60, how))
    training = Training(own_experiment, "failures.hang_seconds=3")
    training.wait_for(60)
    training.wait_for_start(2)
    training.wait_for(AT)
    training.ranks()[0].send_signal(signal.SIGSTOP)
    run = training.end()
    assert run.code == 0, run.err
    assert run.digest == whole.digest
    first, second, third = (segment["why"] for segment in run.receipt["segments"])
    assert first.startswith("restarted: rank 1 does not go on at ")
    assert f"{line_of(own_experiment, how)}, in " in first
    assert "after step 60, in train, for 3 s; the other ranks wait in " in first
    assert second.startswith("restarted: rank 0 is stopped (SIGSTOP) after step ")
    assert third is None
    assert 0 < run.receipt["segments"][1]["from_step"] <= 60, "from the copy in memory of rank 0"
    (folder,) = folders(Path("runs"))
    told = (folder / "hang.txt").read_text()
    assert told.count("does not go on at") == 2, "in its title, and above its stacks"
    assert f"line {line_of(own_experiment, how).partition(':')[2]} in " in told
