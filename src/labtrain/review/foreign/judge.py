"""`labtrain verify URL` and `labtrain verify BUNDLE.zip`: find the run, make its environment, train it in the sandbox.

This labtrain is the judge: outside the sandbox it compares trails, results and digests. The training runs in the
environment of the receipt's lock, with the labtrain of the experiment. The judge needs no torch.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from labtrain.base.console import one_line, shown, warn
from labtrain.base.errors import ConfigError
from labtrain.base.git import ask_git
from labtrain.base.untrusted import scratch_folder
from labtrain.environment.from_lock import Interpreter, interpreter_for, read_foreign_lock
from labtrain.record.differences import open_run
from labtrain.record.receipt import Receipt
from labtrain.review.foreign.bundle import is_bundle, unpack
from labtrain.review.foreign.repository import Found, Target, check_lock, fetch, repository_in
from labtrain.review.replay import checked_out, home_of
from labtrain.review.retrace import Say
from labtrain.review.sandbox import check_bubblewrap
from labtrain.review.trust import Ask, admit
from labtrain.review.verdicts import VERIFIED
from labtrain.review.verification import Elsewhere, Verdict, VerifyOptions, alone, append_verdict, verify_run


def foreign_in(word: str) -> Target | Path | None:
    """Return the repository or bundle that a command-line word names; None if it names a run or a receipt."""
    if is_bundle(path := Path(word)):
        return path
    return repository_in(word)


def verify_foreign(
    target: Target | Path,
    options: VerifyOptions,
    *,
    receipt: str | None = None,
    own_sha256: Callable[[], str],
    say: Say = lambda _: None,
    tick: Callable[[int], None] = lambda _: None,
) -> tuple[Verdict, dict[str, str | float]]:
    """Verify a run that came from elsewhere, in the sandbox unless the user trusts it.

    Args:
        target: a git repository, or the file of a bundle.
        options: as in `verify_run`; the sandbox is on unless `trust` is.
        receipt: the receipt's path in the repository; None: there must be only one.
        own_sha256: returns the sha256 of this labtrain's wheel.
        say: receives each finding.
        tick: receives each step that was the same.

    Returns:
        the verdict, and what it is about: repository or bundle, commit, receipt, environment, seconds.

    Raises:
        ConfigError: the run cannot be found, or there is no sandbox and the user does not trust it.
        DamagedError: the receipt, the lock or the bundle was changed.
        LabtrainError: the environment cannot be made, or the training failed.
    """
    started, trains = time.monotonic(), options.steps != 0
    if trains and not options.trust:
        _require_sandbox()
    name = one_line(shown(target) if isinstance(target, Path) else target)
    with scratch_folder("labtrain-review-", of=name) as scratch:
        found = _found(target, scratch, receipt, say)
        with alone(found.run) as (run_dir, _):
            recorded = open_run(run_dir)[1]
        interpreter = _environment(recorded, found.home, own_sha256, say) if trains else None
        elsewhere = Elsewhere(home=found.home, root=found.home, whence=found.whence, interpreter=interpreter,
                              verdicts=scratch if options.key else None)  # fmt: skip
        options = replace(options, sandbox=trains and (options.sandbox or not options.trust))
        verdict = verify_run(found.run, options, say=say, tick=tick, elsewhere=elsewhere)
        if (scratch / VERIFIED).exists():
            _hand_over(scratch / VERIFIED, Path(f"{recorded['run_id']}.{VERIFIED}"), say)
    say(f"took         {(seconds := time.monotonic() - started):.0f} s")
    about = {"environment": interpreter.said} if interpreter else {}
    return verdict, found.facts | about | {"seconds": round(seconds, 1)}


def verify_locked(
    run: Path,
    options: VerifyOptions,
    *,
    own_sha256: Callable[[], str],
    ask: Ask | None = None,
    say: Say = lambda _: None,
    tick: Callable[[int], None] = lambda _: None,
) -> Verdict:
    """Verify a run in the environment of its own lock, with the labtrain that trained it, however old they are.

    Args:
        run: its folder or id, or its receipt, as in `verify_run`.
        options: as in `verify_run`.
        own_sha256: returns the sha256 of this labtrain's wheel.
        ask: as in `verify_run`.
        say: receives each finding.
        tick: receives each step that was the same.

    Raises:
        ConfigError: the lock is not in the repository.
        LabtrainError: the environment cannot be made.
    """
    with alone(run) as (place, above), scratch_folder("labtrain-locked-", of=shown(run)) as scratch:
        run_dir, receipt = open_run(place)
        root = home = home_of(above, receipt)
        whence = "here"
        if receipt["code"]["commit"]:
            top = ask_git(str(home), "rev-parse", "--show-toplevel").strip()
            root, whence = checked_out(receipt, run_dir, top, scratch, why="the lock is read from the run's commit; ")
        check_lock(receipt, root)
        if ask is None:  # it is refused before its environment is made, not after
            admit(receipt, run_dir=run_dir, root=root, home=home, sandboxed=options.sandbox, trust=options.trust,
                  ask=None, say=lambda _: None)  # fmt: skip
        interpreter = _environment(receipt, root, own_sha256, say)
        elsewhere = Elsewhere(home=None, root=root, whence=whence, interpreter=interpreter, verdicts=run_dir)
        return verify_run(run, options, ask=ask, say=say, tick=tick, elsewhere=elsewhere)


def _require_sandbox() -> None:
    """Raise ConfigError, before anything is downloaded, if the sandbox cannot work here."""
    try:
        check_bubblewrap()
    except ConfigError as error:
        said = str(error.args[0]).removeprefix("--sandbox: ")
        raise ConfigError(
            f"code from elsewhere runs in the sandbox, which cannot work here: {said}",
            hint=f"{error.hint}; or --trust, which runs it as you, with your files and network",
        ) from error


def _found(target: Target | Path, scratch: Path, receipt: str | None, say: Say) -> Found:
    if isinstance(target, Target):
        say(f"repository   {target}")
        found = fetch(target, scratch, named=receipt)
        say(f"commit       {found.facts['commit']}, receipt {found.facts['receipt']}")
        return found
    if receipt is not None:
        raise ConfigError(f"{shown(target)} has one receipt, so --receipt cannot be used", hint="leave out --receipt")
    say(f"bundle       {shown(target)}")
    return unpack(target, scratch)


def _environment(receipt: Receipt, home: Path, own_sha256: Callable[[], str], say: Say) -> Interpreter:
    """Return the environment of the run's lock, and say which labtrain it has."""
    recorded = receipt["environment"]
    if recorded["route"] not in ("wheels", "nix"):
        warn(f"the run was trained in a {recorded['route']} environment; labtrain makes the one of requirements.lock,"
             " whose bits can differ")  # fmt: skip
    lock = read_foreign_lock(home)
    say("environment  of requirements.lock and labtrain.lock")
    interpreter = interpreter_for(lock, version=recorded["python"], own_sha256=own_sha256, say=say)
    say(f"             {interpreter.said}")
    is_own = interpreter.current or lock.wheel_sha256 == own_sha256()
    whose = "this one" if is_own else "different from this one, which only compares"
    say(f"labtrain     {lock.wheel_name}, sha256 {lock.wheel_sha256[:12]}: {whose}")
    return interpreter


def _hand_over(verdict: Path, target: Path, say: Say) -> None:
    """Append a signed verdict to a file in the working directory, because the clone is removed."""
    if append_verdict(target, verdict.read_bytes()):
        say(f"verdict      in {target}; its author can append it to the run's {VERIFIED}")
