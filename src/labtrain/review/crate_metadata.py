"""ro-crate-metadata.json: the metadata of a run's RO-Crate.

Profiles https://w3id.org/ro/wfrun/process/0.5 and https://w3id.org/ro/wfrun/workflow/0.5, both of RO-Crate 1.1. Entity
names describe the entity and contain no random number.
"""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from labtrain.base.contracts import Options
from labtrain.base.errors import ConfigError
from labtrain.base.files import file_sha256
from labtrain.record import receipt as receipts
from labtrain.record.differences import flat
from labtrain.record.identity import what_counts
from labtrain.record.provenance import PATCH
from labtrain.record.receipt import Receipt
from labtrain.record.trail import HISTORY, TRAIL
from labtrain.review import signature
from labtrain.review.verdicts import VERIFIED

if TYPE_CHECKING:
    from rocrate.model import Entity
    from rocrate.rocrate import ROCrate

Enclosed = dict[str, Path]

MAIN = "train.py"
METADATA = "ro-crate-metadata.json"
WEIGHTS = "weights.safetensors"
# A run's files, if present: media type, description, is it a result of the training, is it about the training.
FILES = {
    receipts.FILE: ("application/json", "The receipt: what was run, on what, and the result", True, True),
    signature.FILE: ("text/plain", "The receipt's signature by an SSH key", False, True),
    "config.yaml": ("application/yaml", "The resolved configuration", False, False),
    PATCH: ("text/x-diff", "The patch from the commit to the code that ran", False, False),
    TRAIL: ("application/jsonl", "One line for each step: loss, digests of batch, gradients and weights", True, True),
    HISTORY: ("application/jsonl", "Time, throughput, memory and metrics of the training", True, True),
    VERIFIED: (
        "application/json",
        "Claims of people who ran it again; a line may be signed",
        False,
        True,
    ),
    WEIGHTS: ("application/octet-stream", "The weights of the newest checkpoint", True, False),
}
# Of the files that a bundle has besides.
TYPES = {".lock": "text/plain", ".whl": "application/zip", ".yaml": "application/yaml", ".csv": "text/csv"}
PROFILES = (
    ("https://w3id.org/ro/wfrun/process/0.5", "Process Run Crate", "0.5"),
    ("https://w3id.org/ro/wfrun/workflow/0.5", "Workflow Run Crate", "0.5"),
    ("https://w3id.org/workflowhub/workflow-ro-crate/1.0", "Workflow RO-Crate", "1.0"),
)
PYTHON = "https://www.python.org/"
HOMES = {
    "python": PYTHON,
    "torch": "https://pytorch.org/",
    "lightning": "https://lightning.ai/",
    "numpy": "https://numpy.org/",
    "cuda": "https://developer.nvidia.com/cuda-toolkit",
    "cudnn": "https://developer.nvidia.com/cudnn",
    "nccl": "https://developer.nvidia.com/nccl",
}
KINDS = {bool: "Boolean", int: "Integer", float: "Float", str: "Text"}
LOCAL_PATH = re.compile(r"(?:file://|(?<![\w.:/~-]))/[^\s'\"]+")
SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def describe(
    found: Receipt, files: Enclosed, code: Enclosed, more: Enclosed, *, author: str | None, licence: str | None
) -> dict[str, object]:
    """Return the metadata of a run's crate: a JSON-LD document, entities sorted by name.

    Args:
        found: the receipt.
        files: the run's own in the crate, by name.
        code: the experiment's sources in the crate, by name; without train.py it is not a workflow crate.
        more: other files that training it again needs, by name.
        author: the name of the person who trained the run.
        licence: an SPDX identifier or a URL.

    Raises:
        ConfigError: `licence` is neither.
    """
    from rocrate.model import Person
    from rocrate.rocrate import ROCrate

    crate = ROCrate(version="1.1")
    crate.metadata.extra_contexts.append("https://w3id.org/ro/terms/workflow-run/context")
    action = _action(crate, found)
    added = _files(crate, files, action)
    workflow = _workflow(crate, found, code)
    _more(crate, more)
    action["instrument"] = workflow
    action["object"] = [
        *_data(crate, found),
        *(added[name] for name in ("code.patch", "config.yaml") if name in added),
        *_parameters(crate, found, workflow if MAIN in code else None),
    ]
    action["result"] = [*(file for name, file in added.items() if FILES[name][2]), *_results(crate, found)]

    root = crate.root_dataset
    root["license"] = _licence(crate, licence)
    _describe_root(root, found, action)
    root["conformsTo"] = _profiles(crate, is_workflow=MAIN in code)
    if author:
        action["agent"] = root["author"] = crate.add(Person(crate, "#author", {"name": author}))
    root["hasPart"] = sorted(root["hasPart"], key=lambda part: str(part.id))
    document: Options = crate.metadata.generate()
    document["@graph"].sort(key=lambda entity: str(entity["@id"]))
    return document


