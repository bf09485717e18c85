"""Choose the run to train: the one named by configuration, code and lock, or one to resume. No torch."""

import json
import os
import sys
from pathlib import Path

from labtrain.base.console import shown
from labtrain.base.contracts import as_options
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.base.files import text_sha256
from labtrain.record import receipt
from labtrain.record.config import refers
from labtrain.record.fingerprints import changed_files
from labtrain.record.identity import (
    RUN_ID,
    Config,
    Job,
    References,
    as_recorded,
    first_free,
    lock_digest,
    name,
    what_counts,
)
from labtrain.record.own_runs import checkpoints_of
from labtrain.record.ranks import find_ranks, restarted
from labtrain.record.receipt import origin_digest
from labtrain.record.sources import read_code, search_path
from labtrain.stores.backends import is_local
from labtrain.stores.layout import list_checkpoints
from labtrain.stores.store import Manifest, Store


def make_job(config: Config, *, root: Path, command: list[str], supervisor: int = 0, references: References = (),
             path: list[str] | None = None) -> Job:  # fmt: skip
    """Name the run that `config` describes, and its folder. Writes nothing.

    `path` is the module search path after `root`; by default this process's.
    """
    path = sys.path if path is None else path
    code, lock = read_code(root, as_options(config), path=path).digest, lock_digest(root)
    run_id = name(config, code=code, lock=lock)
    run_dir = Path(config["paths"]["runs"]).resolve() / str(config["experiment"]) / run_id
    origin = digest = ""
    if config["resume"] == "never":
        run_dir = fresh(run_dir)
    elif config["resume"] != "auto":
        experiment_runs = run_dir.parent
        begun, origin = find_origin(str(config["resume"]), experiment_runs, named=config["checkpoint"]["url"] or "")
        found = receipt.read(begun)
        refuse_other_weights(config, found, is_own=begun.name == run_id)
        if found is not None and same_run(found, config, references, code=code, lock=lock):
            run_dir, run_id, origin = begun, found["run_id"], ""  # already complete
        elif found["status"] == "complete" if found is not None else begun.name != run_id:
            digest = newest_digest(str(config["resume"]), origin)
            run_id = name(config, code=code, lock=lock, origin=digest)
            run_dir = experiment_runs / run_id
            if (new := receipt.read(run_dir)) is not None and new["status"] == "complete":
                origin = ""  # the same command again
        else:
            run_dir, run_id = begun, found["run_id"] if found is not None else run_id  # its folder may be renamed
    return Job(
        run_id=run_id,
        run_dir=str(run_dir),
        root=str(root),
        config=config,
        command=command,
        code_digest=code,
        lock_digest=lock,
        supervisor=supervisor,
        origin=origin,
        origin_digest=digest,
        references=references,
        path=os.pathsep.join(os.path.abspath(entry) for entry in search_path(root, path)[1:]),  # noqa: PTH100
    )


def refuse_other_weights(config: Config, found: receipt.Receipt | None, *, is_own: bool) -> None:
    """Raise if resume=RUN would ignore `init_from`, because RUN did not start with these weights.

    Args:
        config: resolved.
        found: the receipt of RUN.
        is_own: whether RUN has the name of this configuration, which covers the weights.

    Raises:
        ConfigError: names both keys.
    """
    first, began = config["init_from"], found["config"].get("init_from") if found is not None else None
    if first["path"] is None or is_own or (began and began["digest"] == first["digest"]):
        return
    raise ConfigError(
        f"resume={config['resume']} continues with the weights of that run, so init_from={first['path']} would have no"
        " effect",
        hint=f"init_from.path=null; or resume=never, to start with the weights of {first['path']}",
    )


def same_run(found: receipt.Receipt, config: Config, references: References, *, code: str, lock: str) -> bool:
    """Return whether a run is complete and has the requested configuration, code and lock."""
    if found["status"] != "complete":
        return False
    recorded = what_counts(as_recorded(config, references))
    if refers(recorded):  # values that are not recorded may differ: compare the name
        origin = origin_digest(found)
        if found["run_id"][:12] != name(config, code=code, lock=lock, origin=origin):
            return False
    return (
        what_counts(found["config"]) == recorded
        and found["code"]["digest"] == code
        and (found["environment"]["lock_digest"] or "") == lock
    )


def newest_digest(resume: str, origin: str) -> str:
    """Return the digest of the newest checkpoint in a folder or URL.

    Raises:
        ConfigError: there is no checkpoint to resume from.
    """
    store = Store(origin)
    there = [checkpoint for checkpoint in store.checkpoints() if not checkpoint.finished]
    if not there:
        raise ConfigError(f"resume={resume}: that run has no checkpoint to resume from", hint="resume=never")
    return checkpoint_digest(store.manifest(there[-1]))


