"""Tells a watcher that this rank goes on: at each batch of any loop, and around a save (watcher.py).

Before the first step nothing counts: a first compile may take long. With one process nothing is watched, since a
debugger or a pause would look like a hang, and nobody waits for it.
"""

import faulthandler
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl

from labtrain.record.ranks import Beacon, Ranks
from labtrain.training.callbacks.watcher import DOING, SAVE, SIGNAL, Pulse, Told, start
from labtrain.training.cluster import resolve

TRAIN, VALIDATION, TEST = (DOING.index(name) for name in ("train", "validation", "test"))


class Heart:
    """Moves the counter that the watcher looks at.

    Args:
        seconds: the time without progress after which the training hangs; None: nothing is watched.
        run_dir: as people know it.
        ranks: of a launcher.
    """

    def __init__(self, *, seconds: float | None, run_dir: str, ranks: Ranks | None) -> None:
        self.seconds, self.run_dir, self.ranks = seconds, run_dir, ranks
        self.pulse: Pulse | None = None
        self.watcher: subprocess.Popen[bytes] | None = None
        self.stacks: int | None = None
        self.step = 0
        self.begun = False

    def start(self, trainer: pl.Trainer, beacon: Beacon) -> None:
        """Start the watcher; called on every rank.

        Args:
            trainer: at the start of the training.
            beacon: of rank 0, which the watcher tells why it kills a rank.
        """
        if self.seconds is None or trainer.world_size == 1 or self.watcher is not None:
            return
        address = "127.0.0.1" if self.ranks is None or self.ranks.nodes == 1 else resolve(self.ranks)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as listens:
            if trainer.is_global_zero:
                listens.bind((address if address == "127.0.0.1" else "", 0))
            port, token = trainer.strategy.broadcast((listens.getsockname()[1], secrets.token_hex(16)))
            told = Told(
                rank=trainer.global_rank,
                world=trainer.world_size,
                process=os.getpid(),
                seconds=self.seconds,
                run_dir=self.run_dir,
                address=address,
                port=port,
                token=token,
                pulse=os.memfd_create("labtrain-pulse"),
                stacks=os.memfd_create("labtrain-stacks"),
                socket=listens.fileno() if trainer.is_global_zero else None,
                beacon=beacon.descriptor if trainer.is_global_zero else None,
                waited_for=beacon.is_read,
            )
            self.pulse, self.stacks, self.watcher = Pulse(told.pulse), told.stacks, start(told)
            os.close(told.pulse)  # it is mapped

    def close(self) -> None:
        """Watch no longer."""
        if self.watcher is None:
            return
        self.watcher.kill()
        self.watcher.wait()
        faulthandler.unregister(SIGNAL)
        assert self.stacks is not None
        os.close(self.stacks)
        self.pulse = self.watcher = self.stacks = None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save in the block: what is read and written counts as progress, too."""
        self.beat(SAVE)
        yield
        self.beat(TRAIN)

    def done(self, step: int) -> None:
        """Tell that a batch of the training is done, and the last finished step."""
        self.step, self.begun = step, True
        self.beat(TRAIN)

    def beat(self, doing: int) -> None:
        """Tell that this rank goes on, if it has done a batch."""
        if self.pulse is not None and self.begun:
            self.pulse.beat(self.step, doing)
