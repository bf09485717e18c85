"""Trainings with the loaders of loader_models and the models of manual_models, and what must be the same of each."""

import signal
from typing import Any

import torch

import labtrain
from labtrain.base.errors import EXIT_STOPPED
from tests.support.exact import Runner, configure, outcome, tell
from tests.support.loader_models import LOADERS, SEVERAL

MANUAL: dict[str, dict[str, Any]] = {
    "gan": {"_target_": "tests.support.manual_models.GAN"},
    "gan, clipped": {"_target_": "tests.support.manual_models.GAN", "clip": 0.1, "toggle": False},
    "wgan-gp": {"_target_": "tests.support.manual_models.GAN", "critics": 3, "penalty": 10.0},
    "wgan": {"_target_": "tests.support.manual_models.GAN", "critics": 3, "clamp": 0.05},
    "accumulated": {"_target_": "tests.support.manual_models.ByHand"},
    "closure": {"_target_": "tests.support.manual_models.ByHand", "closure": True},
    "actor and critic": {"_target_": "tests.support.manual_models.ActorCritic"},
}
STEPS_PER_BATCH = {"gan": 2, "gan, clipped": 2, "wgan-gp": 4, "wgan": 4, "accumulated": 0.5}
# In CI: one of each kind. The others: before a release.
LOADERS_IN_CI = ("weighted", "by length", "own generator", "max_size", "resumable stream")
# torch's samplers, each by its name in LOADERS.
SAMPLERS = ("shuffle", "sequential", "replacement", "subset", "weighted", "distributed", "batch sampler")
LOADERS_IN_FULL = tuple(name for name in [*LOADERS, *SEVERAL] if name not in (*LOADERS_IN_CI, "by rank", "playing"))
MANUAL_IN_CI = ("gan", "wgan", "accumulated")


WHOLE: dict[str, dict[str, Any]] = {
    "norm": {"_target_": "tests.support.whole_models.Normalised"},
    "clip": {"_target_": "tests.support.whole_models.Contrastive"},
    "supervised": {"_target_": "tests.support.whole_models.Contrastive", "supervised": True},
    "manual": {"_target_": "tests.support.whole_models.Contrastive", "manual": True},
}
WHOLE_IN_CI = ("norm", "clip")


def with_loader(loader: str, **more: Any) -> Any:
    config = configure("mlp", "uneven", "32-true", 0, **more)
    config["data"] = {"_target_": "tests.support.loader_models.Data", "loader": loader, "batch_size": 8}
    if loader in SEVERAL:
        config["model"]["_target_"] = "tests.support.loader_models.Several"
    config["trainer"].setdefault("max_steps", -1)
    config["trainer"]["max_epochs"] = 8
    if loader == "endless":
        config["trainer"] |= {"max_epochs": -1, "max_steps": 13, "limit_train_batches": 6}
    return config


def is_exact_with_loader(loader: str, runner: Runner, other: Runner) -> None:
    """Train on one device; then on four, two and one, stopped in between."""
    reference = outcome(runner.run(with_loader(loader)))
    assert tell(other, with_loader(loader), world=2, story="moved", seed=2) == reference


def manual(model: str, **more: Any) -> Any:
    config = configure("mlp", "uneven", **more)
    config["model"] = dict(MANUAL[model])
    return config


def is_exact_in_manual_optimization(model: str, runner: Runner, other: Runner) -> None:
    """Train on one device; then on two, four, two and one, killed and stopped in mid-epoch.

    A last batch of 5 samples has two shards: of four devices two have none.
    """
    config, per_batch = manual(model), STEPS_PER_BATCH.get(model, 1)
    reference = outcome(runner.run(config))
    config["checkpoint"]["every_n_steps"] = max(1, int(per_batch))
    for batches, world, kind in ((2, 2, signal.SIGKILL), (8, 4, signal.SIGTERM), (12, 2, signal.SIGKILL)):
        code = EXIT_STOPPED if kind == signal.SIGTERM else None
        other.run(config, world=world, code=code, signal_at=f"{int(batches * per_batch)} {int(kind)} 0")
    assert outcome(other.run(config)) == reference


def of_whole_batches(kind: str, *, shards: int = 4, **model: Any) -> Any:
    config = configure("mlp", "uneven", determinism={"shards": shards}, trainer={"sync_batchnorm": kind == "norm"})
    config["model"] = {**WHOLE[kind], **model}
    return config


def is_exact_over_whole_batches(kind: str, runner: Runner, other: Runner) -> None:
    reference = outcome(runner.run(of_whole_batches(kind)))
    assert tell(other, of_whole_batches(kind), world=2, story="moved", seed=4) == reference


def is_what_the_whole_batch_gives(kind: str, runner: Runner, other: Runner) -> None:
    """In float64, without draws: what differs is the order of additions. Bound: 1e-9 of the largest number."""
    found = []
    for shards, each in ((4, runner), (1, other)):
        run_dir = each.run(of_whole_batches(kind, shards=shards, dtype="float64", dropout=0.0))
        found.append(labtrain.load_weights(str(run_dir)))
    for name, one in found[0].items():
        two = found[1][name]
        if one.is_floating_point():
            assert (one - two).abs().max() <= 1e-9 * two.abs().max().clamp(min=1e-3), name
        else:
            assert torch.equal(one, two), name
