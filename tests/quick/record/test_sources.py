"""The code that names a run: what is found outside of the experiment's folder, and that what was hashed is what runs."""

import contextlib
import importlib
import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from labtrain.base.errors import ConfigError
from labtrain.record import sources
from labtrain.record.identity import lock_digest
from labtrain.record.sources import Code, read_code
from labtrain.training.guard import unnamed

CONFIG = {"model": {"_target_": "model.Net"}, "data": {"_target_": "data.Data"}, "callbacks": {}}


def write(folder: Path, **files: str) -> Path:
    """Write modules: `a__b` is a/b.py."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def read(root: Path, *path: Path, config: Any = CONFIG) -> Code:
    return read_code(root, config, path=[*map(str, path), *sys.path])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "exp", model="import labutils.scale, torch\n", train="import labtrain\n")


def package(folder: Path, name: str, **files: str) -> Path:
    write(folder / name, **{"scale": "SCALE = 1.0\n", **files})
    (folder / name / "__init__.py").write_text("")
    return folder


@pytest.mark.parametrize("how", ["PYTHONPATH", "symlink", "link in site-packages", "finder", "zip"])
def test_code_outside_of_the_folder_is_in_the_name(
    how: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is imported, all of it, and what that imports; an edit is another name, another place is not."""
    lib = package(tmp_path / "lib", "labutils", deep__more="import helper\n")
    write(lib, helper="import math\n", unused="")
    path = [lib]
    if how == "symlink":
        (root / "labutils").symlink_to(lib / "labutils")
        (root / "helper.py").symlink_to(lib / "helper.py")
        path = []
    elif how == "link in site-packages":
        site = tmp_path / "site"
        (site / "other-1.dist-info").mkdir(parents=True)
        (site / "other-1.dist-info" / "RECORD").write_text("installed/__init__.py,,\n")
        for name in ("labutils", "helper.py"):
            (site / name).symlink_to(lib / name)
        folders = (*sources.environment_folders(), f"{site}/")
        monkeypatch.setattr(sources, "environment_folders", lambda: folders)
        path = [site]
    elif how == "finder":  # as setuptools' editable installs bring

        class Finder:
            @staticmethod
            def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
                from importlib.util import spec_from_file_location

                places = {"labutils": lib / "labutils" / "__init__.py", "helper": lib / "helper.py"}
                return spec_from_file_location(name, places[name]) if name in places else None

        monkeypatch.setattr("sys.meta_path", [*sys.meta_path, Finder])
        path = []
    elif how == "zip":
        path = [Path(shutil.make_archive(str(tmp_path / "lib"), "zip", lib))]
    first = read(root, *path)
    names = {"labutils/__init__.py", "labutils/deep/more.py", "labutils/scale.py", "helper.py"}
    expected = {"lib.zip"} if how == "zip" else names
    assert {*first.outside, *(first.sources if how == "symlink" else ())} >= expected
    assert not any("unused" in name or str(tmp_path) in name for name in first.outside)
    if how == "PYTHONPATH":
        elsewhere = shutil.copytree(lib, tmp_path / "elsewhere")
        assert read(root, elsewhere).digest == first.digest
    (lib / "labutils" / "scale.py").write_text("SCALE = 0.01\n")
    if how == "zip":
        path = [Path(shutil.make_archive(str(tmp_path / "lib"), "zip", lib))]
    assert read(root, *path).digest != first.digest


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "link to a device", "link to nothing", "outside", "lock"])  # fmt: skip
def test_a_source_that_is_no_plain_file_is_refused(kind: str, root: Path, tmp_path: Path) -> None:
    """In a line, at once: a pipe is read for ever."""
    path, target = root / "zz.py", tmp_path / "target"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(root):  # its name has at most 107 bytes
                made.bind("zz.py")
        case "outside":
            path = package(tmp_path / "lib", "labutils") / "labutils" / "pipe.py"
            os.mkfifo(path)
        case "lock":
            path = root / "requirements.lock"
            os.mkfifo(path)
        case _:
            if kind == "link to a pipe":
                os.mkfifo(target)
            path.symlink_to("/dev/zero" if kind == "link to a device" else target)
    signal.alarm(60)
    try:
        with pytest.raises(ConfigError, match=r"^[^\n]*is (not a regular file|a broken link)\n\nhint: ls -l") as raised:
            lock_digest(root) if kind == "lock" else read(root, tmp_path / "lib")
    finally:
        signal.alarm(0)
    assert str(raised.value).startswith(f"{path} is ")


