"""What starts a training again, with small processes in its place: they tell their steps, and die as they are asked."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from labtrain.launch.restarts import is_waited_for, may_restart, run
from labtrain.record.identity import JOB_VARIABLE, Job
from labtrain.record.ranks import RESTARTED, Beacon
from tests.support.waiting import wait_until

# Each start takes the next of the deeds in a file: the steps that it begins from and does, and Python that ends it.
WORK = """
import json, os, pathlib, signal, subprocess, sys
from labtrain.record.ranks import Beacon
beacon, plan = Beacon.find(), pathlib.Path(sys.argv[2])
(begun, step, deed), *rest = json.loads(plan.read_text())
plan.write_text(json.dumps(rest))
pathlib.Path(f"start-{len(rest)}").write_text(json.dumps(dict(os.environ)))
if beacon is not None and begun >= 0:
    beacon.begin(begun, heir=0)
    beacon.advance(step)
exec(deed)
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
RAISES = "beacon.fail('rank 0 raised ValueError', 1); sys.exit(1)"


def begins(name: str, code: str) -> str:
    """Return Python that starts another rank, and waits until its command can be read: exec(2) shows it a while later."""
    code = f"print(flush=True); {code}"
    command = f"[sys.executable, '-S', '-c', {code!r}, 'labtrain.launch.job', 'runs/a']"
    return f"{name} = subprocess.Popen({command}, stdout=subprocess.PIPE); {name}.stdout.readline()"


LONE = begins("lone", "import time; time.sleep(100)")  # fixed: is ended


def job(devices: Any = 2, most: int = 2, *, elastic: bool = False, hang_seconds: float | None = 1500) -> Job:
    config: Any = {
        "trainer": {"devices": devices, "accelerator": "cpu"},
        "failures": {"max_restarts": most, "elastic": elastic, "hang_seconds": hang_seconds},
    }
    return Job(run_id="0" * 12, run_dir="runs/a", root=".", config=config, command=[], code_digest="", lock_digest="")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(*plan: tuple[int, int, str], of: Job | None = None) -> tuple[int, list[int]]:
    """Run a job whose starts do what a plan says; return its exit code and the signals."""
    Path("plan").write_text(json.dumps(plan))

    def start(variables: Mapping[str, str], passed: tuple[int, ...]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", WORK, "labtrain.launch.job", "plan"], env=variables, pass_fds=passed
        )

    return run(of or job(), dict(os.environ), start, interrupts=False)


def started_with(left: int) -> dict[str, str]:
    """Return the environment of the start after which so many deeds were left."""
    return dict(json.loads(Path(f"start-{left}").read_text()))


def test_a_killed_training_is_started_again_and_knows_why(capfd: pytest.CaptureFixture[str]) -> None:
    assert trained((0, 5, KILLED), (4, 9, "pass")) == (0, [])
    assert RESTARTED not in started_with(1)
    assert started_with(0)[RESTARTED] == "rank 0 was killed by SIGKILL"
    assert Beacon.VARIABLE not in started_with(0), "the ranks that it starts must not take it for theirs"
    assert "rank 0 was killed by SIGKILL: labtrain starts all processes again" in capfd.readouterr().err


def test_three_deaths_at_one_step_are_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    """Deaths at other steps do not count, nor does a death before the training begins reset the count."""
    killed = [(0, 1, KILLED), (1, 2, KILLED), (2, 3, KILLED), (3, 4, KILLED), (-1, -1, KILLED), (4, 4, KILLED)]
    assert trained(*killed, (4, 9, "pass")) == (-signal.SIGKILL, [])
    assert "died 3 times at step 4: no further restart (failures.max_restarts=2)" in capfd.readouterr().err
    assert json.loads(Path("plan").read_text()) == [[4, 9, "pass"]]


def test_an_exception_is_tried_again_once_there_was_a_step() -> None:
    assert trained((0, 5, RAISES), (5, 5, RAISES), (5, 9, "pass")) == (1, [])
    assert json.loads(Path("plan").read_text()) == [[5, 9, "pass"]]


