"""`labtrain crate`: what the profiles require, one by one, and what must not be in it.

The tables of https://w3id.org/ro/wfrun/process/0.5 and https://w3id.org/ro/wfrun/workflow/0.5, and
https://w3id.org/workflowhub/workflow-ro-crate/1.0 and https://w3id.org/ro/crate/1.1, which they are based on.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rocrate.rocrate import ROCrate

from labtrain.base.credentials import SECRET_VALUE, without_secrets
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.record import receipt
from labtrain.record.identity import what_counts
from labtrain.record.sources import source_digests
from labtrain.review.crate import write_crate
from tests.conftest import LABTRAIN
from tests.quick.record.test_receipt import CREDENTIALS
from tests.support.exact import Runner, configure

PROCESS, WORKFLOW = "https://w3id.org/ro/wfrun/process/0.5", "https://w3id.org/ro/wfrun/workflow/0.5"
WORKFLOW_RO_CRATE = "https://w3id.org/workflowhub/workflow-ro-crate/1.0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, in the folder of an experiment."""
    root = tmp_path_factory.mktemp("lab") / "digits"
    root.mkdir()
    assert Runner(root).run(configure("mlp", "even", checkpoint={"every_n_steps": 5})) is not None
    (root / "train.py").write_text("import model\n")
    (root / "parts of it").mkdir()
    (root / "parts of it" / "größe.py").write_text("WIDTH = 8\n")
    return root


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, whose receipt is of the code as it is now, and of another day: what says today is found."""
    shutil.copytree(trained, tmp_path / "digits", ignore=shutil.ignore_patterns(".lock"))
    found = next((tmp_path / "digits" / "runs" / "exact").iterdir())
    day = {"started": "2025-01-02T03:04:05+00:00", "ended": "2025-01-02T04:00:00+00:00"}
    changed(found, lambda found: found["segments"][-1].update(day))
    return found


COMMIT = "c0ffee" + "0" * 34


def changed(run_dir: Path, change: Any) -> receipt.Receipt:
    found = receipt.read(run_dir)
    assert found is not None
    found["code"]["sources"] = source_digests(run_dir.parents[2])
    change(found)
    receipt.write(run_dir, found)
    return found


def export(run_dir: Path, file: Path, **options: Any) -> tuple[Any, dict[str, Any], dict[str, bytes]]:
    """Return a crate as rocrate reads it, its entities by name, and its files."""
    assert write_crate(run_dir, file, **{"weights": False, "author": None, "licence": None, **options}) == file
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name) for name in archive.namelist()}
    graph = json.loads(files.pop("ro-crate-metadata.json"))["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    assert len(entities) == len(graph)
    assert list(entities) == sorted(entities)
    return ROCrate(file), entities, files


def references(node: Any) -> set[str]:
    if isinstance(node, list):
        return set().union(*map(references, node))
    if isinstance(node, dict):
        return {node["@id"]} if set(node) == {"@id"} else references(list(node.values()))
    return set()


def test_it_is_a_workflow_run_crate(run_dir: Path, tmp_path: Path) -> None:
    """Each requirement of the tables, MUST and SHOULD, in their order."""
    options = {"weights": True, "author": "Ada Lovelace", "licence": "CC-BY-4.0"}
    crate, entities, _ = export(run_dir, tmp_path / "a.zip", **options)
    found = receipt.read(run_dir)
    assert found is not None

    # RO-Crate 1.1: the descriptor and the root dataset
    descriptor, root = entities["ro-crate-metadata.json"], entities["./"]
    assert descriptor["@type"] == "CreativeWork"
    assert descriptor["about"] == {"@id": "./"}
    assert {"@id": "https://w3id.org/ro/crate/1.1"} in descriptor["conformsTo"]
    assert {"@id": WORKFLOW_RO_CRATE} in descriptor["conformsTo"]
    assert root["@type"] == "Dataset"
    assert root["name"]
    assert root["description"]
    assert datetime.fromisoformat(root["datePublished"]).tzinfo
    assert root["datePublished"] == found["segments"][-1]["ended"]
    assert root["license"] == {"@id": "https://spdx.org/licenses/CC-BY-4.0"}
    assert entities["https://spdx.org/licenses/CC-BY-4.0"]["name"] == "CC-BY-4.0"

    # Workflow RO-Crate 1.0: the main workflow and its language
    workflow = entities["train.py"]
    assert root["mainEntity"] == {"@id": "train.py"}
    assert workflow["@type"] == ["File", "SoftwareSourceCode", "ComputationalWorkflow"]
    assert entities[workflow["programmingLanguage"]["@id"]]["@type"] == "ComputerLanguage"
    assert entities[workflow["programmingLanguage"]["@id"]]["name"] == "Python"

    # Process Run Crate 0.5: the profile, the tool, the action
    for profile in (PROCESS, WORKFLOW, WORKFLOW_RO_CRATE):
        assert {"@id": profile} in root["conformsTo"]
        assert entities[profile]["@type"] == "CreativeWork"
        assert entities[profile]["version"] == profile.rpartition("/")[2]
    assert workflow["name"]
    assert workflow["version"] == (found["code"]["commit"] or found["code"]["digest"])
    actions = [entity for entity in entities.values() if entity["@type"] == "CreateAction"]
    assert len(actions) == 1
    action = actions[0]
    assert root["mentions"] == {"@id": action["@id"]}
    assert found["run_id"] in action["name"]
    assert action["description"] == "test"
    assert action["startTime"] == found["segments"][0]["started"]
    assert action["endTime"] == found["segments"][-1]["ended"]
    assert action["instrument"] == {"@id": "train.py"}
    assert entities[action["agent"]["@id"]] == {"@id": "#author", "@type": "Person", "name": "Ada Lovelace"}
    assert action["actionStatus"] == "http://schema.org/CompletedActionStatus"
    assert "error" not in action
    kinds = {"File", "Dataset", "Collection", "CreativeWork", "PropertyValue"}
    objects, results = ([entities[each["@id"]] for each in action[key]] for key in ("object", "result"))
    assert all(kinds & {*([each["@type"]] if isinstance(each["@type"], str) else each["@type"])}
               for each in objects + results)  # fmt: skip
    assert {"receipt.json", "trail.jsonl", "weights.safetensors"} <= {each["@id"] for each in results}
    assert {"config.yaml", "#data-train"} <= {each["@id"] for each in objects}
    assert entities["#data-train"]["identifier"] == f"sha256:{found['data']['train']['digest']}"
    given = {each["name"]: each["value"] for each in results if each["@type"] == "PropertyValue"}
    assert given.pop("weights_digest") == found["results"]["weights_digest"]
    assert given.pop("state_digest") == found["results"]["state_digest"]
    assert given.pop("steps") == 15
    assert given == found["results"]["metrics"]
    for variable in action["environment"]:
        assert entities[variable["@id"]]["@type"] == "PropertyValue"
    software = {entities[each["@id"]]["name"]: entities[each["@id"]] for each in workflow["softwareRequirements"]}
    assert {each["@type"] for each in software.values()} == {"SoftwareApplication"}
    assert software["python"]["softwareVersion"] == found["environment"]["python"]
    assert software["torch"]["softwareVersion"] == found["environment"]["distributions"]["torch"]

    # Workflow Run Crate 0.5: parameters and their slots; what tells of the action
    slots = {each["@id"] for each in workflow["input"]}
    values = [each for each in objects if each["@type"] == "PropertyValue"]
    assert {each["exampleOfWork"]["@id"] for each in values} == slots
    for each in values:
        slot = entities[each["exampleOfWork"]["@id"]]
        assert slot["@type"] == "FormalParameter"
        assert slot["name"] == each["name"]
        assert slot["additionalType"] in ("Boolean", "Integer", "Float", "Text")
    assert "exampleOfWork" not in entities["config.yaml"]
    assert {each["name"]: each["value"] for each in values}["seed"] == 42
    for name in ("receipt.json", "trail.jsonl"):
        assert entities[name]["about"] == {"@id": action["@id"]}

    assert crate.mainEntity.id == "train.py"
    assert {each.id for each in crate.data_entities} == {each["@id"] for each in root["hasPart"]}


def test_every_file_is_its_original_and_every_reference_leads_somewhere(run_dir: Path, tmp_path: Path) -> None:
    """Into the crate, or by an absolute address; the files of the zip are those that are described, and no other."""
    (run_dir / "receipt.json.sig").write_text("a signature")
    (run_dir / "verified.jsonl").write_text("{}")
    (run_dir / "code.patch").write_text("--- a/train.py\n")
    crate, entities, files = export(run_dir, tmp_path / "a.zip", weights=True)
    root = run_dir.parents[2]
    places = {name: run_dir / name for name in ("receipt.json", "receipt.json.sig", "verified.jsonl", "config.yaml",
              "code.patch", "trail.jsonl", "history.jsonl") if (run_dir / name).exists()}  # fmt: skip
    places |= {name: root / name for name in ("train.py", "parts of it/größe.py")}
    places["weights.safetensors"] = max((run_dir / "checkpoints").iterdir()) / "weights.safetensors"
    assert {name: hashlib.sha256(text).hexdigest() for name, text in files.items()} == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in places.items()
    }
    described = {each.id: each for each in crate.data_entities}
    assert len(described) == len(files)
    for each in described.values():
        text = Path(each.source).read_bytes()
        assert each["sha256"] == hashlib.sha256(text).hexdigest()
        assert each["contentSize"] == str(len(text))
        assert each["encodingFormat"]
        assert each["name"]
    for entity in entities.values():
        for name in references([value for key, value in entity.items() if key != "@id"]):
            assert name in entities or name.startswith("https://"), name


def test_the_same_run_is_the_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    """At another time and from another folder; in another process, whose hashes are salted anew."""
    export(run_dir, tmp_path / "a.zip", weights=True)
    moved = tmp_path / "elsewhere" / "digits"
    shutil.copytree(run_dir.parents[2], moved)
    here = next((moved / "runs" / "exact").iterdir())
    done = subprocess.run(
        [LABTRAIN, "crate", str(here), "-o", "b.zip", "--weights"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "b.zip\n"), done.stderr
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_no_credential_and_no_path_of_a_machine_is_in_the_metadata(run_dir: Path, tmp_path: Path) -> None:
    """Of how it was executed nothing is there; a path that counts is named as one."""

    def change(found: receipt.Receipt) -> None:
        found["config"] = without_secrets({
            **found["config"],
            "data": {**found["config"]["data"], "root": "/srv/ada/images", "also": ["/srv/x", "s3://lab/1/2"],
                     "url": "file:///srv/y", "api_key": "hunter2hunter2", "odd": float("nan"), "nothing": None},
        })  # fmt: skip
        found["command"] = ["/srv/digits/train.py", "data.root=/srv/ada/images", "paths.runs=/srv/runs", "seed=1/2"]

    found = changed(run_dir, change)
    (run_dir.parents[2] / "keys.py").write_text(f"KEY = '{CREDENTIALS['a GitHub token']}'\n")
    found = changed(run_dir, lambda _: None)
    _, entities, files = export(run_dir, tmp_path / "a.zip")
    text = json.dumps(entities)
    assert str(tmp_path) not in text
    assert "/srv" not in text
    assert "hunter2" not in text
    assert "keys.py" not in files
    assert not any(SECRET_VALUE.search(json.dumps(entity)) for entity in entities.values())
    given = {name: each.get("value") for name, each in entities.items() if name.startswith("#config-")}
    assert given["#config-data.root"] == "(local path)"
    assert given["#config-data.also"] == '["(local path)", "s3://lab/1/2"]'
    assert given["#config-data.odd"] == "NaN"
    assert "#config-data.nothing" not in given
    action = entities[f"#run-{found['run_id']}"]
    assert action["description"] == "(local path) data.root=(local path) paths.runs=(local path) seed=1/2"
    counts = what_counts(found["config"])
    assert {name.removeprefix("#config-").partition(".")[0] for name in given} <= set(counts)
    assert not any(name.startswith(("#config-paths", "#config-checkpoint", "#config-logger")) for name in given)


def test_without_the_sources_that_ran_it_is_a_process_run_crate(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Changed since, or not beside the run: what else lies there is not passed off as them, and it is said."""
    changed(run_dir, lambda found: found["code"].update(commit=COMMIT, ignored=[]))
    shutil.copytree(run_dir, tmp_path / "alone")
    (run_dir.parents[2] / "train.py").write_text("import another\n")
    for folder, why in (
        (run_dir, "are not the ones that ran"),
        (tmp_path / "alone", "is not in an experiment's folder"),
    ):
        _, entities, files = export(folder, tmp_path / "a.zip")
        said = capsys.readouterr().err
        assert why in said
        assert f"names only commit {COMMIT}" in said
        assert not any(name.endswith(".py") for name in files)
        assert entities["./"]["conformsTo"] == {"@id": PROCESS}
        assert "mainEntity" not in entities["./"]
        assert WORKFLOW not in entities
        action = next(entity for entity in entities.values() if entity["@type"] == "CreateAction")
        tool = entities[action["instrument"]["@id"]]
        assert tool["@type"] == "SoftwareSourceCode"
        assert tool["version"] == COMMIT
        assert tool["softwareRequirements"]
        assert not any(entity["@type"] == "FormalParameter" for entity in entities.values())
        assert not any("exampleOfWork" in entity for entity in entities.values())


