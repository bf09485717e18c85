"""Fixtures: a generated experiment, and a way to start its train.py as a person would."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from labtrain.base.contracts import as_options
from labtrain.project.new import make_experiment
from labtrain.record import receipt

pytest.register_assert_rewrite("tests.support")

ROOT = Path(__file__).resolve().parents[1]
LABTRAIN = str(Path(sys.executable).with_name("labtrain"))
QUICK = ("trainer.enable_progress_bar=false", "logger=none")


def need(program: str, package: str) -> None:
    """Skip where a program is missing, saying how to get it; under CI=true fail instead."""
    if shutil.which(program) is None:
        skip_or_fail(f"{program} is not installed: {f'apt-get install {package}' if package else 'make servers'}")


def skip_or_fail(text: str) -> None:
    """Skip, saying why; under CI=true fail."""
    pytest.fail(text) if os.environ.get("CI") == "true" else pytest.skip(text)


def changed(run_dir: Path, key: str, value: Any) -> None:
    """Change what stands at `a/b/c` of a receipt, as somebody would who also writes its digest anew."""
    found = receipt.read(run_dir)
    assert found is not None
    *parents, last = key.split("/")
    node = as_options(found)
    for part in parents:
        node = node[part]
    node[last] = value
    receipt.write(run_dir, found)


@dataclass
class Run:
    """One start of train.py: its exit code, its output, and, where it printed one, the run's folder and digest."""

    code: int
    out: str
    err: str
    cwd: Path  # which the printed folder is relative to

    @property
    def folder(self) -> Path:
        return self.cwd / self.out.split()[0]

    @property
    def digest(self) -> str:
        return self.out.split()[1]

    @property
    def receipt(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "receipt.json").read_text()))

    def trail(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "trail.jsonl").read_text().splitlines()]


class Experiment:
    """A generated experiment in a folder of its own; its runs go where a test says."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def command(self, *overrides: str) -> list[str]:
        return [sys.executable, str(self.root / "train.py"), *overrides]

    def train(
        self,
        *overrides: str,
        env: dict[str, str] | None = None,
        code: int | None = 0,
        prefix: list[str] | None = None,
        **options: Any,
    ) -> Run:
        """Run train.py to its end; `code` is the exit code that is expected (None: any), `prefix` a command before it."""
        environment = {**os.environ, **(env or {})}
        done = subprocess.run(
            [*(prefix or []), *self.command(*overrides)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
            **options,
        )
        run = Run(done.returncode, done.stdout, done.stderr, Path(options.get("cwd", Path.cwd())))
        assert code is None or run.code == code, f"exit code {run.code}\n{run.out}\n{run.err}"
        return run


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state directory of the tests' own, for them and all that they start: nothing is written in the home."""
    folder, before = tmp_path_factory.mktemp("state"), os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(scope="session")
def shared_experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """One experiment for all tests that do not change it."""
    root = tmp_path_factory.mktemp("experiment") / "digits"
    make_experiment(root, author="a test")
    return Experiment(root)


@pytest.fixture
def experiment(shared_experiment: Experiment, tmp_path: Path) -> Iterator[Experiment]:
    """The experiment, with the working directory in a scratch folder: name runs with paths.runs=runs."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield shared_experiment
    os.chdir(before)


@pytest.fixture
def own_experiment(shared_experiment: Experiment, tmp_path: Path) -> Experiment:
    """A copy of the experiment that a test may change."""
    root = tmp_path / "digits"
    shutil.copytree(shared_experiment.root, root, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    return Experiment(root)


@pytest.fixture
def runner(tmp_path: Path) -> Any:
    """A tests.support.exact.Runner: trainings of small models in processes that are forked."""
    return importlib.import_module("tests.support.exact").Runner(tmp_path)  # it imports this file


@pytest.fixture
def other(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Another one, with a folder of its own."""
    return importlib.import_module("tests.support.exact").Runner(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real S3 server with a bucket `lab`, for the tests of this process."""
    from tests.support.servers import S3

    server = S3(tmp_path_factory.mktemp("s3"))
    server.start()
    server.make_bucket()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def sftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real SFTP server, for the tests of this process."""
    from tests.support.servers import SFTP

    server = SFTP(tmp_path_factory.mktemp("sftp"))
    server.start()
    if refusal := server.refuses():  # as Debian's `nobody` is
        server.kill()
        skip_or_fail(f"sshd: {refusal}: run the tests as a user that can log in")
    yield server
    server.kill()


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of a backend that is this test's own, with the variables that it needs."""
    own = f"{tmp_path.name}-{os.getpid()}"
    match request.param:
        case "s3":
            for name, value in request.getfixturevalue("s3").variables().items():
                monkeypatch.setenv(name, value)
            return f"s3://lab/{own}"
        case "sftp":
            server = request.getfixturevalue("sftp")
            monkeypatch.setenv("HOME", str(server.home))
            return f"{server.url}/{own}"
        case "memory":
            return f"memory://{own}"
    return str(tmp_path / "store")
