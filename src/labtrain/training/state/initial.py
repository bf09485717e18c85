"""Puts the weights of `init_from` into the model, before its first step."""

from collections.abc import Callable, Iterator

import lightning.pytorch as pl
import torch

from labtrain.base.console import few
from labtrain.base.contracts import InitFrom, State
from labtrain.base.errors import ConfigError


def put_initial(trainer: pl.Trainer, weights: State, first: InitFrom, *, say: Callable[[str], None]) -> None:
    """Put weights into the model; with `strict: false` those that fit, and report the rest by name.

    Args:
        trainer: when its model has all its parts.
        weights: as they were saved.
        first: `init_from`.
        say: called with a warning, for the receipt.

    Raises:
        ConfigError: names or shapes do not fit.
    """
    module, path = trainer.lightning_module, first["path"]
    weights = dict(renamed(weights, first["rename"] or {}, path))
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    unlike = [name for name in weights if name in own and weights[name].shape != own[name].shape]
    fits = {name: value for name, value in weights.items() if name in own and name not in unlike}
    tied = _tied(module, set(fits))
    missing = [name for name in own if name not in weights and name not in tied]
    left = [name for name in weights if name not in own]
    shapes = [f"{name} {_shape(weights[name])}, here {_shape(own[name])}" for name in unlike]
    lacks = [("not in them", missing), ("not in the model", left), ("of another shape", shapes)]
    said = "; ".join(f"{what}: {few(names)}" for what, names in lacks if names)
    if said and first["strict"]:
        raise ConfigError(
            f"init_from={path}: the weights do not fit into {type(module).__name__}: {said}", hint=_hint(fits, missing)
        )
    if not fits:
        raise ConfigError(
            f"init_from={path}: none of its {len(weights)} weights fits into {type(module).__name__}: {said}",
            hint=_hint(fits, missing),
        )
    if said:
        say(f"init_from={path}: {len(fits)} of {len(own)} weights of the model are loaded; {said}")
    trainer.strategy.load_model_state_dict({"state_dict": fits}, strict=False)


def renamed(weights: State, prefixes: dict[str, str], path: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights with new prefixes: whole parts of a name, the longest prefix that fits; an empty one fits all.

    Raises:
        ConfigError: no name has one of the prefixes, or two weights get the same name.
    """
    used, names = set(), dict[str, str]()
    for old, value in weights.items():
        fitting = [prefix for prefix in prefixes if not prefix or old == prefix or old.startswith(f"{prefix}.")]
        name = old
        if fitting:
            prefix = max(fitting, key=len)
            used.add(prefix)
            name = ".".join(part for part in (prefixes[prefix], old[len(prefix) :].lstrip(".")) if part)
        if name in names:
            raise ConfigError(
                f"init_from.rename gives {names[name]} and {old} the same name: {name}", hint="correct init_from.rename"
            )
        names[name] = old
        yield name, value
    if unused := sorted(prefixes.keys() - used):
        raise ConfigError(
            f"init_from.rename: no weight of {path} has the prefix {few(unused)}; its weights: {few(list(weights))}",
            hint="a prefix is one or more whole parts of a name, such as model.encoder",
        )


def _tied(module: pl.LightningModule, loaded: set[str]) -> set[str]:
    """Return names of parameters that are the same object as a loaded one."""
    named = list(module.named_parameters(remove_duplicate=False))
    there = {id(parameter) for name, parameter in named if name in loaded}
    return {name for name, parameter in named if id(parameter) in there}


def _shape(value: torch.Tensor) -> str:
    return str(tuple(value.shape))


def _hint(fits: State, missing: list[str]) -> str:
    rename = "" if fits or not missing else "init_from.rename={OLD: NEW} for the prefixes of names; or "
    return f"{rename}init_from.strict=false loads the weights that fit"