def test_what_git_is_told_to_ignore_is_not_enclosed(run_dir: Path, tmp_path: Path) -> None:
    """Credentials lie there: neither has the receipt's patch it."""
    (run_dir.parents[2] / "local.py").write_text("PASSWORD = 'Tr0ub4dor'\n")
    changed(run_dir, lambda found: found["code"].update(ignored=["local.py"]))
    _, entities, files = export(run_dir, tmp_path / "a.zip")
    assert "local.py" not in files
    assert "local.py" not in entities
    assert "train.py" in files


@pytest.mark.parametrize(("status", "why"), [("interrupted", "SIGTERM"), ("failed", "ValueError: in /srv/ada/x.py")])
def test_a_run_that_did_not_complete_failed_and_says_where(
    run_dir: Path, tmp_path: Path, status: str, why: str
) -> None:
    def change(found: receipt.Receipt) -> None:
        found |= {"status": status, "results": {}}
        found["segments"][-1] |= {"status": status, "why": why, "to_step": 7}

    changed(run_dir, change)
    _, entities, _ = export(run_dir, tmp_path / "a.zip")
    action = next(entity for entity in entities.values() if entity["@type"] == "CreateAction")
    assert action["actionStatus"] == "http://schema.org/FailedActionStatus"
    assert action["error"] == f"{status} at step 7: {why.replace('/srv/ada/x.py', '(local path)')}"


