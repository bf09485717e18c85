"""Watches one rank of a training from a process beside it, and finds the rank that hangs. No torch.

A rank may hang in Python, in C code that holds the interpreter, or in a collective. Or it is stopped: nothing in it
runs. So each rank has a small process that looks at a counter in shared memory (Pulse). Each batch and each save moves
it. If it stands still, the watcher asks the rank for its stacks by a signal. faulthandler answers it from C. It tells
the watcher of rank 0 (UDP, with a token), which decides once no rank moves. A rank that waits in a collective does not
hang; the one that it waits for does. That one is killed, which is a death.

Time counts only while the watcher itself runs. So a job that is suspended as a whole does not hang.
"""

import faulthandler
import json
import mmap
import os
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from labtrain.base.console import quoted, visible
from labtrain.base.errors import LabtrainError
from labtrain.base.signals import children_of, end_with_parent, status_of
from labtrain.record.ranks import Beacon

MODULE = "labtrain.training.callbacks.watcher"
FILE = "hang.txt"  # in the run's folder
SIGNAL = signal.SIGRTMIN + 3  # asks a process for its stacks
DOING = ("train", "validation", "test", "save")
SAVE = DOING.index("save")
STEADY_S, ANSWERS_S, WRITES_S = 0.1, 3.0, 5.0
LONGEST_TICK_S = 5.0
LOST_S = 30.0  # without a word of another rank's watcher: its machine is gone
LONGEST = 40_000  # characters of a rank's stacks, so that they fit in a datagram
SHOWN, CALLS = 8, 12  # ranks, and innermost calls of each, on standard error; the file has all
BACKWARD = "backward"
STATES = {
    "T": "is stopped (SIGSTOP)",
    "t": "is stopped by a debugger",
    "D": "waits for a disk or a network file system",
    "Z": "has ended",
    "?": "is not heard any more: its machine may be gone",
}
NOT_OWN = (str(Path(__file__).parents[2]), "<")
FRAME = re.compile(r'  File "(.+)", line (\d+|\?\?\?) in (.+)')


