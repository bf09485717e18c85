"""Check a configuration: its keys and values; and explain Hydra's errors.

Hydra refuses an unknown key on the command line, but a misspelt key in the experiment's YAML becomes a new key, and
Hydra checks no types. This module checks both, before torch is imported.
"""

import copy
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from labtrain.base.contracts import EVALUATIONS, InitFrom, Options, as_options
from labtrain.base.credentials import NOT_RECORDED, REFERENCE, names_a_secret, without_secrets
from labtrain.base.errors import ConfigError, LabtrainError, not_readable
from labtrain.record.identity import (
    EXPERIMENT,
    EXPERIMENT_BYTES,
    SHARDED_STRATEGY,
    Config,
    References,
    get,
    shards_in_use,
    world_size,
)
from labtrain.stores.backends import check_url

if TYPE_CHECKING:
    from omegaconf import Container, DictConfig, Node

CONF = Path(__file__).parents[1] / "conf"

# Groups whose keys labtrain defines; `model`, `data` and `callbacks` have the user's keys.
GROUPS = ("trainer", "determinism", "checkpoint", "speed")
# In these groups a value from the environment is recorded as a reference to the variable.
REFERRING = ("model", "data", "callbacks", "logger")
# Trainer arguments that labtrain sets, and the key to use instead.
ELSEWHERE = {
    "trainer.deterministic": "determinism.mode",
    "trainer.benchmark": "determinism.mode",
    "trainer.logger": "logger",
    "trainer.callbacks": "callbacks",
    "trainer.enable_checkpointing": "checkpoint.keep_last",
    "trainer.default_root_dir": "checkpoint.url",
    "trainer.gpus": "trainer.devices",
    "data.workers": "data.num_workers",
}
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true", "32", "64", "16", "bf16")
MODES = ("off", "warn", "strict", "portable")
# Minimum of Trainer arguments (or null) that Lightning checks only after seconds of imports, or during the training.
# Lightning reports other wrong values.
TRAINER_INTEGERS = {"max_epochs": -1, "check_val_every_n_epoch": 1, "reload_dataloaders_every_n_epochs": 0}
TRAINER_NUMBERS = {
    "min_epochs": -1,
    "min_steps": -1,
    "limit_train_batches": 0,
    "limit_val_batches": 0,
    "limit_test_batches": 0,
    "overfit_batches": 0,
    "num_sanity_val_steps": -1,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
}
TRAINER_SWITCHES = ("enable_progress_bar", "enable_model_summary", "inference_mode", "detect_anomaly", "sync_batchnorm")
RESTORE = "leave out ~KEY; python train.py --help lists the keys with their values"
NO_LOGGER = "logger=none"
COMPOSE = "compose it with Hydra from a config.yaml that begins with `defaults: [labtrain, _self_]`"
# torch.compile's modes; those that choose kernels by timing; those that use CUDA graphs.
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
TIMED_MODES = ("max-autotune", "max-autotune-no-cudagraphs")
GRAPH_MODES = ("reduce-overhead", "max-autotune")


# The minimum of each integer key.
LEAST = {
    "seed": 0,
    "data.batch_size": 1,
    "data.num_workers": 0,
    "trainer.num_nodes": 1,
    "trainer.max_steps": -1,
    "trainer.log_every_n_steps": 1,
    "determinism.threads": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 0,
    "checkpoint.spool_bytes": 1,
    "trail.every_n_steps": 0,
    "failures.max_restarts": 0,
}


def check(config: Config) -> None:
    """Raise on unknown keys and values of the wrong type.

    Raises:
        ConfigError: names the key, the value and what is expected.
    """
    _check_plain(config, "")
    tree = as_options(config)
    config["init_from"] = init_from(tree["init_from"])
    for group in GROUPS:
        known = defaults(group)
        for key in tree[group]:
            if key not in known:
                raise unknown_key(f"{group}.{key}", [f"{group}.{name}" for name in known], where=" in conf/")
    allowed = set(_yaml(CONF / "labtrain.yaml")) | {*GROUPS, "logger"}
    for key in config:
        if key not in allowed:
            raise unknown_key(key, allowed, where=" in conf/")
    _check_groups(config)
    _check_names(config)
    _check_numbers(config)
    _check_trainer(tree["trainer"])
    _check_checkpoint(tree["checkpoint"])
    _check_shards(config)
    _check_speed(config)
    _check_init_from(config)
    _want(
        "resume",
        config["resume"],
        isinstance(config["resume"], str) and config["resume"],
        "auto, never, or a run's id or folder",
    )
    urls = {"checkpoint.url": config["checkpoint"]["url"], "resume": config["resume"]}
    for key, url in (urls | {"init_from.path": config["init_from"]["path"]}).items():
        if url is not None:
            _want(key, url, isinstance(url, str), "a path or a URL")
            check_url(url)


