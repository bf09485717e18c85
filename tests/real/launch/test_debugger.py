"""`.vscode/launch.json`: debugpy runs it as VS Code does, and stops at a breakpoint in the model.

VS Code and debugpy talk by the Debug Adapter Protocol: https://microsoft.github.io/debug-adapter-protocol/specification.
"""

import json
import queue
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.conftest import QUICK, Experiment
from tests.support.servers import end

Message = dict[str, Any]


class Session:
    """A client of debugpy's adapter, by the two ends of a pipe or of a socket."""

    def __init__(self, read: BinaryIO, write: BinaryIO) -> None:
        self.write = write
        self.messages: queue.Queue[Message] = queue.Queue()
        self.sent = 0
        threading.Thread(target=self._read, args=(read,), daemon=True).start()

    def _read(self, file: BinaryIO) -> None:
        while length := file.readline().partition(b":")[2]:
            file.readline()
            self.messages.put(json.loads(file.read(int(length))))

    def send(self, command: str, **arguments: Any) -> None:
        self.sent += 1
        message = {"seq": self.sent, "type": "request", "command": command, "arguments": arguments}
        data = json.dumps(message).encode()
        self.write.write(b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
        self.write.flush()

    def until(self, name: str) -> Message:
        """Wait for an event, or for the answer to a command."""
        while True:
            message = self.messages.get(timeout=120)
            if message["type"] != "request" and name in (message.get("event"), message.get("command")):
                assert message.get("success", True), message
                return dict(message.get("body") or {})

    def begin(self, how: str, options: Message, breakpoint_at: tuple[Path, int]) -> None:
        self.send("initialize", clientID="test", adapterID="debugpy", pathFormat="path", linesStartAt1=True)
        self.until("initialize")
        self.send(how, **options)
        self.until("initialized")
        path, line = breakpoint_at
        self.send("setBreakpoints", source={"path": str(path)}, breakpoints=[{"line": line}])
        self.until("setBreakpoints")
        self.send("configurationDone")


def configuration(root: Path, name: str) -> Message:
    text = (root / ".vscode/launch.json").read_text().replace("${workspaceFolder}", str(root))
    (found,) = [each for each in json.loads(text)["configurations"] if each["name"] == name]
    return dict(found)


@pytest.mark.release
def test_a_breakpoint_in_the_model_stops_the_training(own_experiment: Experiment) -> None:
    """Although stage 1 replaces itself by stage 2; the run then ends with the bits of one without a debugger."""
    root = own_experiment.root
    launch = configuration(root, "train in one process")
    launch |= {"console": "internalConsole", "python": [sys.executable]}
    launch["args"] = [*launch["args"], *QUICK, "trainer.max_steps=2"]
    place = next(
        n for n, line in enumerate((root / "model.py").read_text().splitlines(), 1) if "def training_step" in line
    )
    adapter = subprocess.Popen([sys.executable, "-m", "debugpy.adapter"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert adapter.stdin
    assert adapter.stdout
    try:
        session = Session(adapter.stdout, adapter.stdin)
        session.begin("launch", launch, (root / "model.py", place + 1))
        attach = session.until("debugpyAttach")  # stage 2, in the same process: VS Code opens a second session
        with socket.create_connection((attach["connect"]["host"], attach["connect"]["port"])) as connection:
            file = connection.makefile("rwb")
            training = Session(file, file)
            training.begin("attach", attach, (root / "model.py", place + 1))
            thread = training.until("stopped")["threadId"]
            training.send("stackTrace", threadId=thread)
            frame = training.until("stackTrace")["stackFrames"][0]
            assert (frame["name"], Path(frame["source"]["path"])) == ("training_step", root / "model.py")
            training.send("setBreakpoints", source={"path": str(root / "model.py")}, breakpoints=[])
            training.send("continue", threadId=thread)
            training.until("terminated")
    finally:
        end(adapter)
    (debugged,) = (root / "runs/debug").iterdir()
    found = json.loads((debugged / "receipt.json").read_text())
    plain = own_experiment.train(*QUICK, "trainer.max_steps=2", "paths.runs=plain", cwd=root)
    assert found["results"]["weights_digest"] == plain.digest
    assert debugged.name == plain.folder.name
