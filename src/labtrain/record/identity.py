"""A run: its name, its folder, and the job that trains it.

A run is named by what determines its bits: the resolved configuration without the keys that only control execution,
the code, and the environment's lock. The name is the first 12 hex digits of the sha256 of these three.
"""

import copy
import dataclasses
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labtrain.base import contracts, exact_json
from labtrain.base.contracts import Options, as_options
from labtrain.base.credentials import without_secrets
from labtrain.base.errors import LabtrainError
from labtrain.base.files import text_sha256
from labtrain.base.untrusted import read_source

Config = contracts.Config
References = Sequence[tuple[Sequence[object], str]]

JOB_VARIABLE = "LABTRAIN_JOB"
JOB_MODULE = "labtrain.launch.job"  # in the command of each rank of a training
SCRIPT = "train.py"
# Names that become folders must not lead out of their parent. RUN-2 and RUN-<Slurm job> come from resume=never.
EXPERIMENT = re.compile(r"\w[\w.=,+-]{0,199}")
EXPERIMENT_BYTES = 200  # of it in UTF-8
RUN_ID = re.compile(r"[0-9a-f]{12}(-[A-Za-z0-9_-]{1,100})?")
SHORT_ID = re.compile(r"[0-9a-f]{4,11}")  # the beginning of one
LOCK_FILE = "requirements.lock"
# The locks of each route. Nix installs the wheels of requirements.lock. conda has different builds, so different bits,
# and so has its environment for machines without a GPU.
ROUTES = {
    "wheels": (LOCK_FILE,),
    "nix": (LOCK_FILE,),
    "conda": ("conda-lock.yml", "requirements-conda.lock"),
    "conda-cpu": ("conda-lock-cpu.yml", "requirements-conda.lock"),
}

# How a run is executed, watched or stored; the weights do not depend on these.
EXECUTION_KEYS = (
    *contracts.EVALUATIONS,
    "predictions",
    "experiment",
    "resume",
    "logger",
    "checkpoint",
    "trail",
    "gpu_stats",
    "failures",
    "paths",
    "data.num_workers",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
    "trainer.profiler",
)
# With shards the number of devices does not matter; with Lightning's own strategies it does.
DEVICE_KEYS = ("trainer.devices", "trainer.num_nodes", "trainer.strategy")
EXACT_STRATEGIES = ("auto", "ddp")
SHARDED_STRATEGY = "fsdp"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run to train, by value: stage 1 (compose.py) hands it to stage 2 (job.py).

    Attributes:
        run_id: 12 hex digits.
        run_dir: the run's folder; absolute.
        root: the experiment's folder; absolute. Its modules can be imported.
        config: the resolved configuration.
        command: what the user typed.
        code_digest: of the code in the run's name (sources.py); empty if another labtrain trains it.
        lock_digest: of the environment's lock; empty if there is no lock.
        supervisor: process id of the sweep that waits for this job; 0 for a single run.
        origin: with resume=RUN, the folder of the checkpoints to resume from; else empty.
        origin_digest: of the checkpoint there, if a new run begins from it; empty if RUN itself resumes.
        stop_at: the step after which it saves and stops, as after a SIGTERM; 0: do not stop.
        references: (path, text) of each text of the configuration that comes from `${oc.env:X}` (config.references).
        path: the module search path after `root`, in the form of PYTHONPATH, including what train.py added to
            sys.path. Empty: the default.
        evaluate: validate, test or predict with the final weights of this complete run; empty: train it.
        predictions: file for the predictions; absolute. Empty: in the run's folder.
        within: the only folder that it may write to; absolute. Empty: the configured folders.
        answers: its process writes the result or the error as JSON to standard output, for labtrain.train.
    """

    run_id: str
    run_dir: str
    root: str
    config: Config
    command: list[str]
    code_digest: str
    lock_digest: str
    supervisor: int = 0
    origin: str = ""
    origin_digest: str = ""
    stop_at: int = 0
    path: str = ""
    within: str = ""
    answers: bool = False
    evaluate: str = ""
    predictions: str = ""
    references: References = ()

    def hold(self, place: str | Path) -> None:
        """Raise LabtrainError if a place that is about to be written is outside `within`."""
        if self.within and not Path(place).resolve().is_relative_to(Path(self.within).resolve()):
            raise LabtrainError(
                f"{place} is outside {self.within}, the only folder that this training may write to",
                hint="the receipt sets an output path, which labtrain never does: ask its sender for the original",
            )

    def recorded(self) -> Config:
        """Return the configuration for records and loggers."""
        return as_recorded(self.config, self.references)

    def enter_path(self) -> None:
        """Use the module search path of stage 1: first the folder of train.py."""
        sys.path[:1] = [self.root]  # python -m puts the working directory there
        if self.path:
            sys.path[1:] = self.path.split(os.pathsep)

    def to_json(self) -> str:
        """Return it as text without default values, which an older labtrain may not know."""
        by_default = {part.name: part.default for part in dataclasses.fields(self)}
        given = {key: value for key, value in dataclasses.asdict(self).items() if value != by_default[key]}
        return exact_json.dumps(given)

    @classmethod
    def from_json(cls, text: str) -> "Job":
        return cls(**exact_json.loads(text))


def as_recorded(config: Config, references: References) -> Config:
    """Return a configuration for recording: with references to the environment, without credentials.

    Args:
        config: resolved.
        references: (path, text) of each text that comes from the environment.
    """
    recorded = copy.deepcopy(config)
    for path, text in references:
        node: Any = recorded
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = text
    return without_secrets(recorded)


def get(tree: object, key: str) -> object:
    """Return the value at a dotted key of nested dicts; None if the key does not exist."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


