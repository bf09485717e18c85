"""An experiment's folder, and the configuration that its train.py would compose. No torch."""

import ast
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from labtrain.base.console import shown
from labtrain.base.errors import ConfigError, in_words
from labtrain.record import config as configuration
from labtrain.record.identity import SCRIPT, Config, enclosing

if TYPE_CHECKING:
    from omegaconf import Container, DictConfig

ROOT = "LABTRAIN_ROOT"  # conf/labtrain.yaml: paths.runs
_KEPT_AS = "labtrain_root"  # in the metadata of a DictConfig, which its copies and merges keep


def compose(overrides: Sequence[str] = (), path: str | Path = ".") -> "DictConfig":
    """Return the configuration that an experiment's train.py would compose.

    Pass it to `labtrain.train`, after changes if you like: `cfg.trainer.max_epochs = 2`. It remembers the experiment's
    folder. train.py is read, but not run: register resolvers of your own before.

    Args:
        overrides: as on the command line of train.py: `["seed=7", "trainer.max_epochs=2"]`.
        path: the experiment's folder, or a folder in it, such as its notebooks/.

    Raises:
        LabtrainError: there is no experiment, or its configuration cannot be composed.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r}: must be a list of texts", hint=f"compose([{overrides!r}])")
    root = experiment_at(path)
    try:
        folder, name = called_with(root / SCRIPT)
        with as_main_does(root, [str(root), *sys.path]), initialize_config_dir(str(root / folder), version_base="1.3"):
            whole = hydra_compose(name, overrides=list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(whole)  # for ${hydra:...} in the configuration
            cfg = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
            _settle(cfg, OmegaConf.to_container(cfg, resolve=False))
    except SyntaxError as error:
        raise ConfigError(f"{shown(root / SCRIPT)}: {in_words(error)}", hint=f"python {SCRIPT}") from None
    except Exception as error:
        raise configuration.explain(error) or error from None
    setattr(cfg._metadata, _KEPT_AS, str(root))
    return cfg


def composed_at(cfg: "DictConfig") -> Path | None:
    """Return the experiment's folder that `compose` was called for; None for a configuration from elsewhere."""
    found = getattr(cfg._metadata, _KEPT_AS, None)
    return Path(found) if found else None


def resolved(cfg: "DictConfig", *, hint: str) -> Config:
    """Return a configuration as plain values, checked.

    Args:
        cfg: as composed.
        hint: the start of the command that sets a missing value.

    Raises:
        LabtrainError: a value is missing or wrong.
    """
    from omegaconf import OmegaConf

    try:
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise ConfigError(f"{missing[0]} has no value", hint=f"{hint} {missing[0]}=VALUE")
        config = cast(Config, OmegaConf.to_container(cfg, resolve=True))
        configuration.check(config)
    except Exception as error:
        raise configuration.explain(error) or error from None
    return config


def experiment_at(path: str | Path) -> Path:
    """Return the experiment's folder that contains a folder.

    Raises:
        ConfigError: none does.
    """
    if (root := enclosing(path)) is None:
        raise ConfigError(
            f"{shown(path)} is not in an experiment: found no {SCRIPT} in it or above it",
            hint="cd to an experiment; labtrain new DIR makes one",
        )
    return root


def called_with(script: Path) -> tuple[str, str]:
    """Return the config_path and config_name that a script passes to labtrain.main, by reading the script."""
    given = {"config_path": "conf", "config_name": "config"}
    for node in ast.walk(ast.parse(script.read_bytes())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("labtrain.main", "main"):
            passed = dict(zip(given, node.args, strict=False)) | {
                each.arg: each.value for each in node.keywords if each.arg
            }
            given |= {key: value.value for key, value in passed.items()
                      if key in given and isinstance(value, ast.Constant) and isinstance(value.value, str)}  # fmt: skip
    return given["config_path"], given["config_name"]


@contextmanager
def as_main_does(root: Path, path: list[str]) -> Iterator[None]:
    """Set up what labtrain.main sets up before Hydra composes; then restore it, and the caller's own use of Hydra.

    Args:
        root: the experiment's folder.
        path: the module search path, in which Hydra finds plugins and packaged configurations.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    state, path_before, before = Singleton.get_state(), sys.path[:], os.environ.get(ROOT)
    GlobalHydra.instance().clear()
    os.environ[ROOT] = str(root)
    sys.path[:] = path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = path_before
        Singleton.set_state(state)
        del os.environ[ROOT]
        os.environ |= {ROOT: before} if before is not None else {}


def _settle(node: "Container", raw: object) -> None:
    """Resolve what only exists while Hydra composes: `${hydra:...}` and the experiment's folder.

    Other references stay: the receipt records `${oc.env:X}` as that text.
    """
    for key, text in raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ():
        if isinstance(text, dict | list):
            _settle(node[key], text)
        elif isinstance(text, str) and ("${hydra:" in text or ROOT in text):
            node[key] = node[key]
