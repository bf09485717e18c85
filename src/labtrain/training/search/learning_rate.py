"""A learning rate to start with, by Lightning's Tuner: the search of `labtrain lr-find`.

Smith 2017, https://arxiv.org/abs/1506.01186. Lightning trains with a rate that grows in each step by the same factor,
and smooths the loss. labtrain suggests the rate at which the loss falls fastest from one step to the next. Lightning's
own suggestion divides by the difference between two rates, so it is near the smallest rate: there a small change of the
loss, by chance, outweighs everything (Lightning 2.6, tuner/lr_finder.py).
"""

import math
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.tuner.tuning import Tuner

from labtrain.base.contracts import Options
from labtrain.base.errors import ConfigError
from labtrain.checkpoints.initial import load_initial
from labtrain.record.identity import Config
from labtrain.training.lightning import put_checkpoint_connector
from labtrain.training.search.tuner import Searched, say, searching
from labtrain.training.state.initial import put_initial
from labtrain.training.state.rebuild import Connector

SAID = ("LR finder stopped early",)
FIRST_STEPS = 10
NAMES = ("lr", "learning_rate")  # that Lightning looks for, in the model and its hyperparameters


def suggested_rate(
    config: Config, root: Path, *, min_rate: float, max_rate: float, steps: int, plot: Path | None
) -> float:
    """Train with growing rates, print which key to set, and return the suggested rate.

    Args:
        config: of a training on one device.
        root: the experiment's folder.
        min_rate: the first rate.
        max_rate: the last rate.
        steps: optimizer steps, each with a new rate.
        plot: a PNG file to write, with the loss of each rate.

    Raises:
        LabtrainError: the model has no rate to set, or the search finds none.
    """
    first = config["init_from"]
    with searching(config, said=SAID) as search:
        trainer, model = search.trainer, search.model
        name = _name_of_rate(model)
        if first["path"] is not None:
            start = lambda trainer: put_initial(trainer, load_initial(first, root), first, say=say)  # noqa: E731
            put_checkpoint_connector(trainer, Connector(trainer, initialise=start))
        _let_epochs_repeat(trainer)
        rates, losses = _trained(search, min_rate=min_rate, max_rate=max_rate, steps=steps)
        best = steepest(losses)
        if best is None:
            raise ConfigError(
                f"the loss does not fall in {len(losses)} steps from {min_rate:g} to {max_rate:g}",
                hint="labtrain lr-find --steps 300, or a smaller --min or --max",
            )
        if plot is not None:
            _draw(rates, losses, best, plot)
    rate = float(rates[best])
    say(f"set {f'model.{name}={rate:.4g}' if name in config['model'] else f'self.{name} = {rate:.4g} in the model'}")
    return rate


def _trained(search: Searched, *, min_rate: float, max_rate: float, steps: int) -> tuple[list[float], list[float]]:
    """Return the rate of each step, and the smoothed loss."""
    options: Options = {"min_lr": min_rate, "max_lr": max_rate, "num_training": steps, "update_attr": False}
    try:
        finder = Tuner(search.trainer).lr_find(search.model, datamodule=search.datamodule, **options)
    except MisconfigurationException as error:
        raise ConfigError(f"lr-find: {error}", hint="try rates with python train.py -m model.lr=0.1,0.01") from error
    assert finder is not None
    return finder.results["lr"], finder.results["loss"]


def steepest(losses: list[float]) -> int | None:
    """Return the step at which the loss falls fastest; None if it does not fall after the first steps.

    The first steps and the last one do not count: the average has just begun, and the loss may have diverged.
    """
    falls = [
        (losses[step + 1] - losses[step - 1], step)
        for step in range(FIRST_STEPS + 1, len(losses) - 2)
        if math.isfinite(losses[step + 1]) and math.isfinite(losses[step - 1])
    ]
    change, step = min(falls, default=(0.0, 0))
    return step if change < 0 else None


def _draw(rates: list[float], losses: list[float], best: int, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.semilogx(rates, losses)
    axes.plot(rates[best], losses[best], "o")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss, smoothed")
    figure.savefig(file, format="png")


def _name_of_rate(model: pl.LightningModule) -> str:
    """Return the attribute or hyperparameter from which a model's optimizer takes its rate.

    Raises:
        ConfigError: there is none, or the model optimizes by itself.
    """
    if not model.automatic_optimization:
        raise ConfigError(
            f"{type(model).__name__} uses manual optimization: the search cannot set the rates of its optimizers",
            hint="try rates with python train.py -m model.lr=0.1,0.01",
        )
    for name in NAMES:
        if hasattr(model, name) or name in model.hparams:
            return name
    raise ConfigError(
        f"{type(model).__name__} has neither self.lr nor self.learning_rate, nor such a hyperparameter",
        hint="in __init__(self, lr): self.lr = lr; in configure_optimizers: lr=self.lr",
    )


def _let_epochs_repeat(trainer: pl.Trainer) -> None:
    """Let the search begin an epoch again after the last one: only its own number of steps ends it.

    Schedulers of the model, which the search replaces, may ask for the number of epochs: change it when they exist.
    """
    strategy, set_up = trainer.strategy, trainer.strategy.setup

    def setup(trainer: pl.Trainer) -> None:
        set_up(trainer)
        trainer.fit_loop.max_epochs = -1

    strategy.setup = setup  # type: ignore[method-assign]
