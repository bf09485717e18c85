"""`labtrain schema`: the schemas that editors read, with a real validator, on the template and on programs of the corpus."""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from omegaconf import OmegaConf
from referencing import Registry, Resource

from labtrain.base.contracts import as_options
from labtrain.base.errors import ConfigError
from labtrain.project.schema import FOLDER, argument_texts, of_target, of_type, targets_in
from labtrain.record.config import GROUPS, check, defaults
from labtrain.record.sources import source_digests
from tests.conftest import LABTRAIN, ROOT, Experiment
from tests.quick.record.test_config import composed
from tests.support.corpus import CORPUS

PROGRAMS = ("vision/augmented", "text/gpt", "generative/gan", "graph/node2vec", "tabular/sam", "multitask/pcgrad")
Errors = Callable[[str, object], list[str]]

CLASSES = '''
from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy

if TYPE_CHECKING:
    from nowhere import Unknown


class Encoder:
    """An encoder.

    Args:
        depth: how many layers,
            one above the other.
        kind: which sort.
    """

    def __init__(self, depth: int = 2, kind: Literal["cnn", "mlp"] = "mlp", sizes: list[int] | None = None) -> None: ...


class Anything:
    def __init__(self, width: int, **kwargs: object) -> None: ...


class Untyped:
    def __init__(self, one, two: Unknown = None, three: 3 = None) -> None: ...


class Odd:
    def __init__(self, far: float = float("inf"), rows=numpy.zeros(2), mark: Literal[b"x"] = b"x", *more: int) -> None: ...


def make(rate: float, name: str = None, size: 3 = None): ...
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, shared_experiment: Experiment) -> Path:
    """An experiment with programs of the corpus, classes of its own and one class that does not exist; its schemas."""
    root = tmp_path_factory.mktemp("schema") / "digits"
    shutil.copytree(shared_experiment.root, root, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    (root / "classes.py").write_text(CLASSES)
    for program in PROGRAMS:
        shutil.copy(CORPUS / f"{program}.py", root)
        name = Path(program).name
        for group, kind in (("model", "Model"), ("data", "Data")):
            (root / "conf" / group).mkdir(exist_ok=True)
            (root / "conf" / group / f"{name}.yaml").write_text(f"_target_: {name}.{kind}\n")
    (root / "conf/model/own.yaml").write_text(
        "_target_: classes.Anything\nwidth: 3\nencoder: {_target_: classes.Encoder}\nmake: {_target_: classes.make}\n"
        "untyped: {_target_: classes.Untyped}\n"
    )
    (root / "conf/experiment/early.yaml").write_text(
        "# @package _global_\ncallbacks:\n  early:\n    _target_: lightning.pytorch.callbacks.EarlyStopping\n"
        "    monitor: val/acc\n  lost: {_target_: classes.Lost}\n"
    )
    before = source_digests(root)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    done = subprocess.run([LABTRAIN, "schema"], cwd=root / "conf", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "warning: callbacks.lost._target_=classes.Lost: AttributeError: module 'classes' has no attribute 'Lost'; its"
        " arguments are not checked"
    ]
    assert sorted(done.stdout.splitlines()) == sorted(map(str, (root / FOLDER).glob("*.json")))
    left = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    assert not [line for line in left.stdout.splitlines() if not line.startswith("A ")], "it would make a receipt dirty"
    assert source_digests(root) == before, "it would give runs another name"
    return root


@pytest.fixture(scope="module")
def errors(root: Path) -> Errors:
    """Return where a value does not fit the schema of this name."""
    schemas = {path.name: json.loads(path.read_text()) for path in (root / FOLDER).glob("*.json")}
    registry: Registry[Any] = Registry().with_resources(
        (name, Resource.from_contents(schema)) for name, schema in schemas.items()
    )
    for schema in schemas.values():
        Draft7Validator.check_schema(schema)

    def of(name: str, value: object) -> list[str]:
        found = Draft7Validator(schemas[f"{name}.json"], registry=registry).iter_errors(value)
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]

    return of


def read(path: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def test_vs_code_gives_each_file_one_schema_which_it_fits(root: Path, errors: Errors) -> None:
    """By the settings that the experiment carries: the template's files, and those that name the corpus's programs."""
    settings = json.loads((root / ".vscode/settings.json").read_text())["yaml.schemas"]
    mapped = {
        path: Path(name).stem for name, patterns in settings.items() for each in patterns for path in root.glob(each)
    }
    assert set(mapped) == set((root / "conf").rglob("*.yaml"))
    assert {Path(name) for name in settings} == {path.relative_to(root) for path in (root / FOLDER).glob("*.json")}
    assert len(mapped) == 2 + 2 * len(PROGRAMS) + 2
    for path, name in mapped.items():
        assert errors(name, read(path)) == [], path


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("max_epochs: 15", "max_epoch: 15", "trainer: "),
        ("max_epochs: 15", "max_epochs: many", "trainer.max_epochs: "),
        ("width: 16", "widht: 16", "model: "),
        ("width: 16", "width: wide", "model.width: "),
        ("width: 16", "width: [1, 2]", "model.width: "),
        ("dropout: 0.25", "dropout: true", "model.dropout: "),
        ("batch_size: 64", "batch_size: 0", "data.batch_size: "),
        ("max_shift: 1", "max_shift: 1.5", "data.max_shift: "),
        ("model:", "modle:", ": "),
        ("trainer:", "speed:\n  compile: fast\ntrainer:", "speed.compile: "),
        ("trainer:", "determinism: {mode: stict}\ntrainer:", "determinism.mode: "),
        ("trainer:", "init_from: {pth: x}\ntrainer:", "init_from: "),
        ("trainer:", "seed: -1\ntrainer:", "seed: "),
    ],
)
def test_a_mistake_is_marked_where_it_is(
    old: str, new: str, where: str, root: Path, errors: Errors, tmp_path: Path
) -> None:
    text = (root / "conf/config.yaml").read_text()
    assert old in text
    (tmp_path / "config.yaml").write_text(text.replace(old, new, 1))
    found = errors("config", read(tmp_path / "config.yaml"))
    assert found
    assert any(each.startswith(where) for each in found), found


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("config", {"seed": "${oc.env:SEED}"}, {"seed": "7"}),
        ("config", {"data": {"batch_size": "???"}}, {"data": {"batch_size": "??"}}),
        ("config", {"trainer": "${other}"}, {"trainer": "fast"}),
        ("config", {"trainer": {"devices": [0, 1]}}, {"trainer": {"devices": "two"}}),
        ("config", {"init_from": "906ca0"}, {"init_from": {"strict": "maybe"}}),
        ("config", {"paths": {"data": "/data"}}, {"trail": {"every_n_steps": "all"}}),
        ("trainer", {"max_time": None}, {"max_tim": None}),
        # A file without _target_ changes arguments of the class that another file names.
        ("config", {"data": {"max_shift": 2}}, {"data": {"max_shft": 2}}),
        ("config", {"callbacks": {"early": {"patience": 3}}}, {"callbacks": {"early": {"patienc": 3}}}),
        ("config", {"callbacks": {"early": None}}, {"callbacks": {"early": {"patience": "long"}}}),
        # A class that was not there when the schemas were written.
        ("model", {"_target_": "new.Net", "any": 1}, {"_target_": "model.DigitsNet", "any": 1}),
        ("model", {"_target_": "classes.Anything", "more": [1]}, {"_target_": "classes.Anything", "width": "x"}),
        ("model", {"_target_": "classes.Anything", "more": {"_target_": "classes.make", "_partial_": True}},
         {"_target_": "classes.Anything", "more": [{"_target_": "classes.make", "_partial": True}]}),
        ("model", {"_target_": "classes.Encoder", "kind": "${kind}"}, {"_target_": "classes.Encoder", "kind": "rnn"}),
        ("model", {"_target_": "classes.Encoder", "depth": {"_target_": "classes.make", "rate": 1}},
         {"_target_": "classes.Encoder", "depth": {"rate": 1}}),
        ("data", {"_target_": "gpt.Data", "num_workers": 2}, {"_target_": "gpt.Data", "workers": 2}),
    ],
)  # fmt: skip
def test_what_hydra_allows_is_not_marked(name: str, good: object, bad: object, errors: Errors) -> None:
    assert errors(name, good) == []
    assert errors(name, bad) != []


def test_what_a_start_refuses_is_marked(errors: Errors) -> None:
    """Each value of a key that labtrain refuses by itself, before torch is imported; what it accepts as a default fits."""
    values = (True, -2, 0, 1, 2.5, "x", None, [0], {"a": 1})
    refused, whole = 0, composed()
    for group in GROUPS:
        assert errors(group, defaults(group)) == []
        for key in defaults(group):
            for value in values:
                config: Any = copy.deepcopy(whole)
                config[group][key] = value
                try:
                    check(config)
                except ConfigError as error:
                    if str(error).startswith(f"{group}.{key}={value}: must be"):
                        refused += 1
                        assert errors(group, {key: value}), f"{group}.{key}={value}"
    assert refused > 150


def test_a_missing_annotation_or_name_constrains_nothing() -> None:
    names: dict[str, Any] = {}
    exec(CLASSES, names)
    found = of_target("x.Untyped", names["Untyped"])["properties"]
    assert "type" not in found["one"]
    assert "type" not in found["two"]
    made = of_target("x.make", names["make"])["properties"]
    assert made["name"]["type"] == ["string", "null", "object"], "None by default, as older code writes it"
    assert "type" not in made["size"]
    odd = of_target("x.Odd", names["Odd"])
    assert odd == json.loads(json.dumps(odd, allow_nan=False)), "defaults that JSON lacks are left out"
    assert of_type(object) == of_type(int | object) == found["one"]


def test_the_meanings_are_those_of_the_docstring() -> None:
    names: dict[str, Any] = {}
    exec(CLASSES, names)
    found = of_target("x.Encoder", names["Encoder"])["properties"]
    assert found["_target_"]["description"] == "An encoder."
    assert found["depth"]["description"] == "how many layers, one above the other."
    assert found["depth"]["default"] == 2
    assert argument_texts("No section.") == {}


def test_the_schema_of_labtrains_keys_has_their_meanings(root: Path) -> None:
    whole = json.loads((root / FOLDER / "config.json").read_text())
    reference = (ROOT / "docs/reference/configuration.md").read_text()
    for group in GROUPS:
        for key, schema in whole["definitions"][group]["properties"].items():
            assert key == "defaults" or f"| `{group}.{key}` |" in reference
            assert schema["description"]
    assert as_options(composed()).keys() <= whole["properties"].keys()


def test_what_is_not_yaml_is_left_to_the_editor(tmp_path: Path) -> None:
    """Bytes, a folder with such a name, a value that contains itself: the other files count."""
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "itself.yaml").write_text("a: &a [*a]\n")
    (tmp_path / "config.yaml").write_text("model:\n  _target_: model.Net\n")
    assert targets_in(tmp_path) == {"model": ["model.Net"]}
