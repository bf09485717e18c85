"""The flake, built for real by Debian's Nix, with tests/nix/flake.nix in place of nixpkgs.

nix/wheels.json is for CPython 3.12; a host may have another. So the builds here read a wheels.json made from the files
that pip downloads, by the hashes of requirements.lock, for the Python that runs the tests; where such a file is the
locked one as well (the sdist, pure Python, or a host with 3.12), its entry must be that of nix/wheels.json.
"""

import base64
import csv
import hashlib
import json
import os
import re
import shutil
import sysconfig
import zipfile
from pathlib import Path

import pytest

from labtrain import __version__
from tests.conftest import ROOT, Experiment
from tests.support.nix import SYSTEM, Entry, Nix

pytest_plugins = ["tests.support.nix"]


def test_the_flake_has_one_input_which_its_lock_pins(nix: Nix, repository: Path) -> None:
    """Nothing is fetched for this: the lock is whole."""
    nodes = json.loads(nix("flake", "metadata", "--json", cwd=repository, stub=False))["locks"]["nodes"]
    assert set(nodes) == {"root", "nixpkgs"}
    assert nodes["nixpkgs"]["original"] == {"type": "github", "owner": "NixOS", "repo": "nixpkgs", "ref": "nixos-25.11"}
    assert re.fullmatch("[0-9a-f]{40}", nodes["nixpkgs"]["locked"]["rev"])
    assert nodes["nixpkgs"]["locked"]["narHash"].startswith("sha256-")


def test_what_is_built_here_is_what_the_repository_locks(small: list[Entry]) -> None:
    locked = {one["name"]: one for one in json.loads((ROOT / "nix/wheels.json").read_text())}
    ours = sysconfig.get_python_version() == "3.12"
    same = [one for one in small if ours or one["format"] == "sdist" or one["abi"] == "none"]
    assert len(same) >= 10
    for one in same:
        assert {"build": None, **locked[one["name"]]} == {"build": None, **one}


def test_the_outputs(nix: Nix, repository: Path, small: list[Entry]) -> None:
    shown = json.loads(nix("flake", "show", "--json", cwd=repository))
    assert {kind: set(shown[kind][SYSTEM]) for kind in ("packages", "apps", "devShells", "checks")} == {
        "packages": {"default", "env", "env-small", "image"},
        "apps": {"labtrain"},
        "devShells": {"default", "small"},
        "checks": {"env", "env-small"},
    }
    assert shown["formatter"][SYSTEM]["type"] == "derivation"


def test_the_environment_holds_the_wheels_byte_for_byte(nix: Nix, repository: Path, small: list[Entry]) -> None:
    """The sdist and labtrain are built, and all is installed, by what the lock names."""
    nix("build", ".#env-small", "--out-link", str(nix.folder / "small"), cwd=repository)
    env = nix.folder / "small"
    site = next(env.glob("lib/python3*/site-packages"))
    wheels = [one for one in nix.wheels.iterdir() if one.suffix == ".whl"]
    installed = {info.name.split("-")[0] for info in site.glob("*.dist-info")}
    assert {"labtrain", "antlr4_python3_runtime", "hydra_core"} <= installed
    assert len(installed) >= 12
    compared = 0
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            if wheel.name.split("-")[0] not in installed:
                continue  # it only builds
            for member in archive.infolist():
                if member.is_dir() or ".data/" in member.filename or member.filename.endswith("/RECORD"):
                    continue  # what installing moves or writes
                assert (site / member.filename).read_bytes() == archive.read(member), member.filename
                compared += 1
    assert compared > 500
    for record in site.glob("*.dist-info/RECORD"):
        for name, hashed, _ in csv.reader(record.read_text().splitlines()):
            if hashed:
                digest = base64.urlsafe_b64encode(hashlib.sha256((site / name).read_bytes()).digest())
                assert hashed == "sha256=" + digest.decode().rstrip("="), name
    for file in (ROOT / "src/labtrain").rglob("*.py"):
        assert (site / "labtrain" / file.relative_to(ROOT / "src/labtrain")).read_bytes() == file.read_bytes()
    assert [*site.rglob("__pycache__/*.pyc")], "the store cannot be written later"


def test_built_again_it_is_the_same(nix: Nix, repository: Path, small: list[Entry]) -> None:
    """Nix compares the two builds bit by bit: scripts, byte code and all."""
    nix("build", ".#env-small", "--no-link", cwd=repository)
    nix("build", ".#env-small", "--no-link", "--rebuild", cwd=repository)