def init_from(value: object) -> InitFrom:
    """Return `init_from` with all its keys; a text is its path."""
    given = {"path": value} if not isinstance(value, dict) else value
    return cast(InitFrom, {"path": None, "strict": True, "rename": None, "digest": None, **given})


def _check_init_from(config: Config) -> None:
    given, known = as_options(config["init_from"]), init_from(None)
    for key in given:
        if key not in known:
            raise unknown_key(f"init_from.{key}", [f"init_from.{name}" for name in known], where=" in conf/")
    path, rename, digest = given["path"], given["rename"], given["digest"]
    good = path is None or (isinstance(path, str) and path != "")
    _want("init_from.path", path, good, "a text: quote a name that is a number, such as 'init_from.path=\"123\"'")
    _want("init_from.strict", given["strict"], isinstance(given["strict"], bool), "true or false")
    names = isinstance(rename, dict) and all(isinstance(each, str) for pair in rename.items() for each in pair)
    _want("init_from.rename", rename, rename is None or names, "a mapping of prefixes: {old: new}")
    good = digest is None or bool(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest))
    _want("init_from.digest", digest, good, "64 hex digits, as labtrain digest prints them")
    if path is None and given != known:
        raise ConfigError("init_from has options, but no path", hint="init_from.path=RUN, or a file with weights")


def _check_groups(config: Config) -> None:
    for key in ("model", "data", "callbacks", "trail", "failures", "paths"):
        if not isinstance(config[key], dict):  # the result of data=NAME if conf/ has no such group
            raise ConfigError(
                f"{key}={config[key]}: must be a mapping; conf/{key}/ has no options to choose from",
                hint=f"python train.py {key}.KEY=VALUE; python train.py --cfg job shows the keys",
            )
    for name, options in config["callbacks"].items():
        described = isinstance(options, dict) and isinstance(options.get("_target_"), str)
        _want(f"callbacks.{name}", options, described or not options, "a mapping with _target_, or null")


def _check_names(config: Config) -> None:
    for key in ("experiment", "model._target_", "data._target_"):
        text = get(config, key)
        _want(key, text, isinstance(text, str) and text != "", "a name")
    # It becomes a folder's name (at most 255 bytes with what labtrain appends) and must not lead out of runs/.
    name = str(config["experiment"])
    simple = EXPERIMENT.fullmatch(name) and len(name.encode()) <= EXPERIMENT_BYTES
    _want("experiment", name, simple, f"at most {EXPERIMENT_BYTES} bytes of letters, digits and . _ - = , +")
    _want_one_of(config, "determinism.mode", MODES)
    _want_one_of(config, "checkpoint.mode", ("max", "min"))
    if config["trainer"]["precision"] is not None:
        config["trainer"]["precision"] = str(config["trainer"]["precision"])
        _want_one_of(config, "trainer.precision", PRECISIONS)
    _want("gpu_stats", config["gpu_stats"], isinstance(config["gpu_stats"], bool), "true or false")
    elastic = config["failures"]["elastic"]
    _want("failures.elastic", elastic, isinstance(elastic, bool), "true or false")
    seconds = config["failures"]["hang_seconds"]
    good = seconds is None or _is_int(seconds, 1) or (isinstance(seconds, float) and seconds > 0)
    _want("failures.hang_seconds", seconds, good, "a number above 0, or null")


def _check_numbers(config: Config) -> None:
    for key, minimum in LEAST.items():
        _want_int(config, key, minimum=minimum)


def _check_checkpoint(options: Options) -> None:
    if options["keep_best"] and options["monitor"] is None:
        raise ConfigError(
            "checkpoint.keep_best needs a metric, but checkpoint.monitor is null", hint="checkpoint.monitor=val/acc"
        )
    for key in ("every_n_steps", "keep_every_n_steps", "every_seconds", "deliver_seconds"):
        value, is_time, may_be_null = options[key], key.endswith("seconds"), key != "deliver_seconds"
        good = _is_int(value, 1) or (is_time and isinstance(value, float) and value > 0)
        good = good or (value is None and may_be_null)
        _want(f"checkpoint.{key}", value, good, "a number above 0, or null" if may_be_null else "a number above 0")


