"""`labtrain completion`, and Hydra's completion of train.py, in a real interactive bash: keys typed on a terminal."""

import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from labtrain.cli import main
from tests.conftest import LABTRAIN, ROOT, Experiment

RUN = "906ca0b1c2d3"
BACK = b"\x15"  # Ctrl-U


class Bash:
    """A bash on a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"PATH": f"{Path(LABTRAIN).parent}:{os.environ['PATH']}", "TERM": "dumb",
                                    "INPUTRC": "/dev/null", "HISTFILE": "/dev/null"}  # fmt: skip
        controller, terminal = pty.openpty()
        self.screen = controller
        self.process = subprocess.Popen(["bash", "--norc", "--noprofile", "-i"], cwd=folder, env=environment, stdin=terminal,
                                        stdout=terminal, stderr=terminal, start_new_session=True)  # fmt: skip
        os.close(terminal)

    def type(self, keys: str, shows: str) -> str:
        """Type keys; return what the screen shows, once it shows a text."""
        os.write(self.screen, keys.encode())
        seen, end = b"", time.monotonic() + 60
        while shows.encode() not in seen:
            if not select.select([self.screen], [], [], max(0, end - time.monotonic()))[0]:
                pytest.fail(f"{keys!r} shows {seen!r}, expected {shows!r}")
            seen += os.read(self.screen, 65536)
        return seen.decode()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory, shared_experiment: Experiment) -> Iterator[Bash]:
    """In an experiment with one run."""
    root = tmp_path_factory.mktemp("completion") / "digits"
    shutil.copytree(shared_experiment.root, root, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    shutil.copytree(ROOT / "tests/golden", root / "runs/digits" / RUN)
    bash = Bash(root)
    bash.type('eval "$(labtrain completion bash)"; echo labt""rain is ready\n', "labtrain is ready")
    bash.type('eval "$(python train.py -sc install=bash)"; echo hy""dra is ready\n', "hydra is ready")
    yield bash
    bash.end()


@pytest.mark.parametrize(
    ("keys", "becomes"),
    [
        ("labtrain ver\t", "labtrain verify "),
        ("labtrain lock ch\t", "labtrain lock check "),
        ("labtrain diff 906c\t", f"labtrain diff {RUN} "),
        ("labtrain diff x 9\t", f"labtrain diff x {RUN} "),
        ("labtrain digest 90\t", f"labtrain digest {RUN} "),
        ("labtrain rm --yes 9\t", f"labtrain rm --yes {RUN} "),
        ("labtrain verify runs/dig\t", "labtrain verify runs/digits/"),  # a path, by the shell itself
        ("labtrain doctor --g\t", "labtrain doctor --gpu "),
        ("labtrain completion z\t", "labtrain completion zsh "),
        ("python train.py trainer.max_ep\t", "python train.py trainer.max_epochs="),
        ("python train.py model.wi\t", "python train.py model.width="),
        ("python train.py logger=ten\t", "python train.py logger=tensorboard"),
    ],
)
def test_bash_completes_what_is_typed(bash: Bash, keys: str, becomes: str) -> None:
    bash.type(keys, becomes)
    os.write(bash.screen, BACK)


def test_each_shell_has_its_code() -> None:
    """click's own; a run's id is found without torch."""
    for shell, says in (
        ("bash", "complete -o nosort -F _labtrain"),
        ("zsh", "#compdef labtrain"),
        ("fish", "complete --no-files"),
    ):
        done = subprocess.run([LABTRAIN, "completion", shell], capture_output=True, text=True, check=True)
        assert says in done.stdout
    asked = os.environ | {"_LABTRAIN_COMPLETE": "bash_complete", "COMP_WORDS": "labtrain verify ", "COMP_CWORD": "2",
                          "PYTHONPROFILEIMPORTTIME": "1"}  # fmt: skip
    done = subprocess.run([LABTRAIN], env=asked, capture_output=True, text=True, check=True)
    assert "labtrain.record.receipt" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() in ("torch", "hydra", "numpy")]


def test_each_argument_completes_something() -> None:
    """Run ids, paths or choices: bash has no completion of its own for a command with a function."""
    arguments = [
        (command, each)
        for group in (main, *(each for each in main.commands.values() if isinstance(each, click.Group)))
        for command in group.commands.values()
        for each in command.params
        if isinstance(each, click.Argument)
    ]
    assert len(arguments) > 20
    silent = [
        f"{command.name} {each.name}"
        for command, each in arguments
        if not each.shell_complete(click.Context(command), "") and each.name not in ("text", "overrides")
    ]
    assert silent == []
