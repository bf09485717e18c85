"""A process of a training, for tests.support.exact.Runner: one of several nodes exchanges through the host."""

import sys
from pathlib import Path
from typing import Any

from labtrain.base.signals import Wishes
from labtrain.record.identity import Config
from labtrain.training import trainer
from labtrain.training.sharded.strategy import ExactDDP
from tests.gpu import models, staged  # noqa: F401  # the forkserver imports the models once
from tests.support import exact_worker

SAID = "exchanges through the host:"


def of_several_devices() -> None:
    """Train with the strategy of several devices, also on one."""

    def make(config: Config, accelerator: str, devices: object, wishes: Wishes) -> ExactDDP:
        sys.stderr.write("group of one: ExactDDP\n")
        return ExactDDP(shards=config["determinism"]["shards"], wishes=wishes)

    trainer.make_strategy = make


def work(config: dict[str, Any], rank: int, world: int, port: int, log: Path, *others: Any) -> None:
    """Do what exact_worker.work does."""
    if config["trainer"]["num_nodes"] > 1:
        staged.begin(rank, world, port)
    if "GROUP_OF_ONE" in others[-1]:
        of_several_devices()
    try:
        exact_worker.work(config, rank, world, port, log, *others)
    finally:
        with log.open("a") as file:
            file.write(f"{SAID} {staged.exchanges}\n")