def check_whole(config: Config) -> None:
    """Raise if a configuration was composed without labtrain's defaults: a key is missing, or no mapping.

    Raises:
        ConfigError: names the keys.
    """
    tree = as_options(config)
    for key, value in _whole().items():
        if isinstance(value, dict) and key in tree and not isinstance(tree[key], dict):
            raise ConfigError(f"{key}={tree[key]}: must be a mapping", hint=COMPOSE)
    check_complete(config, hint=COMPOSE)


def check_complete(config: Config, *, hint: str) -> None:
    """Raise if a configuration lacks a key.

    Args:
        config: resolved.
        hint: what to do about it.

    Raises:
        ConfigError: names the missing keys.
    """
    wanted, tree = _whole(), as_options(config)
    lacks = [key for key in wanted if key not in tree]
    lacks += [f"{key}.{name}" for key, value in wanted.items() if isinstance(value, dict)
              and isinstance(tree.get(key), dict) and key != "init_from"
              for name in value if name not in tree[key]]  # fmt: skip
    if lacks:
        hint = NO_LOGGER if lacks == ["logger"] else hint
        more = f" and {len(lacks) - 5} more keys" if len(lacks) > 5 else ""
        raise ConfigError(f"the configuration lacks {', '.join(lacks[:5])}{more}", hint=hint)


def _whole() -> Options:
    """Return every key that a configuration must have, with labtrain's defaults."""
    wanted = {"experiment": None, "logger": {}} | _yaml(CONF / "labtrain.yaml")
    wanted |= {group: defaults(group) for group in GROUPS}
    return {
        key: value for key, value in wanted.items() if key not in ("defaults", "hydra", *EVALUATIONS, "predictions")
    }


def check_modules(config: Config, root: Path) -> None:
    """Raise if a `_target_`'s module is neither next to train.py nor installed; import nothing.

    Raises:
        ConfigError: names the key and the module.
    """
    groups: dict[str, Options | None] = {"model": config["model"], "data": config["data"]}
    for group in ("callbacks", "logger"):
        groups |= {f"{group}.{name}": options for name, options in as_options(config)[group].items()}
    for key, options in groups.items():
        target = options.get("_target_") if isinstance(options, dict) else None
        module = target.partition(".")[0] if isinstance(target, str) else ""
        if not module or module in sys.modules or PathFinder.find_spec(module, [str(root)]) or find_spec(module):
            continue
        raise ConfigError(
            f"{key}._target_={target}: no module {module} next to train.py or in the environment",
            hint=f"correct {key} in conf/, or its class",
        )