def test_the_weights_are_there_only_if_asked_for(run_dir: Path, tmp_path: Path) -> None:
    """Their digest is in either; those of a checkpoint that was damaged, or are others, are not taken for them."""
    _, entities, files = export(run_dir, tmp_path / "a.zip")
    assert "weights.safetensors" not in files
    assert entities["#result-weights_digest"]["value"]
    changed(run_dir, lambda found: found["results"].update(weights_digest="0" * 64))
    with pytest.raises(DamagedError, match=f"the receipt says {'0' * 64}"):
        export(run_dir, tmp_path / "b.zip", weights=True)
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(LabtrainError, match="no undamaged checkpoint"):
        export(run_dir, tmp_path / "b.zip", weights=True)
    assert not (tmp_path / "b.zip").exists()


@pytest.mark.parametrize("licence", ["CC-BY-4.0", "https://example.org/licence", None])
def test_a_licence_is_named_or_it_is_said_that_there_is_none(
    run_dir: Path, tmp_path: Path, licence: str | None
) -> None:
    """Workflow RO-Crate requires one."""
    _, entities, _ = export(run_dir, tmp_path / "a.zip", licence=licence)
    named = entities[entities["./"]["license"]["@id"]]
    assert named["@type"] == "CreativeWork"
    assert (licence or "No licence") in named["name"]
    assert "agent" not in json.dumps(entities)
    with pytest.raises(ConfigError, match="neither an SPDX identifier nor a URL"):
        export(run_dir, tmp_path / "b.zip", licence="as you like")


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    """The file that is there stays as it is, too."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.zip").write_text("the last one")
    running, damaged = tmp_path / "running", tmp_path / "damaged"
    shutil.copytree(run_dir, running)
    shutil.copytree(run_dir, damaged)
    found = receipt.read(running)
    assert found is not None
    receipt.write(running, {**found, "status": "running", "results": {}})
    (damaged / "trail.jsonl").write_text("{}\n")
    cases = [
        (tmp_path, "out/a.zip", "is not a run: looked for receipt.json"),
        (running, "out/a.zip", "is still training, or was killed"),
        (damaged, "out/a.zip", "trail.jsonl was changed after it was written"),
        (run_dir, "none/a.zip", "folder none does not exist"),
        (run_dir, f"{run_dir}/receipt.json", "the name must end in .zip"),
    ]
    for run, file, says in cases:
        command = [LABTRAIN, "crate", str(run), "-o", file]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert says in done.stderr
        assert "hint: " in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.zip"]
    assert (tmp_path / "out" / "a.zip").read_text() == "the last one"
    assert receipt.read(run_dir) is not None
    export(run_dir, tmp_path / "out" / "a.zip")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.zip"]


KINDS = ("link", "link to a folder", "hanging link", "pipe", "socket", "folder")


def put_in_place(path: Path, kind: str, secret: Path) -> None:
    """Put something that is no file in the place of a file."""
    path.unlink(missing_ok=True)
    match kind:
        case "link":
            path.symlink_to(secret)
        case "link to a folder":
            path.symlink_to(secret.parent)
        case "hanging link":
            path.symlink_to(secret.with_name("none"))
        case "pipe":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                os.chdir(path.parent)
                server.bind(path.name)
        case "folder":
            path.mkdir()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["receipt.json", "code.patch", "verified.jsonl", "history.jsonl", "receipt.json.sig"])
def test_what_is_no_file_of_the_run_is_in_no_crate(
    run_dir: Path, tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that came by mail has a private key of whoever publishes it in no zip, and waits for no pipe; named."""
    secret = tmp_path / "home" / "id_ed25519"
    secret.parent.mkdir()
    secret.write_text("PRIVATE KEY")
    monkeypatch.chdir(tmp_path)
    put_in_place(run_dir / name, kind, secret)
    with pytest.raises(DamagedError, match=f"{name} is (a link to|not a regular file)") as error:
        export(run_dir, tmp_path / "a.zip")
    assert error.value.hint == f"ls -l {run_dir / name}"
    assert list(tmp_path.glob("*a.zip*")) == []


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step", "checkpoints/step/weights.safetensors"])
def test_weights_behind_a_link_are_in_no_crate(run_dir: Path, tmp_path: Path, place: str) -> None:
    """The folder of the checkpoints, a checkpoint's, or the file: though it holds the very bytes."""
    step = max((run_dir / "checkpoints").glob("step-*"))
    path = run_dir / place.replace("step", step.name)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(
        LabtrainError, match=r"is a link to|is a symbolic link|has no undamaged checkpoint|the receipt says"
    ):
        export(run_dir, tmp_path / "a.zip", weights=True)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("above", [False, True])
