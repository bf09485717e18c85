"""Make the objects that a configuration describes with `_target_`."""

from typing import TypeVar

import lightning.pytorch as pl
from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate

from labtrain.base.contracts import Options
from labtrain.base.errors import ConfigError, LabtrainError, in_words, where

Made = TypeVar("Made")
PASSED = ("batch_size", "num_workers")  # of the data, whether conf/ has them or not


def instantiate(options: Options, key: str, kind: type[Made]) -> Made:
    """Make the object that a part of the configuration describes with `_target_`, with Hydra.

    Args:
        options: that part.
        key: its key.
        kind: the class that it must have.

    Raises:
        ConfigError: the target cannot be found, does not take these arguments, or makes another class.
    """
    target = options["_target_"]
    try:
        made = hydra_instantiate(options, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if (known := _known(error)) is not None:
            raise known from error
        # If a callback's constructor fails, its arguments are wrong. A model's or datamodule's may fail for any reason.
        if cause is None or isinstance(cause, TypeError | ImportError) or kind is pl.Callback:
            text = " ".join(str(error).split()) if cause is None else in_words(cause) + where(cause.__traceback__)
            raise ConfigError(f"{key}._target_={target}: {text}", hint=_hint(key, target, text)) from error
        raise cause from None
    if not isinstance(made, kind):
        raise ConfigError(
            f"{key}._target_={target} makes a {type(made).__name__}, expected a {kind.__name__}",
            hint=f"derive it from lightning.pytorch.{kind.__name__}",
        )
    return made


def _hint(key: str, target: str, text: str) -> str:
    for name in PASSED:
        if key == "data" and f"unexpected keyword argument '{name}'" in text:
            return f"add {name} to the arguments of {target}.__init__: labtrain passes data.{' and data.'.join(PASSED)}"
    return f"correct {key} in conf/, or the class it names"


def _known(error: BaseException) -> LabtrainError | None:
    """Return the error for people that code met while it was imported, or its object made; None if there is none."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, LabtrainError):
            return chain
        chain = chain.__cause__ or chain.__context__
    return None