def _check_plain(node: object, key: str) -> None:
    """Raise on values that JSON cannot pass to the training process unchanged: bytes, paths, Enum members."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        where = f"{key}.{name}" if key else str(name)
        for each in (name, child):
            if not isinstance(each, str | int | float | dict | list | None):
                raise ConfigError(
                    f"{where}: must be a text, number, bool, list or mapping, got {type(each).__name__}",
                    hint=f"write {where} as a text, and convert it in the class that takes it",
                )
        _check_plain(child, where)


def _check_trainer(trainer: Options) -> None:
    devices = trainer["devices"]
    numbers = isinstance(devices, list) and devices and all(_is_int(each, 0) for each in devices)
    good = devices == "auto" or _is_int(devices, 1) or numbers
    _want("trainer.devices", devices, good, "a number of devices, a list of GPU numbers, or auto")
    for names, kind, noun in ((TRAINER_INTEGERS, int, "an integer"), (TRAINER_NUMBERS, int | float, "a number")):
        for key, minimum in names.items():
            value = trainer.get(key)
            good = value is None or (isinstance(value, kind) and value >= minimum)
            _want(f"trainer.{key}", value, good, f"{noun} of at least {minimum}, or null")
    for key in TRAINER_SWITCHES:
        _want(f"trainer.{key}", trainer.get(key), trainer.get(key) in (None, True, False), "true or false")


def _check_shards(config: Config) -> None:
    shards, batch_size = config["determinism"]["shards"], config["data"]["batch_size"]
    _want("determinism.shards", shards, shards is None or _is_int(shards, 1), "a number of shards, or null")
    if shards is None or shards_in_use(config) is None:
        return
    if batch_size < shards:
        raise ConfigError(
            f"data.batch_size={batch_size} cannot be cut into determinism.shards={shards}",
            hint=f"data.batch_size={shards} or more, or determinism.shards={batch_size}",
        )
    world = world_size(config, config["trainer"]["devices"])
    if world > shards:
        raise too_many_devices(world, shards)


def _check_speed(config: Config) -> None:
    speed, mode = config["speed"], config["determinism"]["mode"]
    compiles = speed["compile"]
    good = isinstance(compiles, bool) or compiles in COMPILE_MODES
    _want("speed.compile", compiles, good, f"true, false or one of {', '.join(COMPILE_MODES)}")
    for key in ("checkpoint_activations", "tf32", "channels_last"):
        _want(f"speed.{key}", speed[key], isinstance(speed[key], bool), "true or false")
    if compiles and mode == "portable":
        raise ConfigError(
            f"speed.compile={compiles} compiles for this CPU, but determinism.mode=portable needs the same bits on"
            " every CPU",
            hint="speed.compile=false, or determinism.mode=strict",
        )
    if compiles in TIMED_MODES and mode == "strict":
        raise ConfigError(
            f"speed.compile={compiles} chooses kernels by timing, so bits vary; determinism.mode=strict forbids that",
            hint="speed.compile=true, or determinism.mode=warn",
        )
    if compiles in GRAPH_MODES and shards_in_use(config) not in (None, 1):
        raise ConfigError(
            f"speed.compile={compiles} uses CUDA graphs, which reuse memory: each shard would overwrite the previous"
            " shard's gradients",
            hint="speed.compile=true, or determinism.shards=1",
        )
    if speed["channels_last"] and config["trainer"]["strategy"] == SHARDED_STRATEGY:
        raise ConfigError(
            "speed.channels_last does not work with trainer.strategy=fsdp: torch's FSDP2 needs contiguous weights",
            hint="speed.channels_last=false",
        )


def too_many_devices(world: int, shards: int) -> ConfigError:
    """Return the error for more devices than shards."""
    return ConfigError(
        f"more devices than shards: {world} devices, but determinism.shards={shards}",
        hint=f"trainer.devices={shards}, or determinism.shards={world} (another run with other bits)",
    )


def defaults(group: str) -> Options:
    """Return a group's keys with their default values."""
    return _yaml(CONF / group / "default.yaml")


def own_keys(key: str) -> Options:
    """Return the keys below a key of conf/labtrain.yaml, with their default values."""
    return cast(Options, _yaml(CONF / "labtrain.yaml")[key])


def completed(config: Config) -> Config:
    """Add the keys that a configuration of an older labtrain lacks."""
    whole = {"speed": defaults("speed"), "gpu_stats": True, "failures": own_keys("failures"), **config}
    for key in (*EVALUATIONS, "predictions"):
        if whole.pop(key, None) is not None:
            raise ConfigError(
                f"{key}={as_options(config)[key]}: a configuration for labtrain.train describes a training",
                hint=f"python train.py {key}=RUN",
            )
    return cast(Config, whole | {"init_from": init_from(whole.get("init_from"))})


@contextmanager
def as_written() -> Iterator[list[str]]:
    """Make `${oc.env:X}` resolve to its own text temporarily; yield the variables' names as they are resolved.

    LABTRAIN_ROOT, which labtrain sets, still resolves to its value.
    """
    from omegaconf import OmegaConf, resolvers

    seen: list[str] = []

    def env(key: str, *default: object) -> object:
        if key == "LABTRAIN_ROOT":
            return resolvers.oc.env(key, *default)
        seen.append(key)
        return f"${{oc.env:{','.join([key, *map(_argument, default)])}}}"

    def decode(expr: str | None, _parent_: "Container", _node_: "Node") -> object:
        refers = isinstance(expr, str) and REFERENCE.search(expr)
        return f"${{oc.decode:{expr}}}" if refers else resolvers.oc.decode(expr, _parent_, _node_)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    OmegaConf.register_new_resolver("oc.decode", decode, replace=True)
    try:
        yield seen
    finally:
        OmegaConf.register_new_resolver("oc.env", resolvers.oc.env, replace=True)
        OmegaConf.register_new_resolver("oc.decode", resolvers.oc.decode, replace=True)