@pytest.mark.parametrize("deed", ["sys.exit(2)", "sys.exit(75)", "sys.exit(1)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_what_was_no_death_is_final(deed: str) -> None:
    """An error for people, a stop, an exit that the training did not explain, and a signal that asks to stop."""
    code, _ = trained((0, 5, deed), (0, 9, "pass"))
    assert code in (1, 2, 75, -signal.SIGTERM)
    assert json.loads(Path("plan").read_text()) == [[0, 9, "pass"]]


def test_the_exit_code_is_that_of_the_rank_that_died() -> None:
    told = "beacon.fail('rank 1 was killed by SIGKILL', 137); sys.exit(1)"
    assert trained((0, 5, told), (5, 5, told), (5, 5, told))[0] == 137


def test_no_rank_is_left_behind() -> None:
    """Rank 0 is killed; the rank that it had started, and that hangs, is ended before the next start."""
    says = "; pathlib.Path('lone').write_text(str(lone.pid)); "
    assert trained((0, 5, f"{LONE}{says}{KILLED}"), (5, 9, "pass"))[0] == 0
    assert not Path(f"/proc/{Path('lone').read_text()}").exists()


def test_a_rank_that_saves_may_end_first() -> None:
    heir = "import time, pathlib; time.sleep(0.5); pathlib.Path('saved').touch()"  # fixed: a save
    deed = f"{begins('heir', heir)}; beacon.begin(0, heir=heir.pid); {KILLED}"
    assert trained((0, 5, deed), (5, 9, "assert pathlib.Path('saved').exists()"))[0] == 0


def test_a_signal_reaches_the_training_and_nothing_starts_again() -> None:
    deed = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); os.kill(os.getppid(), signal.SIGTERM); signal.pause()"
    )
    assert trained((0, 5, deed), (5, 9, "pass")) == (75, [signal.SIGTERM])
    assert json.loads(Path("plan").read_text()) == [[5, 9, "pass"]]


def test_it_goes_on_with_one_process_less_after_two_kills_at_one_step() -> None:
    assert trained(*[(0, 5, KILLED)] * 2, (5, 9, "pass"), of=job(3, elastic=True))[0] == 0
    devices = [Job.from_json(started_with(left)[JOB_VARIABLE]).config["trainer"]["devices"] for left in (1, 0)]
    assert devices == [3, 2]


@pytest.mark.parametrize(
    ("devices", "most", "again"),
    [(2, 2, True), (1, 2, False), ([0], 2, False), ([0, 1], 2, True), ("auto", 2, True), (2, 0, False)],
)
def test_which_trainings_it_starts_again(devices: Any, most: int, *, again: bool) -> None:
    assert may_restart(job(devices, most)) is again


@pytest.mark.parametrize(
    ("devices", "most", "hang_seconds", "waits"),
    [(2, 2, None, True), (2, 0, 9, True), (2, 0, None, False), (1, 2, 9, False)],
)
def test_which_trainings_it_waits_for(devices: Any, most: int, hang_seconds: float | None, *, waits: bool) -> None:
    assert is_waited_for(job(devices, most, hang_seconds=hang_seconds)) is waits


@pytest.mark.parametrize("most", [0, 2])
def test_a_hang_of_rank_0_ends_with_its_error(most: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Its watcher has told why, and killed it: it cannot say so itself."""
    hangs = f"beacon.fail('rank 0 does not go on at model.py:3', 137, hung=True); {KILLED}"
    assert trained(*[(5, 5, hangs)] * (most + 1), of=job(most=most)) == (1, [])
    said = capfd.readouterr().err
    assert said.count("error: rank 0 does not go on at model.py:3\n\nhint: less runs/a/hang.txt shows") == 1
    assert said.count("labtrain starts all processes again") == most


def test_under_a_launcher_that_starts_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RUN_ID", "RESTART_COUNT"):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", "0")
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert not may_restart(job())


def test_the_memory_outlives_its_writer() -> None:
    beacon, descriptor = Beacon.make()
    assert (beacon.begun, beacon.step, beacon.why) == (-1, -1, "")
    code = "from labtrain.record.ranks import Beacon; import os; b = Beacon.find(); b.begin(3, heir=7); b.advance(9); b.fail('é', 137); os.abort()"
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, Beacon.VARIABLE: str(descriptor)},
        pass_fds=(descriptor,),
        check=False,
    )
    os.close(descriptor)
    wait_until(lambda: beacon.why == "é", 5)
    assert (beacon.begun, beacon.step, beacon.heir, beacon.code) == (3, 9, 7, 137)