class Pulse:
    """Memory that a rank shares with its watcher: a counter, the last finished step, and what the rank does."""

    NUMBERS = struct.Struct("<3q")

    def __init__(self, descriptor: int) -> None:
        os.ftruncate(descriptor, self.NUMBERS.size)
        self.memory = mmap.mmap(descriptor, self.NUMBERS.size)
        self.count = 0

    def beat(self, step: int, doing: int) -> None:
        """Tell that the rank goes on."""
        self.count += 1
        self.NUMBERS.pack_into(self.memory, 0, self.count, step, doing)

    def read(self) -> tuple[int, int, int]:
        """Return the counter, which is 0 before the first step; the step; and the index in DOING."""
        return cast(tuple[int, int, int], self.NUMBERS.unpack_from(self.memory))


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What a rank tells its watcher, as JSON. The file descriptors are inherited."""

    rank: int
    world: int
    process: int
    seconds: float
    run_dir: str
    address: str
    port: int
    token: str
    pulse: int
    stacks: int
    socket: int | None  # of rank 0
    beacon: int | None  # of rank 0
    waited_for: bool  # whether the process that started the training waits for its end


def hint(run_dir: str) -> str:
    """Return what to do about a hang."""
    return f"less {quoted(f'{run_dir}/{FILE}')} shows where each rank was; the same command resumes"


def start(told: Told) -> subprocess.Popen[bytes]:
    """Start the process that watches this one."""
    faulthandler.register(SIGNAL, file=told.stacks, all_threads=True)
    passed = [each for each in (told.pulse, told.stacks, told.socket, told.beacon) if each is not None]
    # -P: a file of the experiment must not take the place of a module.
    watcher = subprocess.Popen([sys.executable, "-P", "-m", MODULE], stdin=subprocess.PIPE, stdout=2, pass_fds=passed)
    assert watcher.stdin is not None
    with watcher.stdin as stdin:
        stdin.write(json.dumps(asdict(told)).encode() + b"\n")
    return watcher


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What the watcher of a rank sees.

    Attributes:
        still_s: for how long the rank has not moved; -1 before its first step.
        stacks: of the rank and its loader workers by process, once it has been still for too long.
        state: of the process, one letter as in ps(1).
    """

    rank: int
    host: str
    process: int
    still_s: float
    step: int
    doing: str
    state: str
    stacks: dict[str, str]

    @property
    def main(self) -> list[tuple[str, str, str]]:
        """File, line and function of the training's thread, the innermost call first."""
        threads = re.split(r"\n\n", self.stacks.get(str(self.process), ""))
        training = [each for each in threads if "labtrain/training/fit.py" in each] or threads[-1:]
        return FRAME.findall(training[0]) if training else []

    @property
    def collective(self) -> str:
        """The collective that the rank waits in; empty if it does not wait for other ranks.

        DDP exchanges gradients in a backward pass. But that may also wait for something else.
        """
        if self.state in STATES:
            return ""
        file, _, function = self.main[0] if self.main else ("", "", "")
        if function == "_engine_run_backward":  # torch/autograd/graph.py; the rest is in C++
            return BACKWARD
        if "/torch/distributed/" in file or file.endswith("torch/nn/parallel/distributed.py"):
            return function
        return next((name for file, _, name in self.main[:3] if file.endswith("distributed/distributed_c10d.py")), "")

    @property
    def place(self) -> str:
        """The innermost line of the experiment's code, in the training's thread or a loader worker; else labtrain's."""
        workers = [] if self.collective else FRAME.findall("".join(self.stacks.values()))
        shipped = [each for each in [*self.main, *workers] if "/lib/python3" not in each[0]]
        found = [each for each in shipped if not each[0].startswith(NOT_OWN)] or shipped or self.main
        return "{}:{}, in {}".format(*found[0]) if found else ""

    def told(self) -> str:
        """How the rank stands, in words."""
        how = f"waits in {self.collective}" if self.collective else STATES.get(self.state, "does not go on")
        return f"rank {self.rank} {how}{f' at {self.place}' if self.place else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """A training in which no rank goes on: the ranks to kill, and why."""

    ranks: list[int]
    why: str


def judge(sights: Mapping[int, Sight], *, seconds: float, world: int) -> Hang | None:
    """Return which ranks hang; None as long as one goes on, or has not told yet."""
    if len(sights) < world or any(each.still_s < seconds for each in sights.values()):
        return None
    silent = [each for each in sights.values() if not each.collective]
    if not silent and any(each.collective != BACKWARD for each in sights.values()):
        silent = [each for each in sights.values() if each.collective == BACKWARD]
    if silent:
        behind = min(each.step for each in silent)
        silent = [each for each in silent if each.step == behind or each.state in STATES]
        waits = {each.collective for each in sights.values() if each.collective and each not in silent}
        first = min(silent, key=lambda each: each.rank)
        others = f" and {len(silent) - 1} more ranks" if len(silent) > 1 else ""
        waiting = f"; the other ranks wait in {', '.join(sorted(waits))}" if waits else ""
        why = f"{first.told()}{others} after step {first.step}, in {first.doing}, for {seconds:g} s{waiting}"
        return Hang(ranks=sorted(each.rank for each in silent), why=why)
    where = ", ".join(
        dict.fromkeys(each.told() for each in sorted(sights.values(), key=lambda each: each.rank)[:SHOWN])
    )
    step = min(each.step for each in sights.values())
    why = f"all ranks wait for each other for {seconds:g} s after step {step}: {where}"
    # No rank is more wrong than another one. Rank 0 survives to save its copy of the state.
    return Hang(ranks=[world - 1], why=why)


class Watcher:
    """The process beside a rank."""

    def __init__(self, told: Told) -> None:
        self.told, self.process = told, told.process
        self.pulse = Pulse(told.pulse)
        self.tick_s = min(told.seconds / 10, LONGEST_TICK_S)
        self.socket = self._socket()
        self.address = (told.address, told.port)
        self.mark: tuple[int, int] | None = None
        self.still_s = 0.0
        self.stacks: dict[str, str] = {}
        self.others: dict[int, tuple[Sight, float]] = {}  # of the other ranks, with the time
        self.addresses: dict[int, tuple[str, int]] = {}  # of their watchers
        self.found = 0

    def _socket(self) -> socket.socket:
        if self.told.socket is not None:
            return socket.socket(fileno=self.told.socket)
        return socket.socket(socket.AF_INET6 if ":" in self.told.address else socket.AF_INET, socket.SOCK_DGRAM)

    def run(self) -> None:
        """Watch until the rank ends."""
        while True:
            self._listen()
            sight = self._look()
            if self.told.rank:
                message = json.dumps({"token": self.told.token, "sight": asdict(sight)}, ensure_ascii=False).encode()
                with suppress(OSError):  # for example that machine is gone: then this rank ends by itself
                    self.socket.sendto(message, self.address)
            elif (hang := self._judge(sight)) is not None:
                self._end(hang, sight)

    def _listen(self) -> None:
        """Read messages for a tick."""
        begun_s = time.monotonic()
        while (left_s := begun_s + self.tick_s - time.monotonic()) > 0:
            self.socket.settimeout(left_s)
            try:
                data, address = self.socket.recvfrom(65_536)
                message = json.loads(data)
                if not secrets.compare_digest(str(message["token"]), self.told.token):
                    continue
            except TimeoutError:
                break
            except (OSError, ValueError, KeyError, TypeError):  # not from a watcher
                continue
            if message.get("kill"):
                os.kill(self.process, signal.SIGKILL)
            elif "sight" in message:
                sight = Sight(**message["sight"])
                self.others[sight.rank], self.addresses[sight.rank] = (sight, time.monotonic()), address
        # Not more than a tick: this process may have been stopped together with the rank.
        self.still_s += min(time.monotonic() - begun_s, self.tick_s)

    def _look(self) -> Sight:
        count, step, doing = self.pulse.read()
        mark = (count, _bytes_moved(self.process) if doing == SAVE else 0)
        if mark != self.mark or not count:
            self.mark, self.still_s, self.stacks = mark, 0.0, {}
        elif self.still_s >= self.told.seconds and not self.stacks:
            self.stacks = stacks_of(self.process, self.told.stacks)
        return Sight(
            rank=self.told.rank,
            host=os.uname().nodename,
            process=self.process,
            still_s=self.still_s if count else -1.0,
            step=step,
            doing=DOING[doing],
            state=_state(self.process),
            stacks=self.stacks,
        )

    def _judge(self, sight: Sight) -> Hang | None:
        sights = {sight.rank: sight}
        for rank, (other, heard_s) in self.others.items():
            is_lost = time.monotonic() - heard_s > max(LOST_S, 3 * self.tick_s)
            still_s = self.told.seconds if is_lost and other.still_s >= 0 else other.still_s
            sights[rank] = Sight(**asdict(other) | {"still_s": still_s, "state": "?" if is_lost else other.state})
        return judge(sights, seconds=self.told.seconds, world=self.told.world)

    def _end(self, hang: Hang, sight: Sight) -> None:
        """Write what was found, and have the silent ranks killed; all of them, if that has not helped before."""
        sights = sorted([sight, *(other for other, _ in self.others.values())], key=lambda each: each.rank)
        ranks = list(range(self.told.world)) if self.found else hang.ranks
        self.found += 1
        # Standard error first: the run's folder may be on the file system that hangs.
        kills = f"labtrain kills rank {', '.join(map(str, ranks))}"
        _print(f"warning: {self.told.run_dir}: {hang.why}: {kills}\n\n")
        _print("".join(report(each, whole=False) for each in sights[:SHOWN]))
        if 0 in ranks and not self.told.waited_for:  # else that process ends with the error
            _print(f"error: {LabtrainError(hang.why, hint=hint(self.told.run_dir))}\n")
        writes = threading.Thread(target=self._write, args=(hang, sights), daemon=True)
        writes.start()
        writes.join(WRITES_S)
        if self.told.beacon is not None:
            Beacon(mmap.mmap(self.told.beacon, Beacon.SIZE_BYTES)).fail(hang.why, 128 + signal.SIGKILL, hung=True)
        self.still_s, self.others = 0.0, {rank: each for rank, each in self.others.items() if rank not in ranks}
        for rank in ranks:
            if rank and rank in self.addresses:
                self.socket.sendto(json.dumps({"token": self.told.token, "kill": True}).encode(), self.addresses[rank])
        if 0 in ranks:
            os.kill(self.process, signal.SIGKILL)

    def _write(self, hang: Hang, sights: list[Sight]) -> None:
        with suppress(OSError), (Path(self.told.run_dir) / FILE).open("a") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {hang.why}\n\n")
            file.writelines(report(each, whole=True) for each in sights)


def report(sight: Sight, *, whole: bool) -> str:
    """Return a rank's state and stacks.

    Args:
        sight: of the rank.
        whole: all threads and loader workers; else the training's thread.
    """
    head = f"{sight.told()} (process {sight.process} on {sight.host}, step {sight.step}, {sight.doing})\n"
    if whole:
        return head + "".join(f"process {process}:\n{text}\n" for process, text in sight.stacks.items()) + "\n"
    return head + "".join(f"  {file}:{line}, in {name}\n" for file, line, name in sight.main[:CALLS]) + "\n"


def stacks_of(process: int, descriptor: int) -> dict[str, str]:
    """Return the Python stacks of a process, and of its children that answer, too; by process.

    Args:
        process: which has called faulthandler.register.
        descriptor: the file where it writes them.
    """
    found: dict[str, str] = {}
    for each in [process, *children_of(process)]:
        if not _answers(each, descriptor):
            continue
        before = os.fstat(descriptor).st_size
        with suppress(ProcessLookupError):
            os.kill(each, SIGNAL)
        deadline_s, size, ends_s = time.monotonic() + ANSWERS_S, before, time.monotonic() + ANSWERS_S
        while time.monotonic() < min(deadline_s, ends_s):
            time.sleep(STEADY_S / 4)
            if (now := os.fstat(descriptor).st_size) != size:
                size, ends_s = now, time.monotonic() + STEADY_S
        found[str(each)] = os.pread(descriptor, size - before, before).decode(errors="replace")[:LONGEST]
    most = LONGEST
    for name, text in found.items():  # the rank's own come first
        found[name], most = text[:most], max(0, most - len(text))
    return found


def _answers(process: int, descriptor: int) -> bool:
    """Return whether a process's faulthandler answers. The signal would kill any other process."""
    with suppress(OSError):
        own = os.fstat(descriptor)
        caught = int(re.search(r"^SigCgt:\s+(\w+)", Path(f"/proc/{process}/status").read_text(), re.M)[1], 16)  # type: ignore[index]
        held = (each.stat() for each in Path(f"/proc/{process}/fd").iterdir())
        return bool(caught >> (SIGNAL - 1) & 1) and any(os.path.samestat(own, each) for each in held)
    return False


def _state(process: int) -> str:
    with suppress(OSError):
        return status_of(process)[0]
    return "Z"


def _bytes_moved(process: int) -> int:
    """Return how much a process and its children have read and written: a save to a slow disk goes on."""
    total = 0
    for each in [process, *children_of(process)]:
        with suppress(OSError):
            total += sum(map(int, re.findall(r"char: (\d+)", Path(f"/proc/{each}/io").read_text())))
    return total


def _print(text: str) -> None:
    sys.stderr.write(visible(text))
    sys.stderr.flush()


def main() -> None:
    """Watch the process that started this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    told = Told(**json.loads(sys.stdin.readline()))
    end_with_parent(told.process, signal.SIGKILL)
    Watcher(told).run()


if __name__ == "__main__":
    main()