def references(cfg: "DictConfig", config: Config) -> References:
    """Return (path, text) of each text value that comes from `${oc.env:X}`, directly or through other keys.

    Only in the groups of REFERRING: labtrain needs the other values to find runs and checkpoints again. Values that are
    not text are not credentials.

    Args:
        cfg: as Hydra composed it.
        config: the same, resolved.
    """
    from omegaconf import OmegaConf

    def walk(node: Any, real: Options | list[object], path: list[object]) -> Iterator[tuple[list[object], str]]:
        for key, value in real.items() if isinstance(real, dict) else enumerate(real):
            seen.clear()
            try:
                child = node[key]
            except Exception:  # a resolver that needs the value
                child = None
            if seen and isinstance(child, str) and not isinstance(value, int | float):
                yield [*path, key], child
            elif seen and not OmegaConf.is_config(child):
                yield [*path, key], NOT_RECORDED if any(map(names_a_secret, seen)) else ""
            elif isinstance(value, dict | list) and OmegaConf.is_config(child):
                yield from walk(child, value, [*path, key])

    own = copy.deepcopy(cfg)  # a copy, including the cache of custom resolvers
    OmegaConf.clear_cache(own)
    with as_written() as seen:
        found = [each for group in REFERRING if isinstance(config.get(group), dict)
                 for each in walk(own[group], as_options(config)[group], [group])]  # fmt: skip
    return [(path, text) for path, text in found if text == NOT_RECORDED or REFERENCE.search(text)]


def _argument(value: object) -> str:
    """Format a resolver's argument."""
    if value is None:
        return "null"
    text = str(value)
    plain = re.fullmatch(r"[\w./\-]+", text) and text.lower() not in ("null", "none")
    return text if plain else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def from_environment(config: Config) -> tuple[Config, References]:
    """Resolve a recorded configuration's references here; also return what `references` returned.

    Raises:
        ConfigError: a variable is not set; names it.
    """
    found: list[tuple[list[object], str]] = []

    def walk(node: object, path: list[object]) -> object:
        if isinstance(node, dict):
            return {key: walk(child, [*path, key]) for key, child in node.items()}
        if isinstance(node, list):
            return [walk(child, [*path, index]) for index, child in enumerate(node)]
        # Other resolvers are not called: labtrain does not write them.
        if isinstance(node, str) and variables_in(node) and not re.search(r"\$\{(?!oc\.(?:env|decode):)", node):
            found.append((path, node))
            return _referred(node, ".".join(map(str, path)))
        return node

    resolved = {key: walk(value, [key]) if key in REFERRING else value for key, value in config.items()}
    return cast(Config, resolved), found


def variables_in(text: str) -> list[str]:
    """Return the variables that a recorded text refers to."""
    return re.findall(r"\$\{oc\.env:([^,{}]+)", text)


def _referred(text: str, key: str) -> object:
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError, OmegaConfBaseException

    text = text.replace(f",{NOT_RECORDED}}}", "}")
    try:
        return cast(Options, OmegaConf.to_container(OmegaConf.create({"value": text}), resolve=True))["value"]
    except GrammarParseError:
        return text
    except OmegaConfBaseException as error:
        names = variables_in(text)
        unset = next((name for name in names if name not in os.environ), names[0])
        raise ConfigError(
            f"{key} is {without_secrets(text)} in the receipt, but {unset} is not set here",
            hint=f"export {unset}=VALUE   # the value that the run was trained with",
        ) from error


def refers(config: Mapping[str, object]) -> list[str]:
    """Return the dotted keys of a recorded configuration whose values are not recorded."""
    return [key for key, value in flat_texts(config) if NOT_RECORDED in value or REFERENCE.search(value)]


