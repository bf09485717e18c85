"""labtrain's core as people install it: the wheel alone, without the extra `train`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from labtrain.project.carried import build_wheel
from tests.conftest import LABTRAIN
from tests.support.old import RUNS, unpack
from tests.support.template import run

UV = str(Path(LABTRAIN).with_name("uv"))


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with labtrain's wheel and the packages that it requires."""
    folder = tmp_path_factory.mktemp("core")
    wheel = build_wheel(folder)
    for command in (["venv", "-q", "--no-config", "--python", sys.executable, "env"],
                    ["pip", "install", "-q", "--python", "env/bin/python", str(wheel)]):  # fmt: skip
        done = run(UV, *command, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder / "env"


def labtrain(core: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {"HOME": str(cwd), "PYTHONPATH": "", "PATH": f"{core}/bin:{os.environ['PATH']}"}
    return run("labtrain", *words, cwd=cwd, env=clean)


def test_the_core_is_small(core: Path) -> None:
    """Forty packages at most, none of them torch or a part of CUDA, and under 200 MB."""
    packages = {path.name.partition("-")[0].lower() for path in core.glob("lib/*/site-packages/*.dist-info")}
    assert len(packages) <= 40
    assert not packages & {"torch", "lightning", "numpy", "triton"}
    assert sum(path.lstat().st_size for path in core.rglob("*") if path.is_file()) < 200e6


def test_it_makes_and_reads_experiments(core: Path, tmp_path: Path) -> None:
    """An old experiment, and a new one with the wheel that this core was installed from."""
    old = unpack(tmp_path)
    for words, code, says in (
        (["ls"], 0, "digits/4588a0f6eb85  complete"),
        (["digest", RUNS[0]], 0, "67fb0332a6e42b83"),
        (["diff", RUNS[0], RUNS[0]], 0, ""),
        (["lock", "check"], 0, "all locks agree"),
        (["verify", RUNS[1], "--steps", "0"], 1, "of them are missing here\n"),
        (["doctor", "--fast"], 1, "failed"),
    ):
        done = labtrain(core, *words, cwd=old)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        assert says in done.stdout
    done = labtrain(core, "new", "vit-small", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "next: cd vit-small && make train\n"
    packed = next((tmp_path / "vit-small/vendor").glob("*.whl"))
    assert packed.read_bytes() == (core.parent / packed.name).read_bytes()


def test_what_trains_says_what_installs_it(core: Path, tmp_path: Path) -> None:
    """In an experiment `make setup`; elsewhere the extra, from where this labtrain came."""
    old = unpack(tmp_path)
    done = run(str(core / "bin/python"), "train.py", cwd=old)
    assert done.returncode == 2
    assert "error: python train.py needs torch, which is not installed" in done.stderr
    assert "hint: make setup && .venv/bin/python train.py\n" in done.stderr
    done = labtrain(core, "report", str(old / "runs/digits" / RUNS[0]), "-o", "x.html", cwd=tmp_path)
    assert done.returncode == 2
    wheel = next(core.parent.glob("*.whl"))
    assert f"hint: uvx --from 'labtrain[train] @ {wheel.as_uri()}' labtrain report" in done.stderr


def test_uvx_makes_an_experiment(core: Path, tmp_path: Path) -> None:
    """`uvx --from WHEEL labtrain new`, with an empty home."""
    wheel = next(core.parent.glob("*.whl"))
    home = {"HOME": str(tmp_path / "home"), "UV_TOOL_DIR": str(tmp_path / "tools"), "PYTHONPATH": ""}
    done = run(UV, "tool", "run", "--python", sys.executable, "--from", str(wheel), "labtrain", "new", "vit-small",
               cwd=tmp_path, env=home)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert next((tmp_path / "vit-small/vendor").glob("*.whl")).read_bytes() == wheel.read_bytes()