def test_what_labtrainignore_names_is_not_in_it(root: Path) -> None:
    """In the form of .gitignore: names anywhere, paths from the root on, folders, patterns, comments."""
    write(
        root, plot="", tools__plot="", figures__one="", deep__figures__two="", my_plot="", deep__keep="", deep__drop=""
    )
    (root / ".labtrainignore").write_text("# plots\n\nplot.py\nfigures/\n*_plot.py\n/deep/drop.py\n")
    assert set(read(root).sources) == {"model.py", "train.py", "deep/keep.py"}
    before = read(root).digest
    write(root, plot="1", figures__more="")
    assert read(root).digest == before


@pytest.mark.parametrize("line", ["!plot.py", "**/plot.py"])
def test_a_line_of_labtrainignore_that_is_not_supported(line: str, root: Path) -> None:
    (root / ".labtrainignore").write_text(f"a.py\n{line}\n")
    with pytest.raises(ConfigError, match=r"\.labtrainignore, line 2: .* are not supported"):
        read(root)


def test_what_lies_there_and_is_not_imported_is_not_in_it(root: Path, tmp_path: Path) -> None:
    """Nor is the environment, nor a word of a docstring that looks like an import."""
    (root / "model.py").write_text('"""Sentences begin\nfrom labutils and\nimport labutils."""\nimport torch, numpy\n')
    found = read(root, package(tmp_path / "lib", "labutils"))
    assert (found.outside, found.shadows) == ({}, [])
    assert set(found.sources) == {"model.py", "train.py"}


@pytest.mark.parametrize(
    "text",
    [
        "if True:\n    from labutils.scale import SCALE\n",
        "import os, \\\n    labutils as u\n",
        "def f():\n    try: import labutils\n    except ImportError: pass\n",
        "import importlib\nm = importlib.import_module('labutils.scale')\n",
    ],
)
def test_imports_are_found_wherever_they_stand(text: str, root: Path, tmp_path: Path) -> None:
    (root / "model.py").write_text(text)
    assert "labutils/scale.py" in read(root, package(tmp_path / "lib", "labutils")).outside


def test_a_target_is_found_in_the_configuration(root: Path, tmp_path: Path) -> None:
    """Without an import: Hydra imports it by its name, at any depth."""
    (root / "model.py").write_text("")
    lib = package(tmp_path / "lib", "labutils")
    config = {**CONFIG, "callbacks": {"a": {"_target_": "torch.nn.Linear", "b": [{"_target_": "labutils.scale.Make"}]}}}
    assert "labutils/scale.py" in read(root, lib, config=config).outside
    assert not read(root, lib).outside


def test_a_copy_that_shadows_is_named_and_hashed(root: Path, tmp_path: Path) -> None:
    """Also one that only a library imports; a folder without __init__ does not come first."""
    lib = package(tmp_path / "lib", "torchmetrics")
    write(lib, random="", numpy__core="")
    found = read(root, lib)
    assert found.shadows == ["random", "torchmetrics"]
    assert {"random.py", "torchmetrics/__init__.py", "torchmetrics/scale.py"} == set(found.outside)


