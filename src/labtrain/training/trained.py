"""A trained model, ready for inference: made from its configuration, with the weights of a checkpoint."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from labtrain.base.console import few
from labtrain.base.contracts import Options, State
from labtrain.base.errors import ConfigError
from labtrain.checkpoints.format import load_folder, load_weights_of
from labtrain.exact.determinism import keep_draws
from labtrain.training.trainer import make_model


def make_trained(options: Options, folder: Path) -> pl.LightningModule:
    """Make a model, load a checkpoint's weights, and return it on the CPU in eval mode.

    The hooks `configure_model` and `on_load_checkpoint` run, as in Lightning's `load_from_checkpoint`. The global
    generators of random numbers are as before.

    Args:
        options: `model` of the configuration.
        folder: of the checkpoint, verified.

    Raises:
        ConfigError: the model cannot be made, or the weights do not fit.
    """
    put_draws_back = keep_draws()
    try:
        with torch.device("cpu"):
            model = make_model(options)
            if is_overridden("configure_model", model):
                model.configure_model()
    finally:
        put_draws_back()
    weights = load_weights_of(folder)
    if is_overridden("on_load_checkpoint", model):
        state = load_folder(folder)
        model.on_load_checkpoint(state)
        weights = state["state_dict"]
    if wrong := misfits(model.state_dict(), weights):
        raise ConfigError(
            f"the weights do not fit {options['_target_']}: {few(wrong)}",
            hint="git checkout the code of the run; labtrain.load_weights returns the weights alone",
        )
    model.load_state_dict(weights)
    return model.eval()


def misfits(mine: State, saved: State) -> list[str]:
    """Return what differs between the names and shapes of two state dicts, as texts."""
    texts = [f"{name} is missing in the checkpoint" for name in mine if name not in saved]
    texts += [f"{name} is not in the model" for name in saved if name not in mine]
    shapes = {name: tuple(map(_shape, (mine[name], saved[name]))) for name in mine if name in saved}
    return texts + [f"{name} is {there} in the checkpoint, {here} in the model"
                    for name, (here, there) in shapes.items() if here != there]  # fmt: skip


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
