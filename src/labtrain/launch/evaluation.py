"""`validate=RUN`, `test=RUN`, `predict=RUN`: from a command line to the job that evaluates a complete run. No torch.

The configuration is that of the run's receipt, with the keys that were typed. The code is that of the experiment now.
The receipt does not change.
"""

import copy
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from labtrain.base.console import few, shown, warn
from labtrain.base.contracts import EVALUATIONS, as_options
from labtrain.base.errors import ConfigError
from labtrain.record import config as configuration
from labtrain.record import receipt
from labtrain.record.identity import ROUTES, Config, Job, get, lock_digest, route
from labtrain.record.provenance import code_digests
from labtrain.record.ranks import adopt, find_ranks
from labtrain.record.sources import search_path

HAVE_NO_EFFECT = ("resume", "init_from", "checkpoint", "trail", "failures", "paths")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What to evaluate.

    Attributes:
        stage: one of EVALUATIONS.
        run: a run's folder or id, as it was typed.
        file: for the predictions; empty: in the run's folder.
    """

    stage: str
    run: str
    file: str


def asked_in(config: Config) -> Asked | None:
    """Remove the keys of an evaluation from a configuration, and return what they ask for; None: a training.

    Raises:
        ConfigError: they contradict each other, or name no run.
    """
    tree = as_options(config)
    given = {stage: tree.pop(stage) for stage in EVALUATIONS if tree.get(stage) is not None}
    for stage in EVALUATIONS:
        tree.pop(stage, None)
    file = tree.pop("predictions", None)
    if len(given) > 1:
        both = " ".join(f"{stage}={run}" for stage, run in given.items())
        raise ConfigError(f"{both}: a command does one of them", hint="a command for each")
    for stage, run in given.items():
        if not isinstance(run, str) or not run:
            raise ConfigError(
                f"{stage}={run}: must be a run's folder or id",
                hint=f"{stage}=runs/EXPERIMENT/ID; quote an id of digits only: '{stage}=\"{run}\"'",
            )
        if file is not None and (stage != "predict" or not isinstance(file, str)):
            raise ConfigError(f"predictions={file}: must be a file's path, with predict=RUN", hint="predict=RUN")
        return Asked(stage=stage, run=run, file=file or "")
    if file is not None:
        raise ConfigError(f"predictions={file}, but there is no predict=RUN", hint="predict=RUN")
    return None


def evaluation_job(asked: Asked, composed: Config, *, root: Path, command: list[str], typed: list[str]) -> Job:
    """Return the job that evaluates a complete run; warn if code or lock differ from the run's.

    Args:
        asked: what to evaluate.
        composed: the experiment's configuration, with what was typed.
        root: the experiment's folder.
        command: what the user typed.
        typed: its overrides.

    Raises:
        ConfigError: there is no such run, it is not complete, or an override cannot be used.
    """
    run_dir, done = _find(asked, Path(composed["paths"]["runs"]))
    config = configuration.completed(copy.deepcopy(done["config"]))
    configuration.check_whole(config)
    _override(as_options(config), as_options(composed), typed, asked)
    config, references = configuration.from_environment(config)
    config |= {"resume": "never", "init_from": configuration.init_from(None)}
    ranks = find_ranks()
    config["trainer"]["num_nodes"] = 1
    if ranks:
        config["trainer"]["devices"] = 1
    adopt(config, ranks)
    configuration.check(config)
    configuration.check_modules(config, root)
    job = Job(
        run_id=done["run_id"],
        run_dir=str(run_dir),
        root=str(root),
        config=config,
        command=command,
        code_digest="",
        lock_digest=lock_digest(root),
        references=references,
        path=os.pathsep.join(os.path.abspath(entry) for entry in search_path(root, sys.path)[1:]),  # noqa: PTH100
        evaluate=asked.stage,
        predictions=str(Path(asked.file).absolute()) if asked.file else "",
    )
    code = code_digests(job)
    if unlike := [*_unlike_code(done, code), *_unlike_lock(done, job.lock_digest)]:
        warn(f"not as when {shown(run_dir)} was trained, so the numbers can differ: {few(unlike)}")
    return dataclasses.replace(job, code_digest=str(code["digest"]))


def _find(asked: Asked, runs: Path) -> tuple[Path, receipt.Receipt]:
    """Return the folder and receipt of a complete run.

    Raises:
        ConfigError: there is none.
    """
    word, place = f"{asked.stage}={asked.run}", receipt.find(asked.run, runs).resolve()
    if (found := receipt.read(place)) is None:
        raise ConfigError(f"{word}: no such run", hint=f"labtrain ls {shown(runs)}")
    if found["status"] != "complete":
        raise ConfigError(
            f"{word}: that run is {found['status']}, so it has no final weights",
            hint=f"python train.py resume={shown(place)} trains it to its end",
        )
    return place, found


def _override(config: dict[str, object], composed: dict[str, object], typed: list[str], asked: Asked) -> None:
    """Put the keys that were typed into a run's configuration, each with its composed value.

    Raises:
        ConfigError: an override has no value, or no effect.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create().parse_overrides(typed):
        key = override.key_or_group
        first = key.partition(".")[0]
        if key in (*EVALUATIONS, "predictions") or first == "hydra":
            continue
        if first == "experiment" or first in HAVE_NO_EFFECT:
            raise ConfigError(
                f"{override.input_line} has no effect with {asked.stage}={asked.run}: the run has its configuration",
                hint=f"leave it out; python train.py {asked.stage}={asked.run} KEY=VALUE changes other keys",
            )
        if override.is_delete() or (get(composed, key) is None and first not in composed):
            raise ConfigError(
                f"{override.input_line}: with {asked.stage}={asked.run} an override names a key of the configuration",
                hint="KEY=VALUE, or KEY=null",
            )
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                child = node[parent] = {}
            node = child
        node[last] = copy.deepcopy(get(composed, key))


def _unlike_code(done: receipt.Receipt, code: Mapping[str, object]) -> Iterator[str]:
    """Yield the names of files that differ from those of a run."""
    for kind in ("sources", "outside"):
        before, now = as_options(done["code"]).get(kind, {}), code.get(kind, {})
        assert isinstance(now, dict)
        yield from sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if done["code"]["labtrain"] != code["labtrain"]:
        yield "labtrain's own code"


def _unlike_lock(done: receipt.Receipt, lock: str) -> Iterator[str]:
    if (done["environment"]["lock_digest"] or "") != lock:
        yield from ROUTES[route()]