def _files(crate: "ROCrate", enclosed: dict[str, Path], action: object) -> dict[str, object]:
    files = {name: _file(crate, name, path, FILES[name][0]) for name, path in sorted(enclosed.items())}
    for name, file in files.items():
        file["description"] = FILES[name][1]
        if FILES[name][3]:
            file["about"] = action
    return files


def _more(crate: "ROCrate", more: dict[str, Path]) -> None:
    for name, path in sorted(more.items()):
        media_type = TYPES.get(Path(name).suffix, "application/octet-stream")
        _file(crate, name, path, media_type)["description"] = "Needed to train it again"


def _profiles(crate: "ROCrate", *, is_workflow: bool) -> object:
    profiles = [
        _add(crate, url, "CreativeWork", name=name, version=version)
        for url, name, version in (PROFILES if is_workflow else PROFILES[:1])
    ]
    return profiles if is_workflow else profiles[0]


def _describe_root(root: "Entity", found: Receipt, action: "Entity") -> None:
    experiment, segments = found["config"]["experiment"], found["segments"]
    root["name"], root["mentions"] = action["name"], action
    root["description"] = f"A training of {experiment} with labtrain, and the receipt to verify it with."
    root["datePublished"] = segments[-1]["ended"] or segments[-1]["started"]


def _action(crate: "ROCrate", found: Receipt) -> "Entity":
    """Add the training: when, with which command, and how it ended."""
    first, last, complete = found["segments"][0], found["segments"][-1], found["status"] == "complete"
    title = f"Training of {found['config']['experiment']}, run {found['run_id']}"
    action = _add(crate, f"#run-{found['run_id']}", "CreateAction", name=title)
    action["description"] = _portable(" ".join(found["command"]))
    action["startTime"], action["endTime"] = first["started"], last["ended"] or last["started"]
    action["actionStatus"] = f"http://schema.org/{'Completed' if complete else 'Failed'}ActionStatus"
    if not complete:
        action["error"] = _portable(f"{found['status']} at step {last['to_step']}: {last['why']}")
    variables = found["determinism"].get("variables", {})
    action["environment"] = [_value(crate, "variable", name, value) for name, value in sorted(variables.items())]
    return action


def _workflow(crate: "ROCrate", found: Receipt, code: dict[str, Path]) -> object:
    """Add what was run: the train.py in the crate, or the code that the receipt names; and its requirements."""
    from rocrate.model import ComputerLanguage

    version = found["code"]["commit"] or found["code"]["digest"]
    for name, path in sorted(code.items()):
        kinds = ["SoftwareSourceCode", "ComputationalWorkflow"] if name == MAIN else ["SoftwareSourceCode"]
        _file(crate, name, path, "text/x-python", *kinds)["version"] = version
    workflow = crate.get(MAIN) or _add(crate, f"#{MAIN}", "SoftwareSourceCode")
    if MAIN in code:
        crate.root_dataset["mainEntity"] = workflow
        crate.metadata.append_to("conformsTo", {"@id": PROFILES[-1][0]})
    language = {"name": "Python", "identifier": PYTHON, "url": PYTHON, "version": found["environment"]["python"]}
    workflow["programmingLanguage"] = crate.add(ComputerLanguage(crate, PYTHON, language))
    workflow["name"] = f"{MAIN} of {found['config']['experiment']}"
    workflow["version"], workflow["identifier"] = version, f"sha256:{found['code']['digest']}"
    workflow["softwareRequirements"] = _software(crate, found)
    return workflow