def test_a_shell_and_its_python(nix: Nix, repository: Path, small: list[Entry]) -> None:
    """The antlr4 built from source parses, and extensions in C load."""
    develop = ("develop", ".#small", "-c")
    assert __version__ in nix(*develop, "labtrain", "--version", cwd=repository)
    code = (
        "import os, hydra, safetensors, xxhash, yaml\n"
        "from hydra.core.override_parser.overrides_parser import OverridesParser\n"
        "print(OverridesParser.create().parse_override('a.b=[1,x]').value(), os.environ['TRITON_LIBCUDA_PATH'])"
    )
    value, _, driver = nix(*develop, "python", "-c", code, cwd=repository).strip().rpartition(" ")
    assert value == "[1, 'x']"
    assert Path(driver) in (Path("/run/opengl-driver/lib"), nix.folder / "cache/labtrain/driver")


def test_the_same_flake_in_an_experiment_takes_the_wheel_in_vendor(
    nix: Nix, own_experiment: Experiment, small: list[Entry]
) -> None:
    root = own_experiment.root
    for name in ("flake.nix", "flake.lock", "nix/env.nix"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    (root / "nix/wheels.json").write_text(json.dumps(small))
    (root / "vendor").rename(root / "hidden")
    nix.git(root)
    with pytest.raises(AssertionError, match="hint: git add vendor"):
        nix("eval", ".#packages.x86_64-linux.env.drvPath", cwd=root)
    (root / "hidden").rename(root / "vendor")
    nix.git(root)
    nix("flake", "check", cwd=root)  # evaluates each output and builds the checks
    assert __version__ in nix("run", ".#labtrain", "--", "--version", cwd=root)
    nix("build", ".#env", "--out-link", str(nix.folder / "experiment"), cwd=root)
    site = next((nix.folder / "experiment").glob("lib/python3*/site-packages"))
    (wheel,) = (root / "vendor").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(("/RECORD", "/")):
                assert (site / name).read_bytes() == archive.read(name), name
    wheel.write_bytes(wheel.read_bytes() + b"x")
    nix.git(root)
    with pytest.raises(AssertionError, match=r"is not the one in labtrain\.lock"):
        nix("eval", ".#packages.x86_64-linux.env.drvPath", cwd=root)


def test_its_image_is_configured_as_the_containerfiles(nix: Nix, repository: Path, small: list[Entry]) -> None:
    """The same entry, user, folders and variables; layers are nixpkgs' own work, which the stand-in does not do."""
    nix("build", ".#image", "--out-link", str(nix.folder / "image"), cwd=repository)
    image = nix.folder / "image"
    config = json.loads((image / "config.json").read_text())
    text = (ROOT / "containers/Containerfile").read_text().replace("\\\n", " ")
    said = dict(
        line.split(maxsplit=1) for line in text.partition("\nFROM ${BASE}\n")[2].splitlines() if line[:1].isupper()
    )
    assert config["Entrypoint"] == json.loads(said["ENTRYPOINT"])
    assert config["WorkingDir"] == said["WORKDIR"]
    assert set(config["ExposedPorts"]) == {f"{port}/tcp" for port in said["EXPOSE"].split()}
    assert {f"USER_ID={config['User']}", "${USER_ID}"} == {said["ARG"], said["USER"]}
    ours, theirs = (
        dict(one.split("=", 1) for one in config["Env"]),
        dict(one.split("=", 1) for one in said["ENV"].split()),
    )
    assert {**ours, "PATH": ""}.items() >= {**theirs, "PATH": ""}.items()
    modes = dict(line.rsplit(" ", 1) for line in (image / "modes.txt").read_text().splitlines())
    assert modes["tmp"] == modes["lab"] == "1777"
    assert {"experiment", "data"} <= set(modes)
    assert "lab:x:1000:1000:" in (image / "root/etc/passwd").read_text()
    start = image / "root/opt/labtrain/containers/start.sh"
    path = f"{ours['PATH']}:{os.environ['PATH']}"
    assert ours["PATH"].startswith("/nix/store/")
    command = ["env", f"PATH={path}", f"HOME={nix.folder}", "sh", str(start), "labtrain", "--version"]
    assert __version__ in nix.run(*command, cwd=nix.folder)
