"""What a receipt says of code, environment, machine, configuration and checkpoints, against what is here. No torch."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from labtrain.base.errors import DamagedError
from labtrain.environment.doctor.environment import files_state
from labtrain.exact.determinism import is_recorded, variables
from labtrain.record.differences import Difference, differences, overrides
from labtrain.record.digests import digest_folder
from labtrain.record.fingerprints import files_now
from labtrain.record.identity import Job, lock_digest, shown, what_counts
from labtrain.record.provenance import code_state, environment_state, machine
from labtrain.record.receipt import Receipt, without_secrets
from labtrain.record.sources import moved
from labtrain.stores.backends import is_local
from labtrain.stores.layout import checkpoint_place
from labtrain.stores.store import Store

COMPOSE_TIMEOUT_S = 120


def state_differences(receipt: Receipt, root: Path, home: Path) -> list[Difference]:
    """Return how today's code, environment and machine differ from a receipt's; the code of `home` lies in `root`."""
    job = Job(
        run_id="",
        run_dir="",
        root=str(root),
        config=receipt["config"],
        command=[],
        code_digest="",
        lock_digest=lock_digest(root),
    )
    now = {
        **receipt,
        "code": code_state(job, path=moved(sys.path, home, root)),
        "environment": environment_state(job) | files_state(),
        "hardware": receipt["hardware"] | machine(),
        "determinism": receipt["determinism"] | {"variables": _variables(receipt["determinism"])},
        "data": receipt["data"] | files_now(receipt["data"], home),
    }
    return list(told_differences(receipt, now))


def _variables(determinism: dict[str, Any]) -> dict[str, str]:
    """Return the variables that a training here would have: what labtrain sets for it is as the receipt says."""
    ours = variables(determinism["mode"], threads=determinism["threads"])
    said = {name: value for name, value in determinism["variables"].items() if name in ours}
    here = {name: value for name, value in os.environ.items() if is_recorded(name) and name not in ours}
    return said | here


def composed_differently(receipt: Receipt, root: Path) -> list[Difference]:
    """Return how the receipt's command composes today, if that is another configuration; no cause: it is not used."""
    command = receipt["command"]
    if not command or {"-m", "--multirun"} & set(command):
        return []
    typed = [sys.executable, str(root / Path(command[0]).name), *command[1:], "--cfg", "job", "--resolve"]
    try:
        done = subprocess.run(typed, capture_output=True, text=True, check=False, cwd=root, timeout=COMPOSE_TIMEOUT_S)
        said = "" if done.returncode == 0 else " ".join(done.stderr.split()) or "nothing said"
    except subprocess.TimeoutExpired:
        said = f"no end in {COMPOSE_TIMEOUT_S} seconds"
    if said:
        return [Difference(key="config", a="composes", b=f"does not: {said[:200]}", matters=False)]
    now = without_secrets(yaml.safe_load(done.stdout))
    changed = overrides(what_counts(receipt["config"]), what_counts(now))
    return [Difference(key="config", a="this", b=" ".join(changed), matters=False)] if changed else []


def check_checkpoints(run_dir: Path, receipt: Receipt) -> str:
    """Hold the checkpoints that lie on this machine against their manifests and the receipt, and say what was seen.

    Raises:
        DamagedError: names the first that is not what they say.
    """
    place = checkpoint_place(run_dir, receipt["config"]["checkpoint"]["url"])
    if receipt["status"] == "running":
        return "not looked at: they come and go while it is trained"
    if not is_local(place):
        return f"not looked at: {place} (labtrain store check reads them)"
    said = {Path(entry["path"]).name: entry["weights_digest"] for entry in receipt["checkpoints"]}
    store = Store(place)
    there = store.checkpoints()
    for each in there:
        folder, manifest = store.fetch(each, each.folder)
        wanted, found = said.get(each.name), digest_folder(folder)
        if found != manifest["weights_digest"] or wanted not in (None, found):
            raise DamagedError(
                f"{shown(folder)}: its weights are {found[:12]}, its manifest says {manifest['weights_digest'][:12]},"
                f" the receipt {str(wanted)[:12]}",
                hint="take it from where it was written",
            )
    return f"{len(there)} here, each as its manifest and the receipt say" if there else "none here"


def told_differences(receipt: Receipt, now: Receipt) -> Iterator[Difference]:
    """Yield the differences that a person wants to know: not where things lie, and not how the code came here."""
    for each in differences(receipt, now):
        if each.matters or not each.key.startswith(("config.", "code.")):
            yield each