def _software(crate: "ROCrate", found: Receipt) -> list[object]:
    """Add the software that determines the bits, by package URL: Python, libraries, CUDA on a GPU; and the lock."""
    environment, hardware = found["environment"], found["hardware"]
    kind = "generic" if environment["route"].startswith("conda") else "pypi"
    versions = {
        ("generic", "python"): environment["python"],
        ("generic", "labtrain"): environment["distributions"].get("labtrain"),
        **{(kind, name): environment["distributions"].get(name) for name in ("lightning", "numpy", "torch")},
        **{("generic", name): hardware.get(name) for name in ("cuda", "cudnn", "nccl")},
        ("generic", "nvidia-driver"): hardware.get("driver"),
    }
    software = [
        _add(crate, f"pkg:{kind}/{name}@{quote(str(version))}", "SoftwareApplication", name=name,
             softwareVersion=str(version), **({"url": HOMES[name]} if name in HOMES else {}))
        for (kind, name), version in versions.items() if version
    ]  # fmt: skip
    if environment["lock_digest"]:
        name, version = f"locked environment, {environment['route']}", f"sha256:{environment['lock_digest']}"
        software.append(_add(crate, "#lock", "SoftwareApplication", name=name, softwareVersion=version))
    return software


def _data(crate: "ROCrate", found: Receipt) -> list[object]:
    """Add the data by fingerprint; the data itself is not in the crate."""
    return [
        _add(crate, f"#data-{quote(name)}", "CreativeWork", name=f"{name} data, {each['type']}",
             description=f"{each.get('samples', 'an unknown number of')} samples; labtrain's fingerprint of them",
             identifier=f"sha256:{each['digest']}")
        for name, each in sorted(found["data"].items())
    ]  # fmt: skip


def _parameters(crate: "ROCrate", found: Receipt, workflow: "Entity | None") -> list[object]:
    """Add the configuration that can change bits; for a workflow, also its formal parameters."""
    given = [(key, _plain(value)) for key, value in sorted(flat(what_counts(found["config"]), "").items())
             if value not in (None, {})]  # fmt: skip
    values = [_value(crate, "config", key, value) for key, value in given]
    if workflow is not None:
        slots = [
            _add(crate, f"#parameter-{quote(key)}", "FormalParameter", name=key, additionalType=KINDS[type(value)])
            for key, value in given
        ]
        workflow["input"] = slots
        for value, slot in zip(values, slots, strict=True):
            value["exampleOfWork"] = slot
    return values


def _results(crate: "ROCrate", found: Receipt) -> list[object]:
    """Add the results that are not files: metrics, steps, and the digests of weights and state."""
    results = found["results"]
    digests = {key: results[key] for key in ("state_digest", "steps", "weights_digest") if key in results}
    return [
        *(_value(crate, "result", name, value) for name, value in digests.items()),
        *(_value(crate, "metric", name, value) for name, value in sorted(results.get("metrics", {}).items())),
    ]


def _licence(crate: "ROCrate", licence: str | None) -> object:
    """Add the licence. Workflow RO-Crate requires one, so the metadata says explicitly if none was chosen."""
    if licence is None:
        text = "No licence was chosen for this crate: all rights are reserved."
        return _add(crate, "#no-licence", "CreativeWork", name="No licence", description=text)
    if licence.startswith(("https://", "http://")):
        return _add(crate, licence, "CreativeWork", name=licence, url=licence)
    if not SPDX.fullmatch(licence):
        raise ConfigError(f"{licence!r} is neither an SPDX identifier nor a URL", hint="--license CC-BY-4.0")
    url = f"https://spdx.org/licenses/{licence}"
    return _add(crate, url, "CreativeWork", name=licence, identifier=licence, url=url)


def _file(crate: "ROCrate", name: str, path: Path, media_type: str, *kinds: str) -> "Entity":
    """Add a file of the crate, with its size and sha256."""
    properties = {"name": name, "encodingFormat": media_type, "sha256": file_sha256(path),
                  "contentSize": str(path.stat().st_size)}  # fmt: skip
    return crate.add_file(path, name, properties={**({"@type": ["File", *kinds]} if kinds else {}), **properties})


def _value(crate: "ROCrate", group: str, name: str, value: object) -> "Entity":
    return _add(crate, f"#{group}-{quote(name)}", "PropertyValue", name=name, value=_plain(value))


def _add(crate: "ROCrate", identifier: str, kind: str, /, **properties: object) -> "Entity":
    from rocrate.model import ContextEntity

    return crate.add(ContextEntity(crate, identifier, {"@type": kind, **properties}))


def _plain(value: object) -> object:
    """Return a value that JSON-LD can hold: a number, bool or text; nested values as JSON."""
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _portable(value if isinstance(value, str) else json.dumps(value))


def _portable(text: str) -> str:
    """Replace local paths in a text."""
    return LOCAL_PATH.sub("(local path)", text)