def test_a_receipt_chooses_no_weights_of_another_place(run_dir: Path, tmp_path: Path, above: bool) -> None:
    """It may name any folder or server that this user can read: what lies there is enclosed where it knows the digest."""
    here, there = run_dir / "checkpoints", tmp_path / "elsewhere" / run_dir.name
    url = str(run_dir / "../../../../elsewhere") if above else str(there.parent)
    there.parent.mkdir()
    here.rename(there)
    changed(run_dir, lambda found: found["config"]["checkpoint"].update(url=url))
    if not above:
        assert "weights.safetensors" in export(run_dir, tmp_path / "a.zip", weights=True)[2]
    changed(run_dir, lambda found: found.update(results={}, checkpoints=[], status="interrupted"))
    with pytest.raises(DamagedError, match=r"its weights are not in the receipt|outside its folder"):
        export(run_dir, tmp_path / "b.zip", weights=True)
    assert not (tmp_path / "b.zip").exists()


def test_a_source_that_is_a_link_is_refused(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("WIDTH = 8\n")
    root = run_dir.parents[2]
    (root / "helper.py").symlink_to(tmp_path / "helper.py")
    changed(run_dir, lambda _: None)
    with pytest.raises(DamagedError, match=r"helper\.py is a link to"):
        export(run_dir, tmp_path / "a.zip")


def test_neither_torch_nor_rocrate_is_imported_before_it_is_needed(run_dir: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import labtrain.cli, labtrain.review.signature; from labtrain.review.crate import *\n"
        "assert not {'torch', 'lightning', 'rocrate', 'requests'} & set(sys.modules)\n"
        "write_crate(Path(sys.argv[1]), Path(sys.argv[2]), weights=True, author=None, licence=None)\n"
        "assert 'rocrate' in sys.modules and not {'torch', 'lightning'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(run_dir), str(tmp_path / "a.zip")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