def test_an_environment_on_the_path_is_no_code(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH may be another environment: gigabytes, whose digest nobody waits for."""
    monkeypatch.setattr(sources, "MOST_FILES", 2)
    with pytest.raises(sources.ConfigError, match=r"labutils is imported from .*: 3 files with \d+ bytes are too much"):
        read(root, package(tmp_path / "lib", "labutils", b="", c=""))


def test_the_wheel_and_the_tree_are_one_labtrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template that a wheel encloses is a text that people start from, and no code of a run."""
    tree = sources.labtrain_sources()
    installed = shutil.copytree(sources.OWN, tmp_path / "labtrain", ignore=shutil.ignore_patterns("__pycache__"))
    write(installed, assets__template__model="", assets__template__hooks__post="")
    monkeypatch.setattr(sources, "OWN", installed)
    assert sources.labtrain_sources() == tree


CHEAT = "VALUE = 'bytecode'\ndef f(): return 2\n"
LOOK = """
import sys
sys.path.insert(0, {root!r})
from labtrain.record.sources import load_from_source
load_from_source()
import multiprocessing, importlib.util
import model, parts.layer, lib_module, json
spec = importlib.util.spec_from_file_location("by_path", {by_path!r})
by_path = importlib.util.module_from_spec(spec); spec.loader.exec_module(by_path)
print(model.VALUE, parts.layer.VALUE, lib_module.VALUE, by_path.VALUE, bool(json.__cached__))
if __name__ == "__main__":
    for kind in ("fork", "spawn"):
        with multiprocessing.get_context(kind).Pool(1) as pool:
            print(kind, pool.apply(model.f))
"""


@pytest.mark.parametrize("mode", ["UNCHECKED_HASH", "TIMESTAMP"])
def test_what_runs_is_the_text_that_was_hashed(mode: str, tmp_path: Path) -> None:
    """Bytecode that Python would run instead, as it says that nobody is to check it, or bears size and time of the source.

    In the folder, in a package, outside, in a file that is loaded by its path, and in processes that are forked or
    spawned; the environment's own bytecode is used.
    """
    cheat, honest = CHEAT, CHEAT.replace("bytecode", "sourceee").replace("2", "1")
    root, lib = tmp_path / "exp", tmp_path / "lib"
    places = [root / "model.py", root / "parts" / "layer.py", lib / "lib_module.py", lib / "by_path.py"]
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(cheat)
        os.utime(path, (1e9, 1e9))
        py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode[mode])
        path.write_text(honest)
        os.utime(path, (1e9, 1e9))
    script = tmp_path / "look.py"
    script.write_text(LOOK.format(root=str(root), by_path=str(places[3])))
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{lib}"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    loaded = "sourceee sourceee sourceee sourceee True"  # once more in the child that is spawned
    assert done.stdout.splitlines() == [loaded, "fork 1", loaded, "spawn 1"]
    plain = "import model; print(model.VALUE)"
    done = subprocess.run([sys.executable, "-c", plain], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "bytecode\n"  # which is why


def test_a_module_that_was_edited_since_it_was_imported_is_found(tmp_path: Path) -> None:
    """In a notebook: its functions are then those of the old text, and the run would bear the name of the new one."""
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import model, other
from pathlib import Path
from labtrain.record.sources import read_code, stale_modules
def stale():
    return stale_modules(read_code(Path({str(tmp_path)!r}), {CONFIG!r}))
print(stale())
Path(model.__file__).write_text("class A:\\n    @property\\n    def f(self): return 2\\n")
print(stale())
"""
    write(tmp_path, model="class A:\n    @property\n    def f(self): return 1\n", other="def g(): return lambda: 3\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['model']"]


def test_the_doctor_fails_on_a_copy_that_shadows(tmp_path: Path) -> None:
    """Without a .dist-info: the versions are those of the lock."""
    lib = package(tmp_path / "lib", "torchmetrics")
    code = "from labtrain.environment.doctor.environment import check_strays; print(next(check_strays()))"
    for path, expected in ((lib, "failed"), (package(tmp_path / "other", "labutils"), "ok")):
        environment = {**os.environ, "PYTHONPATH": str(path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert f"status='{expected}'" in done.stdout
        assert ("torchmetrics from it shadows" in done.stdout) == (expected == "failed")


@pytest.mark.parametrize(("mode", "says"), [("strict", "error: "), ("warn", "warning: "), ("off", "")])
def test_a_module_in_no_digest_is_refused_after_the_first_step(
    mode: str, says: str, runner: Any, tmp_path: Path
) -> None:
    """Loaded from its file, as configuration by Python files is; and said in warn, once."""
    from tests.support.exact import configure

    (tmp_path / "elsewhere.py").write_text("SCALE = 1.0\n")
    config = configure("mlp", trainer={"max_epochs": 1})
    config["determinism"]["mode"] = mode
    config["model"] = {"_target_": "tests.support.names_models.LoadsByPath", "file": str(tmp_path / "elsewhere.py")}
    runner.run(config, code=2 if mode == "strict" else 0)
    said = (
        f"elsewhere was imported from {tmp_path}/elsewhere.py: it is neither in the environment nor in the run's name"
    )
    assert runner.said().count(said) == (mode != "off")
    assert f"{says}{said}" in runner.said() or mode == "off"
    if mode == "strict":
        assert f"hint: put {tmp_path}/elsewhere.py into {tmp_path}/none and import it by its name" in runner.said()
        [trail] = (tmp_path / "runs").rglob("trail.jsonl")
        assert len(trail.read_text().splitlines()) <= 1


@pytest.mark.parametrize("who", ["a later step", "a worker"])
def test_code_that_is_run_later_or_elsewhere_is_refused(who: str, runner: Any, tmp_path: Path) -> None:
    """Without a module that would show it: in the fourth step, or in a process that loads samples."""
    from tests.support.exact import configure

    (tmp_path / "elsewhere.py").write_text("SCALE = 1.0\n")
    config = configure("mlp", "even", "32-true", 1 if who == "a worker" else 0, trainer={"max_epochs": 2})
    if who == "a worker":
        config["data"] |= {"_target_": "tests.support.names_models.ExecutingData", "file": f"{tmp_path}/elsewhere.py"}
    else:
        config["model"] = {"_target_": "tests.support.names_models.ExecutesLate", "file": f"{tmp_path}/elsewhere.py"}
    runner.run(config, code=2)
    assert f"error: elsewhere was imported from {tmp_path}/elsewhere.py: it is neither in the env" in runner.said()


def test_a_class_of_a_notebooks_cell_is_refused(tmp_path: Path) -> None:
    """Its code is in no file: defined anew, it came to the old result under the same run id."""
    code = """
import labtrain
from tests.support.exact import configure
from tests.support.names_models import Tiny
class Net(Tiny):
    pass
config = configure("mlp")
config["model"] = {"_target_": "__main__.Net"}
config["paths"] = {"runs": "runs"}
labtrain.train(config)
"""
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "labtrain.base.errors.ConfigError: __main__.Net is defined in the notebook" in done.stderr
    assert "_target_: own.Net" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_hint_for_a_folder_that_came_too_late_into_the_path_works(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """model.py itself changes sys.path: an import stands there already, and PYTHONPATH is what helps."""
    lib = write(tmp_path / "lib", insmod="SCALE = 1.0\n")
    write(root, model=f"import sys\nsys.path.insert(0, {str(lib)!r})\nimport insmod\n")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code, there = read(root), set(sys.modules)
    monkeypatch.syspath_prepend(str(lib))
    monkeypatch.setitem(sys.modules, "insmod", importlib.import_module("insmod"))
    [(name, (_, hint))] = unnamed(code, there, root)
    assert (name, hint.partition(" python train.py;")[0]) == ("insmod", f"PYTHONPATH={lib}")
    assert not list(unnamed(read(root, lib), there, root))


@pytest.mark.parametrize(
    ("name", "file", "found"),
    [
        ("cuda_utils", "/cache/triton/ABC/cuda_utils.so", False),  # triton's launcher, an extension of one phase
        ("torch._inductor.codecache.c1", "/elsewhere/c1.py", False),  # a library wrote it, and named it as its own
        ("c1", "/elsewhere/c1.so", True),
        ("nowhere", None, False),
    ],
)
def test_what_the_environments_compilers_wrote_is_the_environments(
    name: str, file: str | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache/triton")
    assert torch.__file__.startswith(sources.environment_folders())
    before = set(sys.modules)
    module = types.ModuleType(name)
    module.__file__ = file
    monkeypatch.setitem(sys.modules, name, module)
    nothing = Code(sources={}, outside={}, shadows=[], files={})
    assert sources.unnamed_modules(nothing, before) == ([(name, file)] if found else [])


def test_a_start_says_what_shadows_and_the_receipt_names_it(runner: Any, tmp_path: Path) -> None:
    """Here a module of the experiment's own folder, which Python looks into first."""
    from labtrain.record import receipt
    from tests.support.exact import configure

    write(tmp_path / "none", antigravity="")
    config = configure("mlp", trainer={"max_epochs": 1})
    config["model"] = {"_target_": "tests.support.names_models.Tiny"}
    run_dir = runner.run(config)
    assert runner.said().count("warning: these modules hide the environment's: antigravity") == 1
    found = receipt.read(run_dir)
    assert found is not None
    assert found["code"]["shadows"] == ["antigravity"]
    assert "tests/support/names_models.py" in found["code"]["outside"]
    receipt.hold_against_schema(found, run_dir)


def test_compiling_from_source_begins_after_the_environment_is_known() -> None:
    """Python 3.13's sysconfig cannot be asked from an import that itself makes: no training started there."""
    code = "from labtrain.record import sources; sources.load_from_source(); print(sources.environment_folders.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
