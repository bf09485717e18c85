"""Runs of exact_worker's models: start, stop, kill and move them, and say what they came to."""

import copy
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from labtrain.base.errors import EXIT_STOPPED
from tests.support import exact_worker
from tests.support.servers import free_ports

VARIABLES = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
             "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # fmt: skip
TIMEOUT_S = 300


def forkserver(preload: str = "tests.support.exact_worker") -> Any:
    """Return the context whose processes have torch, the models and VARIABLES; this process keeps its own variables.

    Args:
        preload: a module that all processes have imported; the first call decides.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    with patch.dict(os.environ, VARIABLES):
        multiprocessing.forkserver.ensure_running()
    return context


@dataclass
class Runner:
    """Trains below one folder.

    Attributes:
        folder: of runs and logs.
        logs: of each start.
        work: what each process calls.
        preload: a module that the processes have imported.
        accelerator: cpu or gpu.
        nodes: each process is a node of one device, so that several may share a GPU.
        begun: is called with the processes' ids once they have begun.
    """

    folder: Path
    logs: list[Path] = field(default_factory=list)
    work: Callable[..., None] = exact_worker.work
    preload: str = "tests.support.exact_worker"
    accelerator: str = "cpu"
    nodes: bool = False
    begun: Callable[[list[int]], None] | None = None

    def run(
        self,
        config: dict[str, Any],
        *,
        world: int = 1,
        code: int | None = 0,
        signal_at: str = "0 0 0",
        bucket_bytes: int | None = None,
        environment: dict[str, str] | None = None,
        patience_s: float = 0,
    ) -> Path | None:
        """Train in `world` processes; return the run's folder where it came to its end.

        Args:
            config: a configuration.
            world: how many processes.
            code: the exit code that is expected of rank 0; None: any.
            signal_at: step, number of a signal, and the rank that gets it.
            environment: variables of the processes.
            patience_s: how long the others may live on after one has died.
            bucket_bytes: for buckets so small that a model fills several.
        """
        context = forkserver(self.preload)
        config = copy.deepcopy(config)
        config["trainer"] |= {"devices": world, "accelerator": self.accelerator}
        if self.nodes:
            config["trainer"] |= {"devices": 1, "num_nodes": world}
        config["paths"] = {"runs": str(self.folder / "runs")}
        log = self.folder / f"log-{len(self.logs)}.txt"
        self.logs.append(log)
        port = free_ports()
        receiver, sender = context.Pipe(duplex=False)
        ranks = [
            context.Process(
                target=self.work,
                args=(config, rank, world, port, log, sender, signal_at, bucket_bytes, environment or {}),
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        sender.close()
        if self.begun is not None:
            self.begun([process.pid for process in ranks])
        deadline = time.monotonic() + TIMEOUT_S
        while alive := [process.sentinel for process in ranks if process.is_alive()]:
            broken = [process for process in ranks if process.exitcode not in (None, 0, EXIT_STOPPED)]
            if broken or time.monotonic() > deadline:
                if broken and ranks[0].exitcode is None and broken[0].exitcode > 0:
                    ranks[0].join(0.2)  # it may still say why
                connection.wait([process.sentinel for process in ranks if process not in broken], patience_s)
                for process in ranks:
                    process.kill()  # as the observer of Lightning's launcher does
            connection.wait(alive, 0.05)
        codes = [process.exitcode for process in ranks]
        assert time.monotonic() < deadline, log.read_text()
        assert code is None or codes[0] == code, f"exit codes {codes}\n{log.read_text()}"
        try:
            return Path(receiver.recv())
        except EOFError:  # none came to its end
            return None

    def said(self) -> str:
        return self.logs[-1].read_text()


def outcome(run_dir: Path | None) -> dict[str, Any]:
    """Return what must be the same: weights, the whole state, metrics, trail, and the name."""
    assert run_dir is not None
    receipt = json.loads((run_dir / "receipt.json").read_text())
    assert receipt["status"] == "complete"
    trail = [json.loads(line) for line in (run_dir / "trail.jsonl").read_text().splitlines()]
    return {**receipt["results"], "trail": trail, "run_id": receipt["run_id"]}


def newest_manifest(runner: Runner) -> dict[str, Any]:
    """Return what the newest checkpoint says of itself."""
    return dict(json.loads(max(runner.folder.glob("runs/*/*/checkpoints/step-*/manifest.json")).read_text()))


MODELS = {
    "mlp": ("MLP", "images"),
    "cnn": ("CNN", "images"),
    "gpt": ("GPT", "texts"),
}
# What each changes; sizes and batches are such that a last batch leaves some ranks without a sample.
SHAPES: dict[str, dict[str, Any]] = {
    "even": {"data": {"size": 40, "batch_size": 8}},
    "uneven": {"data": {"size": 37, "batch_size": 8}},
    "batch of 11": {"data": {"size": 36, "batch_size": 11}},
    "clipped": {"data": {"size": 37, "batch_size": 8}, "trainer": {"gradient_clip_val": 0.2}},
    "validated in between": {
        "data": {"size": 37, "batch_size": 8},
        "trainer": {"val_check_interval": 2},
        "model": {"plateau": True},
    },
    "ends in between": {"data": {"size": 37, "batch_size": 8}, "trainer": {"max_epochs": None, "max_steps": 13}},
}


def configure(
    model: str = "cnn", shape: str = "uneven", precision: str = "32-true", workers: int = 0, /, **more: Any
) -> Any:
    """Return a configuration; `more` holds groups, whose keys are put in."""
    name, kind = MODELS[model]
    config = exact_worker.default_config()
    config["model"] = {"_target_": f"tests.support.exact_worker.{name}"}
    config["data"] = {"_target_": "tests.support.exact_worker.Data", "kind": kind, "num_workers": workers}
    config["trainer"] |= {"max_epochs": 3, "precision": precision, "enable_progress_bar": False}
    for group, values in itertools.chain(SHAPES[shape].items(), more.items()):
        if isinstance(values, dict) and isinstance(config[group], dict):
            config[group] |= values
        else:
            config[group] = values
    return config


STORIES = ("whole", "killed", "killed twice", "terminated", "moved")
# The worlds of a run that is moved; the last is the case's own.
MOVES = {1: (4, 2, 1), 2: (4, 1, 2), 3: (1, 4, 3), 4: (2, 1, 4)}


def tell(
    runner: Runner, config: Any, *, world: int, story: str, seed: int, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Train a configuration in the way of a story, and return its outcome."""
    draw = random.Random(seed)
    config["checkpoint"]["every_n_steps"] = draw.choice([1, 2, 3])
    steps = 12  # at least, in each shape; two apart, since several ranks stop a step after the signal
    if story == "moved":
        worlds, number, kind = MOVES[world], 2, "term"
    else:
        number = {"whole": 0, "killed": 1, "killed twice": 2, "terminated": 1}[story]
        worlds, kind = (world,) * (number + 1), "term" if story == "terminated" else "kill"
    for step, here in zip(sorted(draw.sample(range(1, steps, 2), number)), worlds, strict=False):
        signal_at = f"{step} {int(exact_worker.SIGNALS[kind])} {draw.randrange(here)}"
        code = EXIT_STOPPED if kind == "term" else None
        runner.run(config, world=here, code=code, signal_at=signal_at, environment=environment)
    return outcome(runner.run(config, world=worlds[-1], environment=environment))


