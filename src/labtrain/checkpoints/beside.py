"""Runs a Writer beside the training: in a process that was forked early, or in a thread.

A thread would compete with the training for Python's interpreter. So a training's process forks another one after its
imports, before it starts a thread or uses CUDA (fork(2) copies only one thread, and no CUDA context). It waits until
there is something to write. The state is in memory that both see (memory.py).

The process survives the training's. It finishes the save that it has, and ends. The training survives it, too: then a
thread writes. A thread also writes a state that is spread over the ranks, because torch's writer has to exchange
messages with the other ranks.
"""

import io
import mmap
import os
import pickle
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol, TextIO, cast

import torch
import torch.distributed as dist

from labtrain.base.contracts import State
from labtrain.base.errors import LabtrainError, StoreError, in_words
from labtrain.base.signals import WRITER_NAME
from labtrain.checkpoints.memory import Form, OwnMemory, SharedMemory
from labtrain.checkpoints.writer import Opened, Save, Writer, Written

POLL_S = 0.25
NICE = 10  # the training goes first where both want a core
BOARD_BYTES = 4096
Make = Callable[[], Writer]
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Host(Protocol):
    """Where a Writer runs. `start` and `finish` are one save; the other methods answer when they are done."""

    @property
    def memory(self) -> OwnMemory | SharedMemory:
        """Where the state is copied to."""

    def open(self, make: Make, *, known: set[str] | None, follows: str | None = None) -> Opened:
        """Make the writer, and call its `open`."""

    def start(self, save: Save, state: State, group: "dist.ProcessGroup | None") -> None:
        """Begin to write a state, which is in `memory` and does not change until `finish`."""

    def is_done(self) -> bool:
        """Return whether `finish` would not wait."""

    def finish(self) -> Written:
        """Wait for the save."""

    def check(self) -> None:
        """Raise an error of the delivery."""

    def status(self) -> str:
        """Return the writer's status."""

    def close(self, scores: dict[str, float], *, seconds: float, wanted: bool) -> set[str]:
        """Call the writer's `close`."""

    def abandon(self) -> None:
        """Call the writer's `abandon`."""

    def end(self) -> None:
        """Release the process, which then ends."""


class DiedError(Exception):
    """The writer's process was killed."""


class InThread:
    """Runs a Writer in this process: each save in a thread."""

    def __init__(self, make: Make) -> None:
        self.memory, self.writer = OwnMemory(), make()
        self.thread: threading.Thread | None = None
        self.written: Written | None = None

    def open(self, make: Make, *, known: set[str] | None, follows: str | None = None) -> Opened:
        return self.writer.open(known=known, follows=follows)

    def start(self, save: Save, state: State, group: "dist.ProcessGroup | None") -> None:
        def write() -> None:
            self.written = self.writer.write(save, state, group)

        self.thread = threading.Thread(target=write, daemon=True)
        self.thread.start()

    def is_done(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def finish(self) -> Written:
        assert self.thread is not None
        self.thread.join()
        assert self.written is not None
        return self.written

    def check(self) -> None:
        self.writer.check()

    def status(self) -> str:
        return self.writer.status()

    def close(self, scores: dict[str, float], *, seconds: float, wanted: bool) -> set[str]:
        return self.writer.close(scores, seconds=seconds, wanted=wanted)

    def abandon(self) -> None:
        self.writer.abandon()

    def end(self) -> None:
        pass


class InProcess:
    """Runs a Writer in a process that this object forks.

    The two exchange messages: a method and its arguments there, its result back, and between them what to print and
    errors of the delivery. `board` is memory that both see: the number of messages from the process, modulo 256, so
    that looking for one costs nothing; and the status.
    """

    def __init__(self) -> None:
        self.memory = SharedMemory()
        self.board = mmap.mmap(-1, BOARD_BYTES)
        self.connection, other = Pipe()
        self.parent, self.read = os.getpid(), 0
        self.waits = False  # for an answer
        self.answer: object = None
        self.trouble: LabtrainError | None = None
        with warnings.catch_warnings():
            # Python counts the threads of libraries, such as OpenBLAS, which stops and restarts its own.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                self.connection.close()
                _Serving(self, other).run()
            finally:
                os._exit(0)
        other.close()

    def open(self, make: Make, *, known: set[str] | None, follows: str | None = None) -> Opened:
        return cast(Opened, self._call("open", make, {"known": known, "follows": follows}))

    def start(self, save: Save, state: State, group: "dist.ProcessGroup | None") -> None:
        assert group is None
        self._send("write", save, state)

    def is_done(self) -> bool:
        try:
            while self.answer is None and self.connection.poll():
                self._take()
        except DiedError:
            return True
        return self.answer is not None

    def finish(self) -> Written:
        return cast(Written, self._wait())

    def check(self) -> None:
        while self.board[0] != self.read and self.connection.poll():  # the number comes after the message
            self._take()
        if self.trouble is not None:
            raise self.trouble

    def status(self) -> str:
        length = int.from_bytes(self.board[1:3], "little")
        return self.board[3 : 3 + length].decode(errors="replace")

    def close(self, scores: dict[str, float], *, seconds: float, wanted: bool) -> set[str]:
        return cast(set[str], self._call("close", scores, {"seconds": seconds, "wanted": wanted}))

    def abandon(self) -> None:
        self._call("abandon")

    def end(self) -> None:
        with suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as own:
            own.shutdown(socket.SHUT_RDWR)  # a forked child, such as a loader's worker, holds it open, too
        self.connection.close()
        if not self.waits:  # Ctrl-C may have ended the wait: then the process ends after this one
            with suppress(ChildProcessError):  # SIGCHLD is ignored, or other code has waited for it
                os.waitpid(self.pid, 0)

    def _call(self, method: str, *arguments: object) -> object:
        self._send(method, *arguments)
        return self._wait()

    def _send(self, method: str, *arguments: object) -> None:
        buffer = io.BytesIO()
        buffer.write(self.memory.size_bytes.to_bytes(8, "little"))
        _Pickler(buffer, self.memory).dump((method, arguments))
        try:
            self.connection.send_bytes(buffer.getbuffer())
        except OSError as error:
            raise DiedError from error
        self.waits = True

    def _wait(self) -> object:
        while self.answer is None:
            self._take()
        found, self.answer, self.waits = self.answer, None, False
        kind, value = cast(tuple[str, object], found)
        if kind == "error":
            raise cast(Exception, value)
        return value

    def _take(self) -> None:
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError) as error:
            self.waits = False  # `end` reaps it
            raise DiedError from error
        self.read = (self.read + 1) % 256
        if kind == "say":
            sys.stderr.write(value)
        elif kind == "trouble":
            self.trouble = value
        else:
            self.answer = kind, value


