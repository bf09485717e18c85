"""A run trained again from its receipt, in a scratch place, and its trail read while it is written. No torch here.

What trains is the ordinary job in a process of its own (job.py), with the receipt's configuration but for what only
says where things go. Code that is not what the receipt says is checked out beside: the commit, and the receipt's patch.
"""

import copy
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from labtrain.base.errors import EXIT_STOPPED, ConfigError, LabtrainError
from labtrain.launch.compose import process_of
from labtrain.record import receipt as receipts
from labtrain.record.config import completed
from labtrain.record.identity import Config, Job, lock_digest, name, shown, what_counts
from labtrain.record.provenance import PATCH, git
from labtrain.record.ranks import alone
from labtrain.record.receipt import NOT_RECORDED, Receipt
from labtrain.record.sources import moved, read_code, source_digests
from labtrain.record.trail import TRAIL, Line, parse_trail

POLL_S = 0.02
GIT_TIMEOUT_S = 600  # a checkout of a large repository on a slow disk


class Replay:
    """Trains a receipt's run below `scratch`, in one or more legs.

    Args:
        receipt: whose configuration is taken.
        root: the folder of the experiment's code.
        home: where it is started: relative paths of the data begin here.
        scratch: a folder that it makes; its caller removes it.
        changes: keys of the configuration to set, dotted, such as a seed.
        python: the interpreter; None: this one.
        every_n_steps: how often a line of the trail is written.

    Attributes:
        run_dir: of the run that is made.
        code: how its last process ended.
    """

    def __init__(
        self,
        receipt: Receipt,
        root: Path,
        *,
        home: Path,
        scratch: Path,
        changes: dict[str, Any] | None = None,
        python: Path | None = None,
        every_n_steps: int = 1,
    ) -> None:
        self.config = _config_of(receipt, scratch, changes or {}, every_n_steps)
        self.recorded, self.root, self.home, self.python = receipt, root, home.resolve(), python
        code = read_code(root, self.config, path=moved(sys.path, home, root))
        self.code_digest = code.digest
        self.absent = [path for path in receipt["code"].get("outside", {}) if path not in code.outside]
        self.lock_digest = lock_digest(root)
        self.run_id = name(self.config, code=self.code_digest, lock=self.lock_digest)
        self.run_dir = scratch / "runs" / str(self.config["experiment"]) / self.run_id
        self.scratch, self.log = scratch, scratch / "log.txt"
        scratch.mkdir()
        self.code: int | None = None

    def lines(self, *, devices: int | None = None, stop_at: int = 0) -> Generator[Line, None, None]:
        """Train, and yield each line of the trail as it is written. To stop early, close the iterator.

        Args:
            devices: on how many; None: as the receipt says.
            stop_at: the step after which it saves and stops, so that another leg can go on; 0: its end.

        Raises:
            LabtrainError: the training failed; its own words are in it.
        """
        config = copy.deepcopy(self.config)
        if devices is not None:
            config["trainer"] |= {"devices": devices, "num_nodes": 1}
        job = Job(
            run_id=self.run_id,
            run_dir=str(self.run_dir),
            root=str(self.root),
            config=config,
            command=self.recorded["command"],
            code_digest="" if self.python else self.code_digest,  # another environment has a labtrain of its own
            lock_digest=self.lock_digest,
            supervisor=os.getpid(),
            stop_at=stop_at,
        )
        command, environment = process_of(job)
        environment = alone(environment)
        if self.python is not None:
            command[0] = str(self.python)
        environment["TMPDIR"] = str(self.scratch)  # torch leaves files when it is killed
        if path := environment.get("PYTHONPATH"):
            environment["PYTHONPATH"] = os.pathsep.join(moved(path.split(os.pathsep), self.home, self.root))
        trail = self.run_dir / TRAIL
        at = trail.stat().st_size if trail.exists() else 0
        with self.log.open("a") as log:
            child = subprocess.Popen(
                command, cwd=self.home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.code = None
        try:
            while self.code is None:
                self.code = child.poll()  # before the trail is read: nothing is written after
                with suppress(FileNotFoundError), trail.open("rb") as file:
                    file.seek(at)
                    new = file.read()
                    whole = new[: new.rfind(b"\n") + 1]
                    at += len(whole)
                    if whole:
                        yield from parse_trail(whole, self.run_dir)
                if self.code is None:
                    time.sleep(POLL_S)
        finally:
            child.kill()  # and with it the ranks that it started
            child.wait()
        if self.code == EXIT_STOPPED and not stop_at:
            raise LabtrainError("the run, trained again, was stopped by a signal", hint="start it again")
        if self.code not in (0, EXIT_STOPPED):
            raise LabtrainError(
                f"the run, trained again, ended with exit code {self.code}:\n{self.said()}",
                hint=f"PYTHONPATH=FOLDER before the same command, with the folder that holds {self.absent[0]}"
                if self.absent
                else "labtrain doctor; the code and data of the receipt are needed",
            )

    def said(self) -> str:
        """Return the end of what it printed."""
        return "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-15:])

    def receipt(self) -> Receipt | None:
        """Return its own receipt, which is there from its start on."""
        return receipts.read(self.run_dir)

    def begin_at(self, checkpoint: Path) -> None:
        """Begin from a checkpoint's folder, before the first leg."""
        shutil.copytree(checkpoint, self.run_dir / "checkpoints" / checkpoint.name)


def _config_of(receipt: Receipt, scratch: Path, changes: dict[str, Any], every_n_steps: int) -> Config:
    """Return a receipt's configuration with its output in `scratch`, and one checkpoint that is kept."""
    config = completed(copy.deepcopy(receipt["config"]))
    config["paths"]["runs"] = str(scratch / "runs")
    config["resume"] = "auto"
    if "wandb" in config["logger"]:
        config["logger"]["wandb"]["mode"] = "offline"
    # Each step, so that a trail of any interval is compared; without one, as it was written, for its sha256.
    config["trail"]["every_n_steps"] = every_n_steps or 1
    config["checkpoint"] |= {
        "url": None,
        "every_n_steps": None,
        "every_seconds": None,
        "keep_last": 1,
        "keep_best": 0,
        "keep_every_n_steps": None,
    }
    config["trainer"] |= {"enable_progress_bar": False, "profiler": None}
    if receipt["determinism"]["any_number_of_devices"]:
        config["trainer"]["num_nodes"] = 1
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.get(parent) or {}
        if last not in node:
            raise ConfigError(f"{key}: the receipt's configuration has no such key", hint="labtrain report shows it")
        node[last] = value
    if lost := list(_not_recorded(what_counts(config), "")):
        raise ConfigError(
            f"{lost[0]} names a credential, so the receipt does not hold it: the run cannot be started from it",
            hint="python train.py resume=never with it, then labtrain diff",
        )
    return config


def _not_recorded(node: Any, key: str) -> Iterator[str]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _not_recorded(child, f"{key}.{name}" if key else name)
    elif isinstance(node, list):
        for child in node:
            yield from _not_recorded(child, key)
    elif isinstance(node, str) and NOT_RECORDED in node:
        yield key


# -------------------------------------------------------------------------------------------------------------- code


def home_of(run_dir: Path, receipt: Receipt) -> Path:
    """Return the folder of the experiment here: one above the run, or the working directory, or of its repository.

    Raises:
        ConfigError: the script that started the run is in none of them.
    """
    script = Path(receipt["command"][0]).name if receipt["command"] else "train.py"
    here = Path.cwd()
    top, folder = git(str(here), "rev-parse", "--show-toplevel").strip(), receipt["code"]["folder"]
    places = [*run_dir.resolve().parents, here, *([Path(top, folder)] if top and folder is not None else [])]
    for place in places:
        if (place / script).is_file():
            return place
    raise ConfigError(
        f"the experiment is not here: looked for {script} above {shown(run_dir)} and in {here}",
        hint="cd to the experiment's folder, a clone of its repository for one",
    )


def code_of(receipt: Receipt, run_dir: Path, home: Path, scratch: Path) -> tuple[Path, str]:
    """Return the folder of a receipt's code, and where it comes from: it is here, or is checked out into `scratch`.

    Raises:
        ConfigError: it is neither.
    """
    code = receipt["code"]
    if source_digests(home) == code["sources"]:
        return home, "as it is here"
    here = f"{shown(home)} holds other code than the receipt's"
    if not code["commit"]:
        raise ConfigError(f"{here}, which was in no git repository", hint=f"labtrain diff {shown(run_dir)} ANOTHER_RUN")
    top = git(str(home), "rev-parse", "--show-toplevel").strip()
    if not top or not git(top, "cat-file", "-t", code["commit"]).strip():
        raise ConfigError(f"{here}, and commit {code['commit'][:12]} is not in this repository", hint="git fetch --all")
    clone = scratch / "code"
    patch = code["patch"]
    if patch is None and (run_dir / PATCH).exists():
        patch = (run_dir / PATCH).read_bytes().decode("utf-8", "surrogateescape")
    if patch is None:
        raise ConfigError(f"{here}, and its patch is not beside the receipt", hint=f"put {PATCH} beside it")
    _git("clone", "-q", "--shared", "--no-checkout", top, str(clone))
    _git("-C", str(clone), "checkout", "-q", "--detach", code["commit"])
    if patch:
        _git("-C", str(clone), "apply", "--whitespace=nowarn", "-", text=patch)
    root = clone / (code["folder"] or "")
    found = f"commit {code['commit'][:12]}{' with the patch' if patch else ''}"
    if (there := source_digests(root)) != code["sources"]:
        names = sorted(name for name in {*there, *code["sources"]} if there.get(name) != code["sources"].get(name))
        raise ConfigError(
            f"{found} does not give the receipt's code: {', '.join(names)}",
            hint="sources that git was told to ignore are in no patch; or the receipt is wrong",
        )
    return root, found


def _git(*arguments: str, text: str = "") -> None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, input=text.encode("utf-8", "surrogateescape"), capture_output=True, check=False,
                              timeout=GIT_TIMEOUT_S, env=os.environ | {"GIT_TERMINAL_PROMPT": "0"})  # fmt: skip
        said = "" if not done.returncode else done.stderr.decode(errors="replace").strip() or "it failed"
    except subprocess.TimeoutExpired:
        said = f"no end in {GIT_TIMEOUT_S} seconds"
    if said:
        raise ConfigError(f"git {' '.join(arguments[:4])}: {said}", hint="is the receipt of this repository?")