def flat_texts(node: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of each text in a configuration."""
    if isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from flat_texts(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, str):
        yield key, node


def unknown_key(key: str, known: Iterable[str], *, where: str = "") -> ConfigError:
    """Return the error for an unknown key, with similar keys as the hint."""
    from difflib import get_close_matches  # only needed for errors

    if key in ELSEWHERE:
        return ConfigError(f"unknown key {key}{where}: labtrain sets it", hint=f"use {ELSEWHERE[key]}")
    group, _, leaf = key.rpartition(".")
    names = sorted(known)
    leaves = get_close_matches(leaf, {name.rpartition(".")[2] for name in names}, n=3, cutoff=0.6)
    near = [name for name in names if name.rpartition(".")[2] in leaves]
    near.sort(key=lambda name: (name.rpartition(".")[0] != group, leaves.index(name.rpartition(".")[2])))
    hint = f"similar keys: {', '.join(near[:3])}" if near else "python train.py --help lists all keys"
    return ConfigError(f"unknown key {key}{where}", hint=hint)


def explain(error: BaseException) -> LabtrainError | None:
    """Turn an exception of Hydra or OmegaConf into an error for people; None for other exceptions."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, LabtrainError):
            return link
    for link in chain:
        if isinstance(link, PermissionError) and link.filename and not os.access(link.filename, os.R_OK):
            with suppress(FileNotFoundError):  # it could not be created
                return not_readable(Path(os.fsdecode(link.filename)))
    for link in chain:
        if isinstance(link, ConfigAttributeError | ConfigKeyError) and link.parent_node is not None:
            tree = OmegaConf.to_container(link.parent_node._get_root(), resolve=False)
            known = [key for key in _flat(tree) if not key.startswith("hydra")]
            return unknown_key(str(link.full_key), known)
    if isinstance(error, OverrideParseException):
        first = str(error).splitlines()[0]
        hint = "write key=value, and quote special characters for the shell: 'key=[1,2]'"
        return ConfigError(f"cannot read the override {error.override!r}: {first}", hint=hint)
    if type(error) is ValueError and str(error).startswith(("Expecting one subcommand", "No completion plugin")):
        hint = 'eval "$(python train.py -sc install=bash)", or zsh or fish'
        return ConfigError("-sc takes install=SHELL, uninstall=SHELL or query=SHELL", hint=hint)
    if type(error) is ValueError and str(error).startswith("Config group override must be"):
        if "NoneType" in str(error):
            hint = "name one of its options, such as logger=none; python train.py --help lists the keys"
            return ConfigError("null is not the name of an option, and a group takes a name", hint=hint)
        return ConfigError(f"{error}: a group takes a name", hint="quote a name that is a number: 'experiment=\"7\"'")
    if isinstance(error, MissingConfigException):
        text = " ".join(str(error).split())
        match = re.search(r"(In '[^']*': )?(Could not find '[^']*')(.*Available options in '[^']*': )?", text)
        options = error.options or []
        message = match.group(2) if match else text
        return ConfigError(message, hint=f"choose one of: {', '.join(options)}" if options else "look in conf/")
    return _explain_content(error, chain)


def _explain_content(error: BaseException, chain: list[BaseException]) -> ConfigError | None:
    """Explain an error in the content of a configuration."""
    from hydra.errors import HydraException
    from omegaconf.errors import KeyValidationError, OmegaConfBaseException

    for link in chain:
        if isinstance(link, OmegaConfBaseException):
            first = str(link.msg or link).splitlines()[0]
            if isinstance(link, KeyValidationError):
                return ConfigError(
                    f"{link.full_key}: {first}, not supported by OmegaConf",
                    hint="put the key in quotes, as a text",
                )
            return ConfigError(f"{link.full_key or 'configuration'}: {first}", hint="python train.py --cfg job")
    for link in chain:
        if isinstance(link, yaml.YAMLError):
            return ConfigError(
                f"a file in conf/ is not valid YAML: {' '.join(str(link).split())}", hint="correct that line"
            )
    if isinstance(error, HydraException):
        first, *rest = str(error).splitlines() or [type(error).__name__]
        hint = " ".join(line.strip() for line in rest) or "python train.py --help"
        return ConfigError(first, hint=hint)
    return None


def _want(key: str, found: object, good: object, wanted: str) -> None:
    if not good:
        raise ConfigError(
            f"{key}={found}: must be {wanted}", hint=f"python train.py {key}=VALUE, or set it in conf/config.yaml"
        )


def _want_int(config: Config, key: str, *, minimum: int) -> None:
    value = get(config, key)
    _want(key, value, _is_int(value, minimum), f"an integer of at least {minimum}")


def _want_one_of(config: Config, key: str, options: tuple[str, ...]) -> None:
    value = get(config, key)
    _want(key, value, value in options, f"one of {', '.join(options)}")


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _flat(node: object, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    keys = []
    for key, value in node.items():
        keys += [f"{prefix}{key}", *_flat(value, f"{prefix}{key}.")]
    return keys


def _yaml(path: Path) -> dict[str, object]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return dict(yaml.load(path.read_text(), loader))