def checkpoint_digest(manifest: Manifest) -> str:
    """Return the sha256 over a checkpoint's files, by name: it identifies the state that a run begins from."""
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    return text_sha256(json.dumps(files, sort_keys=True))


def fresh(run_dir: Path) -> Path:
    """Return a new folder for a run: RUN, RUN-2, ...; with a launcher RUN-NAME, the same in all ranks.

    Under Slurm NAME is the job's number, which stays the same after a requeue, so the new run resumes.

    Raises:
        ConfigError: the ranks have no common name.
    """
    if (ranks := find_ranks()) is None:
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            return first_free(run_dir)
        of_job = run_dir.with_name(f"{run_dir.name}-{job}")
        return of_job if restarted() else first_free(of_job)
    if not ranks.name:
        raise ConfigError(
            f"resume=never: {ranks.world} processes cannot agree on a name for the new folder",
            hint="torchrun --standalone, or --rdzv-id=NAME with a new NAME for each start",
        )
    named = f"{run_dir.name}-{ranks.name}"
    if not RUN_ID.fullmatch(named):
        raise ConfigError(
            f"resume=never: invalid folder name {named}: the launcher's name may have only letters, digits, _ and -",
            hint="torchrun --rdzv-id=NAME with these characters, or --standalone",
        )
    return run_dir.with_name(named)


def find_origin(resume: str, experiment_runs: Path, *, named: str = "") -> tuple[Path, str]:
    """Return the folder of the run that resume=RUN resumes, and the folder of its checkpoints.

    Args:
        resume: a run's folder, its id or the beginning of it, or a folder or URL with its checkpoints.
        experiment_runs: the folder of this experiment's runs.
        named: the store for this command's checkpoints.

    Raises:
        ConfigError: there is no run.
        StoreError: its checkpoints are in a store that this user has not named.
    """
    if not is_local(resume):
        store = Store(resume)
        there = store.checkpoints()
        if not there or there[-1].run:
            raise ConfigError(
                f"resume={resume}: {'it contains several runs' if there else 'it contains no checkpoint'}",
                hint=f"labtrain store ls {resume}; name the folder of one run",
            )
        return experiment_runs / _run_of(store.manifest(there[-1]), store.url), store.url
    places = [Path(resume.removeprefix("file://")).resolve(), experiment_runs / resume]
    if (
        receipt.is_id(resume)
        and not any(place.exists() for place in places)
        and receipt.with_id(resume, experiment_runs.parent)
    ):
        places.append(receipt.find(resume, experiment_runs.parent).resolve())
    for place in places:
        found = receipt.read(place)
        if found is not None:
            return place, checkpoints_of(place, found, named=named)
        checkpoints = list_checkpoints(place)
        if checkpoints:
            return experiment_runs / _run_of(checkpoints[-1][1], shown(place)), str(place)
    here = f"labtrain ls {shown(experiment_runs)}" if experiment_runs.is_dir() else "labtrain ls DIR lists runs"
    looked = ", ".join(f"{shown(place)}/{name}" for place in places for name in (receipt.FILE, "step-*"))
    raise ConfigError(
        f"resume={resume}: no run found: looked for {looked}",
        hint=f"{here}; resume=auto resumes the run of the same id, resume=never trains a new one",
    )


def _run_of(manifest: Manifest, place: str) -> str:
    """Return the run id in a checkpoint's manifest; it becomes a folder's name.

    Raises:
        DamagedError: it is not a run id.
    """
    found = str(manifest["run_id"])
    if not RUN_ID.fullmatch(found):
        raise DamagedError(
            f"{place}: its manifest says run {found[:40]!r}, expected 12 hex digits",
            hint="copy it again from the machine that wrote it; an imported checkpoint does not belong to a run",
        )
    return found


def changed_data(job: Job, done: receipt.Receipt) -> str:
    """Return a sentence about the files that changed since a complete run read them; empty if none did."""
    changed = changed_files(done["data"], Path(job.root))
    if not changed:
        return ""
    return (
        f"changed since {shown(job.run_dir)} was trained: {', '.join(changed)} (resume=never trains with the new data)"
    )


def near_run(job: Job) -> Path | None:
    """Return the newest unfinished run with the same experiment and configuration, but other code or environment."""
    run_dir = Path(job.run_dir)
    if job.config["resume"] != "auto" or run_dir.exists():
        return None
    near: list[tuple[float, Path]] = []
    wanted = what_counts(job.recorded())
    for path in run_dir.parent.glob(f"*/{receipt.FILE}"):
        try:
            found = receipt.read(path.parent)
        except LabtrainError:
            continue
        if found is None or found["status"] == "complete" or what_counts(found["config"]) != wanted:
            continue
        near.append((path.stat().st_mtime, path.parent))
    return max(near)[1] if near else None
