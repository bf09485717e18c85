"""Compare a receipt with this machine: code, environment, hardware, configuration and checkpoints. No torch."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from labtrain.base.console import shown
from labtrain.base.contracts import Determinism, Options
from labtrain.base.credentials import REFERENCE, without_secrets
from labtrain.base.errors import ConfigError, DamagedError, in_words
from labtrain.exact.determinism import is_recorded, variables
from labtrain.launch.experiment import as_main_does, called_with
from labtrain.record.config import as_written, from_environment, init_from
from labtrain.record.differences import ORIGIN, Difference, differences, overrides
from labtrain.record.digests import digest_folder
from labtrain.record.fingerprints import files_now
from labtrain.record.identity import Config, Job, lock_digest, what_counts
from labtrain.record.installed import files_state
from labtrain.record.provenance import code_digests, environment_state, machine
from labtrain.record.receipt import Receipt
from labtrain.record.sources import OWN, in_environment, moved
from labtrain.stores.backends import is_local
from labtrain.stores.layout import check_run, checkpoint_place, without_links
from labtrain.stores.store import Store

PACKAGES = "environment.distributions"
MOST_PACKAGES = 20  # to show one by one


def state_differences(
    receipt: Receipt, root: Path, home: Path, *, outside: bool = True, here: bool = True
) -> list[Difference]:
    """Return how today's code, environment, machine and data differ from a receipt's.

    Args:
        receipt: the recorded state.
        root: the folder of its code.
        home: the experiment's folder here.
        outside: also read data outside that folder.
        here: this process's environment trains it. Another one reports its differences in the receipt of the rerun.
    """
    job = Job(
        run_id="",
        run_dir="",
        root=str(root),
        config=_here(receipt["config"]),
        command=[],
        code_digest="",
        lock_digest=lock_digest(root),
    )
    code = {key: value for key, value in receipt["code"].items() if key not in ("outside", "shadows")}
    now: Options = {
        **receipt,
        # Compared by content, without git: the repository may be untrusted, and its configuration can run programs.
        "code": code | code_digests(job, path=moved(sys.path, home, root)) if here else receipt["code"],
        "environment": environment_state(job) | files_state() if here else receipt["environment"],
        "hardware": receipt["hardware"] | machine(),
        "determinism": receipt["determinism"] | {"variables": _variables(receipt["determinism"])},
        "data": receipt["data"] | files_now(receipt["data"], home, outside=outside),
    }
    return _few_packages(list(told_differences(receipt, cast(Receipt, now))))


def _few_packages(found: list[Difference]) -> list[Difference]:
    """Return differences with one for all packages if many packages differ, as without the environment."""
    packages = [each for each in found if each.key.startswith(f"{PACKAGES}.")]
    if len(packages) <= MOST_PACKAGES:
        return found
    missing = sum(each.b is None for each in packages)
    told = Difference(
        key=PACKAGES,
        a="as recorded",
        b=f"{len(packages)} packages differ, {missing} of them are missing here",
        matters=any(each.matters for each in packages),
    )
    first = found.index(packages[0])
    return [each for each in (*found[:first], told, *found[first:]) if each not in packages]


def _variables(determinism: Determinism) -> dict[str, str]:
    """Return the variables that a training here would have; those that labtrain sets come from the receipt."""
    ours = variables(determinism["mode"], threads=determinism["threads"])
    said = {name: value for name, value in determinism["variables"].items() if name in ours}
    here = {name: value for name, value in os.environ.items() if is_recorded(name) and name not in ours}
    return said | here


def composed_differently(receipt: Receipt, root: Path) -> list[Difference]:
    """Return how the configuration that the receipt's command gives today differs from the recorded one.

    The difference is not a cause: the rerun uses the recorded configuration.
    """
    command = receipt["command"]
    if not command or {"-m", "--multirun"} & set(command):
        return []
    try:
        with as_written():  # else the command's author could choose which variables are shown
            now = cast(Options, without_secrets(composed(root, Path(command[0]).name, command[1:])))
        recorded = without_secrets(receipt["config"])
        now["init_from"] = init_from(now.get("init_from"))
        if now["init_from"]["digest"] is None:  # labtrain fills it in
            now["init_from"]["digest"] = init_from(recorded.get("init_from"))["digest"]
        changed = overrides(what_counts(recorded), what_counts(cast(Config, _as_recorded(now, recorded))))
    except Exception as error:  # untrusted YAML and overrides can raise anything in Hydra
        said = str(error.args[0]) if isinstance(error, ConfigError) else in_words(error)
        return [Difference(key="config", a="composes", b=f"cannot be composed: {said[:200]}", matters=False)]
    return [Difference(key="config", a="this", b=" ".join(changed), matters=False)] if changed else []


def _as_recorded(now: object, recorded: object) -> Any:
    """Return a configuration with the recorded values in place of references to the environment."""
    if isinstance(now, dict) and isinstance(recorded, dict):
        return {key: _as_recorded(value, recorded[key]) if key in recorded else value for key, value in now.items()}
    return recorded if isinstance(now, str) and REFERENCE.search(now) else now


def composed(root: Path, script: str, typed: list[str]) -> object:
    """Compose what a train.py would compose, from its configuration files only: no code of the experiment runs.

    Plugins and packaged configurations come from this environment. Only OmegaConf's and Hydra's resolvers exist.

    Args:
        root: the experiment's folder.
        script: the name of its train.py, which is read but not run.
        typed: what followed it on the command line.

    Raises:
        ConfigError: composing needs the experiment's code.
        Exception: from Hydra and OmegaConf, if the configuration cannot be composed.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf, open_dict

    folder, name = called_with(root / script)
    name, typed = _named(name, typed)
    place = (root / folder).resolve()
    primary = place / f"{name.removesuffix('.yaml')}.yaml"
    if not primary.is_relative_to(root.resolve()) or not primary.is_file():
        raise ConfigError(f"{folder}/{name}.yaml: no such file")
    if options := [word for word in typed if word.startswith("-")]:
        raise ConfigError(f"with {options[0]} only {script} can compose it, and labtrain does not run that here")
    places = OmegaConf.select(OmegaConf.load(primary), "hydra.searchpath")
    parsed = OverridesParser.create().parse_overrides(typed)
    if places or any(each.get_key_element() == "hydra.searchpath" for each in parsed):
        raise ConfigError(f"with hydra.searchpath only {script} can compose it, and labtrain does not run that here")
    path = [entry for entry in sys.path if entry == str(OWN.parent) or in_environment(f"{entry}/")]
    with as_main_does(root, path), initialize_config_dir(str(place), version_base="1.3"):
        cfg = compose(name, typed, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return OmegaConf.to_container(cfg, resolve=True)


def _named(name: str, typed: list[str]) -> tuple[str, list[str]]:
    """Return the configuration's name, which the command line may set, and the remaining words."""
    if typed[:1] in (["--config-name"], ["-cn"]):
        return typed[1], typed[2:]
    if typed[:1] and (named := typed[0].removeprefix("--config-name=")) != typed[0]:
        return named, typed[1:]
    return name, typed


def _here(config: Config) -> Config:
    """Return a receipt's configuration with this environment's values, or unchanged if a variable is not set."""
    try:
        return from_environment(config)[0]
    except ConfigError:
        return config


def check_checkpoints(run_dir: Path, receipt: Receipt) -> str:
    """Compare local checkpoints with their manifests and the receipt; return a summary line.

    Raises:
        DamagedError: a checkpoint does not match; names the first.
    """
    place = checkpoint_place(run_dir, receipt["config"]["checkpoint"]["url"])
    if receipt["status"] == "running":
        return "not checked: the run is training"
    if not is_local(place):
        return f"not checked: {place} (labtrain store check reads them)"
    said = {Path(entry["path"]).name: (entry["step"], entry["weights_digest"]) for entry in receipt["checkpoints"]}
    results = receipt["results"]
    store = Store(place)
    store.refuse_link()
    there = [each for each in without_links(store.find()) if each.complete]
    last = max((each.order for each in there), default=None)
    for each in there:
        folder, manifest = store.fetch(each, each.folder)
        check_run(each, manifest, receipt["run_id"])
        found = digest_folder(folder)
        step, wanted = said.get(each.name, (each.step, found))
        facts = {
            "step in the receipt": (step, each.step),
            "weights digest": (manifest["weights_digest"], found),
            "weights digest in the receipt": (wanted, found),
        }
        if each.order == last and each.step == results.get("steps"):
            facts["weights digest of the receipt's results"] = (results["weights_digest"], found)
        for what, (says, is_) in facts.items():
            if says != is_:
                raise DamagedError(
                    f"{shown(folder)}: {what} {str(says)[:40]}, expected {str(is_)[:40]}",
                    hint="ask whoever trained the run for the checkpoint again",
                )
    absent = len(said.keys() - {each.name for each in there})
    more = f"; {absent} more in the receipt" if absent else ""
    return (f"{len(there)} here, all match their manifests and the receipt" if there else "none here") + more


def told_differences(receipt: Receipt, now: Receipt) -> Iterator[Difference]:
    """Yield the differences worth showing: not paths, and not how the code came here.

    The checkpoint of another run that it began from is left out too: retrace.py finds that by its digest.
    """
    for each in differences(receipt, now):
        if each.key != ORIGIN and (each.matters or not each.key.startswith(("config.", "code."))):
            yield each
