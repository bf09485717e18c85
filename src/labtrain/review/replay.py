"""Train a run again from its receipt in a scratch folder, and read its trail while it is written. No torch here.

The ordinary job (job.py) trains in its own process, with the receipt's configuration except for output paths. If the
code here differs from the receipt, the commit is checked out elsewhere and the receipt's patch applied.
"""

import copy
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from labtrain.base.console import shown
from labtrain.base.contracts import Options, as_options
from labtrain.base.credentials import NOT_RECORDED, without_secrets
from labtrain.base.errors import EXIT_STOPPED, ConfigError, DamagedError, LabtrainError
from labtrain.base.git import GitError, ask_git, borrow_commit, git_variables, run_git
from labtrain.base.permissions import open_folder
from labtrain.base.untrusted import open_plain, reason
from labtrain.launch.compose import process_of
from labtrain.record import receipt as receipts
from labtrain.record.config import REFERRING, check, check_whole, completed, flat_texts, from_environment, variables_in
from labtrain.record.identity import Config, Job, References, get, lock_digest, name, what_counts
from labtrain.record.own_runs import opened, patch_of
from labtrain.record.ranks import alone
from labtrain.record.receipt import Receipt, origin_digest
from labtrain.record.sources import moved, read_code, source_digests
from labtrain.record.trail import TRAIL, Line, parse_trail
from labtrain.review.sandbox import Sandbox, is_kept, only_kept
from labtrain.stores.backends import is_local
from labtrain.stores.layout import copy_as

POLL_S = 0.02
GIT_TIMEOUT_S = 600  # a checkout of a large repository on a slow disk