# Groups whose key order may matter to the code, such as the order of layers or callbacks.
ORDERED = ("model", "data", "callbacks")


def world_size(config: Config, devices: object) -> int:
    """Return the number of processes over all nodes; `auto` counts as one per node."""
    per_node = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
    return int(per_node * config["trainer"]["num_nodes"])


def shards_in_use(config: Config) -> int | None:
    """Return determinism.shards if bits do not depend on the devices; None with Lightning's own strategies."""
    shards: int | None = config["determinism"]["shards"]
    exact = config["trainer"]["strategy"] in EXACT_STRATEGIES
    return shards if exact and config["trainer"]["accelerator"] in ("auto", "cpu", "gpu", "cuda") else None


def name(config: Config, *, code: str, lock: str, origin: str = "") -> str:
    """Return the run id: 12 hex digits of what determines the run's bits.

    Args:
        config: resolved.
        code: the code's digest.
        lock: the digest of the environment's lock.
        origin: the digest of the checkpoint that the run begins from; empty if it begins from scratch.
    """
    counts = what_counts(config)
    ordered = {key: counts.pop(key) for key in ORDERED if key in counts}
    text = exact_json.dumps(counts, sort_keys=True) + exact_json.dumps(ordered)
    parts = (text, code, lock, *([origin] if origin else []))
    return text_sha256("\0".join(parts))[:12]


def what_counts(config: Config) -> Options:
    """Return the configuration without the keys that only control execution."""
    kept = as_options(copy.deepcopy(config))
    for key in EXECUTION_KEYS + (DEVICE_KEYS if shards_in_use(config) is not None else ()):
        *parents, last = key.split(".")
        node = kept
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    # The weights count, not their place. Without `init_from` the name is that of older versions.
    if (first := kept.pop("init_from", None)) and first["path"] is not None:
        kept["init_from"] = {key: value for key, value in first.items() if key != "path"}
    # A switch that is off equals a missing one, as in configurations of older versions.
    if not (on := {key: value for key, value in kept.pop("speed", {}).items() if value is not False}):
        return kept
    return kept | {"speed": on}


def lock_digest(root: Path, kind: str | None = None) -> str:
    """Return the sha256 of the experiment's locks for a route, by default this one's; empty if there are none."""
    locks = [root / name for name in ROUTES[kind or route()] if (root / name).exists()]
    return hashlib.sha256(b"".join(map(read_source, locks))).hexdigest() if locks else ""


def route() -> str:
    """Return how this environment was made: a key of ROUTES. Bits are the same only within a route."""
    packages = Path(sys.prefix) / "conda-meta"
    if packages.is_dir():
        return "conda-cpu" if any(packages.glob("pytorch-*-cpu_*.json")) else "conda"
    return "nix" if Path(sys.prefix).resolve().is_relative_to("/nix/store") else "wheels"


def enclosing(path: str | Path) -> Path | None:
    """Return the experiment's folder: the nearest one with a train.py, upwards from a folder; None if there is none."""
    here = Path(path).resolve()
    return next((folder for folder in (here, *here.parents) if (folder / SCRIPT).is_file()), None)


def first_free(run_dir: Path) -> Path:
    """Return `run_dir`, or RUN-2, RUN-3, ... if it exists."""
    number, free = 1, run_dir
    while free.exists():
        number += 1
        free = run_dir.with_name(f"{run_dir.name}-{number}")
    return free
