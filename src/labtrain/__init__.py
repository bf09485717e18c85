"""labtrain: training whose result depends on what you wrote, not on how it ran.

It has twelve packages. A package imports only from those below it, and `make check` enforces this::

    cli                               each command parses, calls one function, prints
    project                           an experiment: new, update, upgrade, editors' schemas; the demo
    review                            finished runs: verify, gate, ls, report, crate, sign
    launch                            from a command line to a named job in its own process
    training                          trains one run; the only package that imports Lightning
    data  checkpoints  environment    the loader; a checkpoint's files; lock and doctor
    exact                             arithmetic with the same bits on any number of devices: torch, no Lightning
    record                            a run's name and its records: sources, receipt, trail, digests. No torch
    stores                            places for checkpoints: folders and object stores. No torch
    base                              errors, text for terminals, credentials, untrusted files. No torch

Besides these there are `conf/`, the default configuration of every experiment; `bootstrap`, which makes the
environment; `augment`, a public module above `data`; and `assets`.

`import labtrain` imports none of them. The public names below and the module `labtrain.augment` are loaded at first
use, so that `labtrain --help` and composing a configuration do not import torch.
"""

import os
import sys

TYPE_CHECKING = False  # typing takes 10 ms, in which Ctrl-C would print a traceback (launch/start.py)
__version__ = "0.1.0"
__all__ = [
    "DataLoader",
    "LabtrainError",
    "Result",
    "compose",
    "digest",
    "fingerprint",
    "gather",
    "gather_outputs",
    "load",
    "load_weights",
    "main",
    "runs",
    "train",
]

_HOMES = {
    "DataLoader": "labtrain.data.loader",
    "LabtrainError": "labtrain.base.errors",
    "Result": "labtrain.record.receipt",
    "compose": "labtrain.launch.experiment",
    "digest": "labtrain.record.digests",
    "fingerprint": "labtrain.record.fingerprints",
    "gather": "labtrain.training.sharded.whole",
    "gather_outputs": "labtrain.training.sharded.gathering",
    "load": "labtrain.review.catalog.loading",
    "load_weights": "labtrain.checkpoints.locate",
    "main": "labtrain.launch.start",
    "runs": "labtrain.review.catalog.listing",
    "train": "labtrain.launch.from_python",
}


def _module(name: str) -> "ModuleType":
    __import__(name)
    return sys.modules[name]


if os.environ.get("LABTRAIN_FROM_SOURCE") == "1":  # started by a training, for example a loader's worker
    _module("labtrain.record.sources").load_from_source()

if TYPE_CHECKING:
    from types import ModuleType

    from labtrain import augment as augment
    from labtrain.base.errors import LabtrainError
    from labtrain.checkpoints.locate import load_weights
    from labtrain.data.loader import DataLoader
    from labtrain.launch.experiment import compose
    from labtrain.launch.from_python import train
    from labtrain.launch.start import main
    from labtrain.record.digests import digest
    from labtrain.record.fingerprints import fingerprint
    from labtrain.record.receipt import Result
    from labtrain.review.catalog.listing import runs
    from labtrain.review.catalog.loading import load
    from labtrain.training.sharded.gathering import gather_outputs
    from labtrain.training.sharded.whole import gather


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = globals()[name] = getattr(_module(_HOMES[name]), name)
        return value
    if name == "augment":
        return _module("labtrain.augment")
    raise AttributeError(f"module 'labtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "augment"})