class _Serving:
    """The forked process's side: it does what it is told, until the training's process is gone."""

    def __init__(self, host: InProcess, connection: Connection) -> None:
        self.host, self.connection = host, connection
        self.writer: Writer | None = None
        self.has_told = False
        self.one_at_a_time = threading.Lock()  # the delivery's thread prints, too

    def run(self) -> None:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        os.nice(NICE)
        with suppress(OSError):
            Path("/proc/self/comm").write_text(WRITER_NAME)
        torch.set_num_threads(1)  # libraries for several threads do not survive a fork
        sys.stdout = sys.stderr = cast(TextIO, _Told(self))
        with suppress(EOFError, OSError):
            while self.connection.poll(POLL_S) or not self._is_alone():  # what was sent before it died is done
                if self.connection.poll():
                    self._serve()
                elif self.writer is not None:
                    self._look(self.writer)
        if self.writer is not None:
            self.writer.abandon()

    def _is_alone(self) -> bool:
        return os.getppid() != self.host.parent

    def _serve(self) -> None:
        message = self.connection.recv_bytes()
        self.host.memory.show(int.from_bytes(message[:8], "little"))
        method, arguments = _Unpickler(io.BytesIO(message[8:]), self.host.memory).load()
        try:
            answer = ("answer", self._do(method, arguments))
        except Exception as error:
            answer = ("error", error if isinstance(error, LabtrainError) else StoreError(in_words(error)))
        self.tell(*answer)

    def _do(self, method: str, arguments: tuple[object, ...]) -> object:
        match method, arguments:
            case "open", (make, dict() as options):
                self.writer = cast(Make, make)()
                return self.writer.open(**options)
            case "write", (Save() as save, dict() as state) if self.writer is not None:
                return self.writer.write(save, state)
            case "close", (dict() as scores, dict() as options) if self.writer is not None:
                return self.writer.close(scores, **options, gone=self._is_alone)
            case _ if self.writer is not None:
                self.writer.abandon()
        return None

    def _look(self, writer: Writer) -> None:
        """Show the status, and tell the first error of the delivery."""
        status = writer.status().encode()[: BOARD_BYTES - 3]
        self.host.board[1 : 3 + len(status)] = len(status).to_bytes(2, "little") + status
        try:
            writer.check()
        except LabtrainError as error:
            if not self.has_told:
                self.has_told = True
                self.tell("trouble", error)

    def tell(self, kind: str, value: object) -> None:
        """Send a message to the training's process."""
        with self.one_at_a_time:
            self.connection.send((kind, value))
            self.host.board[0] = (self.host.board[0] + 1) % 256


class _Told(io.TextIOBase):
    """Standard output and error of the forked process: the training's process prints it."""

    def __init__(self, serving: _Serving) -> None:
        self.serving = serving

    def write(self, text: str) -> int:
        with suppress(OSError):  # nobody is there any more
            self.serving.tell("say", text)
        return len(text)


class _Pickler(pickle.Pickler):
    """Sends a tensor in shared memory as its place."""

    def __init__(self, file: io.BytesIO, memory: SharedMemory) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.memory = memory

    def persistent_id(self, value: object) -> tuple[int, Form] | None:
        return self.memory.places.get(id(value)) if isinstance(value, torch.Tensor) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: SharedMemory) -> None:
        super().__init__(file)
        self.memory = memory

    def persistent_load(self, place: tuple[int, Form]) -> torch.Tensor:
        return self.memory.tensor(*place)


_forked: InProcess | None = None


def fork() -> None:
    """Fork the process in which this process's next training writes its checkpoints; not in a debugger.

    debugpy follows each fork, and the fork waits until somebody attaches to it.
    """
    global _forked
    _forked = InProcess() if "pydevd" not in sys.modules else None


def take_forked() -> InProcess | None:
    """Return the process that was forked, once; None if there is none."""
    global _forked
    found, _forked = _forked, None
    return found
