"""A run: its name, its folder, and the job that trains it.

A run is named by what determines its bits: the resolved configuration without the keys that only say how it is
executed, the code, and the environment's lock. The name is the first 12 hex digits of the sha256 of these three.
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
from typing import Any, cast

from labtrain.base import contracts, exact_json
from labtrain.base.contracts import Options, as_options
from labtrain.base.credentials import without_secrets
from labtrain.base.errors import LabtrainError
from labtrain.base.untrusted import read_source

Config = contracts.Config
References = Sequence[tuple[Sequence[object], str]]

JOB_VARIABLE = "LABTRAIN_JOB"
# Names that become folders: nothing that could leave the folder they are put in. RUN-2, RUN-<Slurm job> began anew.
EXPERIMENT = re.compile(r"\w[\w.=,+-]{0,199}")
EXPERIMENT_BYTES = 200  # of it in UTF-8
RUN_ID = re.compile(r"[0-9a-f]{12}(-[A-Za-z0-9_-]{1,100})?")
LOCK_FILE = "requirements.lock"
# The locks of each route. Nix installs the wheels of requirements.lock, conda has builds, and so bits, of its own.
ROUTES = {
    "wheels": (LOCK_FILE,),
    "nix": (LOCK_FILE,),
    "conda": ("conda-lock.yml", "requirements-conda.lock"),
}

# How a run is executed, watched or stored; nothing that the weights depend on.
EXECUTION_KEYS = (
    "experiment",
    "resume",
    "logger",
    "checkpoint",
    "trail",
    "gpu_stats",
    "paths",
    "data.num_workers",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
    "trainer.profiler",
)
# With fixed shards the number of devices does not matter either; with Lightning's own strategies it does.
DEVICE_KEYS = ("trainer.devices", "trainer.num_nodes", "trainer.strategy")
EXACT_STRATEGIES = ("auto", "ddp")
SHARDED_STRATEGY = "fsdp"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run to train, by value: what stage 1 (compose.py) hands to stage 2 (job.py).

    Attributes:
        run_id: 12 hex digits.
        run_dir: the run's folder; absolute.
        root: the experiment's folder; absolute. Its modules can be imported.
        config: the resolved configuration.
        command: what the person typed.
        code_digest: of the code that named it (sources.py); empty where another labtrain trains it.
        lock_digest: of the environment's lock; empty where there is none.
        supervisor: process id of the sweep that waits for this job; 0 for a single run.
        origin: with resume=RUN, the folder of the checkpoints that it goes on from; else empty.
        origin_digest: of the checkpoint there that it begins from, as a run of its own; empty where RUN itself goes on.
        stop_at: the step after which it saves and stops, as after a SIGTERM; 0: none.
        references: (path, text) of each text of the configuration that comes from `${oc.env:X}` (config.references).
        path: where modules are looked for after `root`, as PYTHONPATH is written: what train.py put into sys.path is
            there too. Empty: as a process of its own has it.
        within: the only folder that it may write in; absolute. Empty: what the person configured.
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
    references: References = ()

    def hold(self, place: str | Path) -> None:
        """Hold a place that is about to be written against `within`.

        Raises:
            LabtrainError: it lies elsewhere.
        """
        if self.within and not Path(place).resolve().is_relative_to(Path(self.within).resolve()):
            raise LabtrainError(
                f"{place} is outside of {self.within}, the only folder that this training may write in",
                hint="a receipt says where to write, and must not: take it from where it was written",
            )

    def recorded(self) -> Config:
        """Return the configuration as records and loggers have it."""
        return as_recorded(self.config, self.references)

    def enter_path(self) -> None:
        """Look for modules where stage 1 did: first beside train.py, as if that ran."""
        sys.path[:1] = [self.root]  # python -m puts the working directory there
        if self.path:
            sys.path[1:] = self.path.split(os.pathsep)

    def to_json(self) -> str:
        """Return it as text, without what is as by default: an older labtrain may not know of it."""
        by_default = {part.name: part.default for part in dataclasses.fields(self)}
        given = {key: value for key, value in dataclasses.asdict(self).items() if value != by_default[key]}
        return exact_json.dumps(given)

    @classmethod
    def from_json(cls, text: str) -> "Job":
        return cls(**exact_json.loads(text))


def as_recorded(config: Config, references: References) -> Config:
    """Return a configuration as it leaves the process: with references to the environment, without credentials.

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
    return cast(Config, without_secrets(recorded))


def get(tree: object, key: str) -> object:
    """Return the value at a dotted key of nested dicts; None where there is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


# What code gets as it is written: the order of its keys may count, as that of layers or of callbacks does.
ORDERED = ("model", "data", "callbacks")


def world_size(config: Config, devices: object) -> int:
    """Return the number of processes over all nodes; `auto` counts as one a node."""
    per_node = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
    return int(per_node * config["trainer"]["num_nodes"])


def shards_in_use(config: Config) -> int | None:
    """Return determinism.shards where bits do not depend on the devices; None under Lightning's own strategies."""
    shards: int | None = config["determinism"]["shards"]
    exact = config["trainer"]["strategy"] in EXACT_STRATEGIES
    return shards if exact and config["trainer"]["accelerator"] in ("auto", "cpu", "gpu", "cuda") else None


def name(config: Config, *, code: str, lock: str, origin: str = "") -> str:
    """Return the run id: 12 hex digits of what determines the run's bits.

    Args:
        config: resolved.
        code: its digest.
        lock: the digest of the environment's lock.
        origin: the digest of the checkpoint that it begins from; empty for a run that begins anew.
    """
    counts = what_counts(config)
    ordered = {key: counts.pop(key) for key in ORDERED if key in counts}
    text = exact_json.dumps(counts, sort_keys=True) + exact_json.dumps(ordered)
    parts = (text, code, lock, *([origin] if origin else []))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def what_counts(config: Config) -> Options:
    """Return the configuration without the keys that say how a run is executed."""
    kept = as_options(copy.deepcopy(config))
    for key in EXECUTION_KEYS + (DEVICE_KEYS if shards_in_use(config) is not None else ()):
        *parents, last = key.split(".")
        node = kept
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    # A switch that is off is as one that there was not yet.
    if not (on := {key: value for key, value in kept.pop("speed", {}).items() if value is not False}):
        return kept
    return kept | {"speed": on}


def lock_digest(root: Path) -> str:
    """Return the sha256 of the experiment's locks of this environment's route; empty where there are none."""
    locks = [root / name for name in ROUTES[route()] if (root / name).exists()]
    return hashlib.sha256(b"".join(map(read_source, locks))).hexdigest() if locks else ""


def route() -> str:
    """Return how this environment was made: conda, nix or wheels. Bits are promised within a route."""
    if (Path(sys.prefix) / "conda-meta").is_dir():
        return "conda"
    return "nix" if Path(sys.prefix).resolve().is_relative_to("/nix/store") else "wheels"


def first_free(run_dir: Path) -> Path:
    """Return `run_dir`, or RUN-2, RUN-3, ... where that exists."""
    number, free = 1, run_dir
    while free.exists():
        number += 1
        free = run_dir.with_name(f"{run_dir.name}-{number}")
    return free
