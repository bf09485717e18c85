"""labtrain: training whose result is a function of what you wrote, not of how it ran.

Eleven packages; an import points down only, and `make check` holds that::

    cli                               each command parses, calls one function, prints
    project                           a new experiment, the demo
    review                            questions about finished runs: verify, gate, ls, report, crate, sign
    launch                            from a command line to a named job in a process of its own
    training                          trains one run; the only package that imports Lightning
    data  checkpoints  environment    the loader; a checkpoint's files; lock and doctor
    exact                             arithmetic with the same bits on any number of devices: torch, no Lightning
    record                            what names a run and what it leaves: sources, receipt, trail, digests. No torch
    stores                            where checkpoints lie: folders and object stores. No torch
    base                              errors, text for terminals, credentials, files of other people. No torch

Beside them: `conf/`, the configuration that every experiment begins from; `bootstrap`, which makes the environment
and so needs none; `augment`, a public module; `assets`.

`import labtrain` imports none of them: the public names below are loaded when first used, so that `labtrain --help`
and the composition of a configuration never pay for torch. So is the module `labtrain.augment`.
"""

import importlib
import os
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "DataLoader",
    "LabtrainError",
    "Result",
    "digest",
    "fingerprint",
    "gather_outputs",
    "load_weights",
    "main",
    "train",
]

_HOMES = {
    "DataLoader": "labtrain.data.loader",
    "LabtrainError": "labtrain.base.errors",
    "Result": "labtrain.training.fit",
    "digest": "labtrain.record.digests",
    "fingerprint": "labtrain.record.fingerprints",
    "gather_outputs": "labtrain.training.sharded.gathering",
    "load_weights": "labtrain.checkpoints.locate",
    "main": "labtrain.launch.compose",
    "train": "labtrain.training.fit",
}

if os.environ.get("LABTRAIN_FROM_SOURCE") == "1":  # a training started this process: a loader's worker, say
    importlib.import_module("labtrain.record.sources").load_from_source()

if TYPE_CHECKING:
    from labtrain import augment as augment
    from labtrain.base.errors import LabtrainError
    from labtrain.checkpoints.locate import load_weights
    from labtrain.data.loader import DataLoader
    from labtrain.launch.compose import main
    from labtrain.record.digests import digest
    from labtrain.record.fingerprints import fingerprint
    from labtrain.training.fit import Result, train
    from labtrain.training.sharded.gathering import gather_outputs


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value
    if name == "augment":
        return importlib.import_module("labtrain.augment")
    raise AttributeError(f"module 'labtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "augment"})