def exchanges(runner: Runner, *, world: int, last: int, batch_size: int = 8) -> list[str]:
    """Return the exchanges of two batches, the last one smaller, and assert that each rank begins them in one order."""
    config = configure("cnn", "even", data={"size": batch_size + last, "batch_size": batch_size})
    config["trainer"]["max_epochs"] = 1
    config["callbacks"]["exchanges"] = {"_target_": "tests.support.step_models.Exchanges", "folder": str(runner.folder)}
    runner.run(config, world=world, bucket_bytes=600)
    found = [(runner.folder / f"rank-{rank}").read_text().split() for rank in range(world)]
    assert all(each == found[0] for each in found), found
    return found[0]


def kill_in_saves(runner: Runner, other: Runner, number: int) -> None:
    """Send SIGKILL at a seeded random moment from the beginning of a save on, again and again in one run; its end is exact."""
    config = configure("mlp", "even", trainer={"max_epochs": number}, checkpoint={"every_n_steps": 1})
    reference = outcome(other.run(config))
    draw = random.Random(0)
    for _ in range(number):
        moment = f"{draw.randint(2, 4)} {draw.uniform(0, 0.03)}"
        assert runner.run(config, code=None, environment={"KILL_IN_SAVE": moment}) is None
    assert outcome(runner.run(config)) == reference