class Replay:
    """Trains a receipt's run below `scratch`, in one or more legs.

    Args:
        receipt: the receipt whose configuration is used.
        root: the folder of the experiment's code.
        home: the working directory: relative data paths begin here.
        scratch: a folder that this makes; the caller removes it.
        changes: configuration keys to set, dotted, such as a seed.
        python: the interpreter; None: this one.
        sandbox: the sandbox to train in; None: as this process.
        keep_trail: write the trail as often as the receipt's; else at each step, so that any interval can be compared.

    Attributes:
        run_dir: of the new run; the receipt has no influence on it.
        code: exit code of its last process.
        others: environment variables that the configuration refers to, at least one of which has changed.

    Raises:
        DamagedError: the receipt's configuration is not valid.
        LabtrainError: a run already exists there.
    """

    def __init__(
        self,
        receipt: Receipt,
        root: Path,
        *,
        home: Path,
        scratch: Path,
        changes: dict[str, object] | None = None,
        python: Path | None = None,
        sandbox: Sandbox | None = None,
        keep_trail: bool = False,
    ) -> None:
        self.config, self.references = _config_of(
            receipt, scratch, changes or {}, keep_trail=keep_trail, sandboxed=sandbox is not None
        )
        self.recorded, self.root, self.home, self.python = receipt, root, home.resolve(), python
        _find_weights(self.config, self.home)
        code = read_code(root, as_options(self.config), path=moved(sys.path, home, root))
        self.code_digest = code.digest
        self.absent = [path for path in receipt["code"].get("outside", {}) if path not in code.outside]
        self.lock_digest = lock_digest(root, "wheels" if python else None)
        self.run_id = name(self.config, code=self.code_digest, lock=self.lock_digest)
        self.run_dir = scratch / "runs" / str(self.config["experiment"]) / self.run_id
        self.others = self._other_values()
        # Next to `scratch`, not in it: sandboxed code could put a link there, and this process writes to the log.
        self.scratch, self.log, self.sandbox = scratch, scratch.with_name(f"{scratch.name}.log"), sandbox
        scratch.mkdir()
        if self.run_dir.resolve().parent.parent != (scratch / "runs").resolve() or self.run_dir.exists():
            raise LabtrainError(
                f"{self.run_dir} must be a new folder in {scratch}", hint="choose an empty folder: TMPDIR=DIR"
            )
        self.code: int | None = None

    def _other_values(self) -> list[str]:
        """Return the variables that the configuration refers to, if any of them has changed since the recorded run.

        The run's name shows it, if only this code, this environment and this configuration determine the name.
        """
        segments, code = self.recorded["segments"], self.recorded["code"]
        named = name(self.config, code=self.code_digest, lock=self.lock_digest,
                     origin=origin_digest(self.recorded))  # fmt: skip
        is_named_so = (
            self.code_digest == code["digest"]
            and self.lock_digest == (self.recorded["environment"]["lock_digest"] or "")
            and not any(segment["changed"] for segment in segments)
        )
        if not is_named_so or named == self.recorded["run_id"][:12]:
            return []
        counting = [text for path, text in self.references if get(what_counts(self.config), str(path[0])) is not None]
        return sorted({variable for text in counting for variable in variables_in(text)})

    def lines(self, *, devices: int | None = None, stop_at: int = 0) -> Generator[Line, None, None]:
        """Train, and yield each line of the trail as it is written. To stop early, close the iterator.

        Args:
            devices: number of devices; None: as in the receipt.
            stop_at: the step after which it saves and stops, so that another leg can resume; 0: train to the end.

        Raises:
            LabtrainError: the training failed; contains the end of its output.
        """
        command, environment = self._process(self._job(devices, stop_at))
        at = len(self._trail(0))
        with self.log.open("a") as log:
            child = subprocess.Popen(
                command, cwd=self.home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.code = None
        try:
            while self.code is None:
                self.code = child.poll()  # before reading the trail, so that the last line is not missed
                if whole := self._trail(at):
                    at += len(whole)
                    with self.left("trail"):
                        new = parse_trail(whole, Path())
                    yield from new
                if self.code is None:
                    time.sleep(POLL_S)
        finally:
            child.kill()  # the ranks that it started end with it
            child.wait()
        self._check_end(stop_at)

    def _job(self, devices: int | None, stop_at: int) -> Job:
        config = copy.deepcopy(self.config)
        if devices is not None:
            config["trainer"] |= {"devices": devices, "num_nodes": 1}
        return Job(
            run_id=self.run_id,
            run_dir=str(self.run_dir),
            root=str(self.root),
            config=config,
            command=self.recorded["command"],
            code_digest="" if self.python else self.code_digest,  # another environment has another labtrain
            lock_digest=self.lock_digest,
            supervisor=0 if self.sandbox else os.getpid(),  # a sandbox has its own process ids
            stop_at=stop_at,
            within="" if self.python else str(self.scratch.resolve()),
            references=self.references,
        )

    def _process(self, job: Job) -> tuple[list[str], dict[str, str]]:
        """Return a job's command and environment: in the scratch folder, and in the sandbox if there is one."""
        command, environment = process_of(job)
        environment = alone(environment)
        if self.python is not None:
            command[0] = str(self.python)
        environment["TMPDIR"] = str(self.scratch)  # torch leaves files when it is killed
        environment["XDG_STATE_HOME"] = str(self.scratch / "state")  # a rerun is not recorded as the user's own run
        if path := environment.get("PYTHONPATH"):
            environment["PYTHONPATH"] = os.pathsep.join(moved(path.split(os.pathsep), self.home, self.root))
        if self.sandbox is not None:
            command, environment = self.sandbox.around(command, environment, scratch=self.scratch)
        return command, environment

    def _check_end(self, stop_at: int) -> None:
        if self.code == EXIT_STOPPED and not stop_at:
            raise LabtrainError("the rerun was stopped by a signal", hint="start the same command again")
        if self.code in (0, EXIT_STOPPED):
            return
        if self.sandbox:
            hint = "--set KEY=PATH gives the sandbox access to a file or folder of data"
        elif self.absent:
            hint = f"PYTHONPATH=FOLDER before the same command, with the folder that contains {self.absent[0]}"
        else:
            hint = "labtrain doctor; the rerun needs the receipt's code and data"
        raise LabtrainError(f"the rerun ended with exit code {self.code}:\n{self.said()}", hint=hint)

    def said(self) -> str:
        """Return the end of its output."""
        return "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-15:])

    @contextmanager
    def left(self, what: str) -> Iterator[Path]:
        """Yield the run's folder for reading. Its code may have changed any file in it, or put links in its place.

        It is opened once, following no link, and named by its descriptor.

        Raises:
            LabtrainError: something in it is not valid.
        """
        opened: int | None = None
        try:
            opened = open_folder(self.scratch, self.run_dir.relative_to(self.scratch).parts)
            yield Path(f"/proc/self/fd/{opened}")
        except FileNotFoundError:
            raise  # the rerun has not begun
        except (LabtrainError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            said = str(error.args[0]) if isinstance(error, LabtrainError) else reason(error)
            for place in (f"/proc/self/fd/{opened}/", f"{self.scratch}/"):
                said = said.replace(place, "")
            raise self.invalid(what, said) from error
        finally:
            if opened is not None:
                os.close(opened)

    def invalid(self, what: str, why: str) -> LabtrainError:
        """Return the error for a file of the rerun that its code removed or changed."""
        hint = "ask whoever wrote the run's code: it must not change the files of its own run"
        return LabtrainError(f"the rerun left no valid {what}: {why}", hint=hint)

    def receipt(self) -> Receipt | None:
        """Return the rerun's own receipt; None before its start.

        Raises:
            LabtrainError: it is not valid.
        """
        with suppress(FileNotFoundError), self.left("receipt") as folder:
            return receipts.read(folder)
        return None

    def final_receipt(self) -> Receipt:
        """Return the receipt of a rerun that trained to the end.

        Raises:
            LabtrainError: there is none, or it is not valid.
        """
        if (found := self.receipt()) is None:
            raise self.invalid("receipt", f"{receipts.FILE} is missing")
        if found["status"] != "complete":
            raise self.invalid("receipt", f"its status is {found['status']}, expected complete")
        return found

    def trail_sha256(self, every_n_steps: int) -> str:
        """Return the sha256 of its trail, with only the lines of every `every_n_steps`-th step.

        Raises:
            LabtrainError: it is not valid.
        """
        lines = self._trail(0).splitlines(keepends=True)
        with self.left("trail"):
            steps = (line["step"] for line in parse_trail(b"".join(lines), Path()))
            kept = (line for line, step in zip(lines, steps, strict=True) if step % every_n_steps == 0)
            return hashlib.sha256(b"".join(kept)).hexdigest()

    def _trail(self, at: int) -> bytes:
        """Return the complete lines of its trail from a byte on; empty if there is none."""
        with suppress(FileNotFoundError), self.left("trail") as folder, open_plain(folder / TRAIL) as file:
            file.seek(at)
            new = file.read()
            return new[: new.rfind(b"\n") + 1]
        return b""

    def begin_at(self, checkpoint: Path) -> None:
        """Copy a checkpoint to begin from; call it before the first leg."""
        copy_as(checkpoint, self.run_dir, self.run_id)


def _quiet(name: str, options: Options | None) -> Options:
    """Return the options of a logger that sends nothing: one by its `_target_` becomes one that takes all calls."""
    if options and "_target_" in options:
        return {"_target_": "lightning.pytorch.loggers.logger.DummyLogger"}
    return {"mode": "offline"} if name == "wandb" else {}


def _config_of(
    receipt: Receipt, scratch: Path, changes: dict[str, object], *, keep_trail: bool, sandboxed: bool
) -> tuple[Config, References]:
    """Return a receipt's configuration with its output in `scratch`, and one checkpoint kept."""
    config = completed(copy.deepcopy(receipt["config"]))
    try:
        check_whole(config)
        config["paths"]["runs"] = str(scratch / "runs")
        config["resume"] = "auto"
        # The model's code may use loggers. With their options they would send data to a service, with the user's key.
        config["logger"] = {name: _quiet(name, options) for name, options in config["logger"].items()}
        if not keep_trail:
            config["trail"]["every_n_steps"] = 1
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
    except (ConfigError, TypeError) as error:
        raise _no_configuration(error) from error
    _change(config, changes)
    if sandboxed:
        _refuse_variables(config)
    with only_kept() if sandboxed else nullcontext():
        config, references = from_environment(config)
    if lost := list(_not_recorded(what_counts(config), "")):
        raise ConfigError(
            f"{lost[0]} is a credential and not in the receipt, so the run cannot be trained from the receipt",
            hint=f"python train.py resume=never {lost[0]}=VALUE, then labtrain diff; '{lost[0]}=${{oc.env:X}}' would be"
            " recorded",
        )
    config = _without_lost(config)
    try:
        check(copy.deepcopy(config))
    except (ConfigError, TypeError) as error:
        raise _no_configuration(error) from error
    return config, references


def _find_weights(config: Config, home: Path) -> None:
    """Let `init_from` name its weights below the experiment's folder here, not below a checkout of its code.

    Raises:
        StoreError: they are in a store that only the receipt names.
    """
    path = config["init_from"]["path"]
    if path is not None:
        config["init_from"]["path"] = str(home / path.removeprefix("file://")) if is_local(path) else opened(path)


def _change(config: Config, changes: dict[str, object]) -> None:
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = as_options(config)
        for parent in parents:
            node = node.get(parent) or {}
        if last not in node:
            raise ConfigError(
                f"{key}: the receipt's configuration has no such key", hint="labtrain report RUN shows the keys"
            )
        node[last] = value


def _refuse_variables(config: Config) -> None:
    """Raise if a configuration would give sandboxed code values from this user's environment.

    Raises:
        ConfigError: names the first variable that the sandbox does not have.
    """
    for key, text in flat_texts({group: as_options(config)[group] for group in REFERRING if group in config}):
        for variable in variables_in(text):
            has_default = f"oc.env:{variable}," in text
            if not is_kept(variable, os.environ.get(variable, "")) and (variable in os.environ or not has_default):
                text = without_secrets(text)
                raise ConfigError(
                    f"--sandbox: {key} is {text} in the receipt, and the sandbox does not have {variable}",
                    hint=f"--set {key}=VALUE, if the code may know that value",
                )


def _no_configuration(error: Exception) -> DamagedError:
    return DamagedError(
        f"the receipt's configuration: {error.args[0]}", hint="ask whoever trained the run for the receipt again"
    )


def _without_lost(node: object) -> Any:
    """Return a configuration without options that are not recorded, such as those of loggers; these have defaults."""
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if not (isinstance(value, str) and NOT_RECORDED in value)}
        return {key: _without_lost(value) for key, value in kept.items()}
    return node


def _not_recorded(node: object, key: str) -> Iterator[str]:
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
    """Return the experiment's folder: above the run, the working directory, or in the repository.

    Raises:
        ConfigError: none of these has the script that started the run.
    """
    script = Path(receipt["command"][0]).name if receipt["command"] else "train.py"
    here = Path.cwd()
    top, folder = ask_git(str(here), "rev-parse", "--show-toplevel").strip(), receipt["code"]["folder"]
    places = [*run_dir.resolve().parents, here, *([Path(top, folder)] if top and folder is not None else [])]
    for place in places:
        if (place / script).is_file():
            return place
    raise ConfigError(
        f"cannot find the experiment: looked for {script} above {shown(run_dir)} and in {here}",
        hint="cd to the experiment's folder, for example in a clone of its repository",
    )


def code_of(receipt: Receipt, run_dir: Path, home: Path, scratch: Path, *, filters: bool = False) -> tuple[Path, str]:
    """Return the folder of a receipt's code, and its origin: unchanged here, or checked out into `scratch`.

    Nothing of it runs, and no program that the repository's configuration names.

    Args:
        receipt: whose code it is.
        run_dir: of its run.
        home: the experiment's folder here.
        scratch: an existing folder.
        filters: run the filters of the user's own git configuration, such as Git LFS, on checkout.

    Raises:
        ConfigError: the code is neither here nor can it be checked out.
    """
    code = receipt["code"]
    if source_digests(home) == code["sources"]:
        return home, "unchanged"
    here = f"the code in {shown(home)} differs from the receipt's"
    if not code["commit"]:
        raise ConfigError(
            f"{here}, which names no commit: the run was trained outside git, or before the first commit",
            hint="restore the code of the run; or commit the experiment and train a new run: git init; git add -A;"
            f" git commit -m first; python train.py. labtrain diff {shown(run_dir)} NEW_RUN names what has changed",
        )
    top = ask_git(str(home), "rev-parse", "--show-toplevel").strip()
    return checked_out(receipt, run_dir, top, scratch, filters=filters, why=f"{here}, and ")


def checked_out(
    receipt: Receipt, run_dir: Path, top: str, scratch: Path, *, filters: bool = False, why: str = ""
) -> tuple[Path, str]:
    """Check out a receipt's commit into `scratch`, apply its patch, and return the code's folder and its origin.

    Args:
        receipt: names the commit.
        run_dir: of its run.
        top: a repository's folder; empty: there is none.
        scratch: an existing folder.
        filters: as in `code_of`.
        why: the beginning of an error.

    Raises:
        ConfigError: the commit or the patch is missing, or they do not give the receipt's code.
    """
    code, clone = receipt["code"], scratch / "code"
    commit = code["commit"] or ""
    if not top or not borrow_commit(top, commit, clone, filters=filters):
        raise ConfigError(f"{why}commit {commit[:12]} is not in this repository", hint="git fetch --all")
    if (patch := patch_of(receipt, run_dir)) is None:
        raise ConfigError(f"{why}code.patch is missing", hint="put code.patch next to the receipt")
    _git(clone, "checkout", "-q", "--detach", commit, filters=filters)
    if patch:
        _git(clone, "apply", "--whitespace=nowarn", "-", text=patch, filters=filters)
    root = clone / (code["folder"] or "")
    found = f"commit {commit[:12]}{' with the patch' if patch else ''}"
    if not root.resolve().is_relative_to(clone.resolve()):  # a link in the commit
        raise ConfigError(f"{code['folder']} at {found} leads out of the repository",
                          hint="check that the receipt belongs to this repository")  # fmt: skip
    if (there := source_digests(root)) != code["sources"]:
        names = sorted(name for name in {*there, *code["sources"]} if there.get(name) != code["sources"].get(name))
        raise ConfigError(
            f"the code at {found} does not match the receipt: {', '.join(names)}",
            hint="the patch lacks sources that git ignores: copy them here; otherwise the receipt is wrong",
        )
    return root, found


def with_filters(root: Path, receipt: Receipt, run_dir: Path, home: Path, scratch: Path) -> Path:
    """Return the folder of a receipt's code after this user's git filters, such as Git LFS.

    Filters are the user's programs and read the commit's content. So they run only once the receipt's code may run.

    Args:
        root: what `code_of` found.
        receipt: whose code it is.
        run_dir: of its run.
        home: the experiment's folder here.
        scratch: a folder to make.
    """
    if root == home or not ask_git(
        str(root), "config", "--get-regexp", r"^filter\.", variables=git_variables(filters=True)
    ):
        return root
    scratch.mkdir()
    return code_of(receipt, run_dir, home, scratch, filters=True)[0]


def _git(clone: Path, *arguments: str, text: str = "", filters: bool) -> None:
    try:
        run_git(clone, *arguments, text=text, variables=git_variables(filters=filters), timeout_s=GIT_TIMEOUT_S)
    except GitError as error:
        raise ConfigError(str(error.args[0]), hint="check that the receipt belongs to this repository") from error
