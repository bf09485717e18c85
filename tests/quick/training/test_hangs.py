"""What finds the rank that hangs, with small processes in place of the ranks: each beats until it hangs in its way."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from labtrain.record.ranks import Beacon
from labtrain.training.callbacks.watcher import Sight, judge
from tests.support.waiting import wait_until

# A rank: it beats five times, then does what it is told. `collective` waits as in one of torch's.
RANK = """
import json, os, signal, sys, threading, time
from labtrain.base.signals import end_with_parent
from labtrain.training.callbacks import watcher
def batch():
    time.sleep(0.1)  # fixed: how long a batch takes
def forever():
    threading.Event().wait()
source = "def all_reduce():\\n    threading.Event().wait()"
exec(compile(source, "torch/distributed/distributed_c10d.py", "exec"))
told = json.loads(sys.argv[1])
told |= {name: os.memfd_create(name) for name in ("pulse", "stacks")} | {"process": os.getpid()}
pulse = watcher.Pulse(told["pulse"])
process = watcher.start(watcher.Told(**told))
for step in range(1, 6):
    pulse.beat(step, 0)
exec(compile(sys.argv[2], "model.py", "exec"))
"""
SECONDS = 0.5
WAITS = "all_reduce()"


class Ranks:
    """Two ranks and their watchers.

    Args:
        deeds: what each does after its steps.
    """

    def __init__(self, *deeds: str) -> None:
        self.beacon, descriptor = Beacon.make()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listens:
            listens.bind(("127.0.0.1", 0))
            told = {
                "world": 2, "seconds": SECONDS, "run_dir": str(Path.cwd()), "address": "127.0.0.1",
                "port": listens.getsockname()[1], "token": "secret", "waited_for": True,
            }  # fmt: skip
            self.port, self.processes = told["port"], []
            for rank, deed in enumerate(deeds):
                own = {
                    "rank": rank,
                    "socket": None if rank else listens.fileno(),
                    "beacon": None if rank else descriptor,
                }
                command = [sys.executable, "-c", RANK, json.dumps(told | own), deed]
                passed = () if rank else (listens.fileno(), descriptor)
                self.processes.append(subprocess.Popen(command, pass_fds=passed))
        os.close(descriptor)

    def killed(self) -> list[int]:
        """Wait until a rank is killed; return which."""
        wait_until(lambda: any(each.poll() is not None for each in self.processes), 60)
        return [rank for rank, each in enumerate(self.processes) if each.poll() == -signal.SIGKILL]

    def end(self) -> None:
        for each in self.processes:
            each.kill()
            each.wait()


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ended() -> Iterator[list[Ranks]]:
    """Ranks to end after the test."""
    found: list[Ranks] = []
    yield found
    for each in found:
        each.end()


@pytest.mark.parametrize(
    ("deeds", "silent", "why"),
    [
        ((WAITS, "\n\nforever()"), 1, "rank 1 does not go on at model.py:3, in <module> after step 5"),
        (("import itertools\nsum(itertools.repeat(0))", WAITS), 0, "rank 0 does not go on at model.py:2"),
        ((WAITS, "os.kill(os.getpid(), signal.SIGSTOP)"), 1, "rank 1 is stopped (SIGSTOP) after step 5, in train"),
        ((WAITS, WAITS), 1, "all ranks wait for each other for 0.5 s after step 5: rank 0 waits in all_reduce"),
    ],
    ids=["asleep", "in C with the interpreter's lock", "stopped", "all in collectives"],
)
def test_the_rank_that_hangs_is_found_and_killed(
    ended: list[Ranks], deeds: tuple[str, str], silent: int, why: str
) -> None:
    ranks = Ranks(*deeds)
    ended.append(ranks)
    assert ranks.killed() == [silent]
    assert ranks.beacon.why.startswith(why)
    assert ranks.beacon.code == 137
    if "waits" not in why:
        assert ranks.beacon.why.endswith("for 0.5 s; the other ranks wait in all_reduce")
    assert ranks.beacon.why in Path("hang.txt").read_text()


def test_the_stacks_of_its_children_are_told_too_and_only_theirs(ended: list[Ranks]) -> None:
    """A forked loader worker hangs: its own line is in the file. Another program is not asked, which would end it."""
    forks = "import subprocess\nother = subprocess.Popen(['tail', '-f', '/dev/null'])\nme = os.getpid()\n"
    forks += "if os.fork() == 0:\n    end_with_parent(me, signal.SIGKILL)\n    forever()\nos.wait()"
    ranks = Ranks(WAITS, forks)
    ended.append(ranks)
    wait_until(lambda: psutil.Process(ranks.processes[1].pid).children(), 60)
    wait_until(Path("hang.txt").exists, 60)
    assert 'File "model.py", line 6 in <module>' in Path("hang.txt").read_text()
    other = [each for each in psutil.process_iter(["cmdline", "cwd"]) if each.info["cmdline"] == ["tail", "-f", "/dev/null"]
             and each.info["cwd"] == str(Path.cwd())]  # fmt: skip
    assert len(other) == 1
    other[0].kill()


def test_a_rank_that_goes_on_or_saves_does_not_hang(ended: list[Ranks]) -> None:
    """Rank 0 waits for rank 1, which validates, then writes to a slow disk; a stranger's message kills nobody."""
    validates = "for each in range(25):\n    pulse.beat(5, 1)\n    batch()\n"
    saves = "pulse.beat(5, watcher.SAVE)\nfor each in range(25):\n    open('saved', 'a').write('x')\n    batch()\n"
    ranks = Ranks(WAITS, f"{validates}{saves}pulse.beat(6, 0)\nopen('done', 'w').close()\nforever()")
    ended.append(ranks)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for text in (b"", b"[]", b'{"token": "guess", "kill": true}', b'{"kill": true}', b"\xff"):
            stranger.sendto(text, ("127.0.0.1", ranks.port))
    wait_until(Path("done").exists, 60)
    assert not Path("hang.txt").exists()
    assert ranks.killed() == [1]


BACKWARD = '  File "torch/autograd/graph.py", line 8 in _engine_run_backward\n'
COLLECTIVE = '  File "torch/distributed/distributed_c10d.py", line 8 in barrier\n'


def sight(rank: int, still_s: float, *, step: int = 5, state: str = "S", calls: str = "") -> Sight:
    stacks = {"1": calls} if calls else {}
    return Sight(rank=rank, host="n", process=1, still_s=still_s, step=step, doing="train", state=state, stacks=stacks)


@pytest.mark.parametrize(
    ("sights", "silent"),
    [
        ([sight(0, 10)], None),
        ([sight(0, 10), sight(1, 9)], None),
        ([sight(0, 10), sight(1, -1)], None),
        ([sight(0, 10), sight(1, 10)], [0, 1]),
        ([sight(0, 10, step=6), sight(1, 10)], [1]),
        ([sight(0, 10, calls=BACKWARD), sight(1, 10)], [1]),
        ([sight(0, 10, calls=BACKWARD), sight(1, 10, calls=COLLECTIVE)], [0]),
        ([sight(0, 10, calls=BACKWARD), sight(1, 10, calls=BACKWARD)], [1]),
        ([sight(0, 10, step=6, state="D"), sight(1, 10)], [0, 1]),
    ],
    ids=[
        "not heard",
        "one goes on",
        "before its first step",
        "nothing tells them apart",
        "behind",
        "DDP",
        "a backward that waits",
        "both",
        "disk",
    ],
)
def test_who_hangs(sights: list[Sight], silent: list[int] | None) -> None:
    found = judge({each.rank: each for each in sights}, seconds=10, world=2)
    assert (found and found.ranks) == silent
