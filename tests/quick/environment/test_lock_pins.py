from pathlib import Path

import pytest

from labtrain.base.errors import DamagedError
from labtrain.environment.lock import read_lock
from tests.conftest import ROOT

A, B, C = "a" * 64, "b" * 64, "c" * 64
TWO = f"""\
# a comment
A.b_C==1.0 ; python_full_version >= '3' \\
    --hash=sha256:{A} \\
    --hash=sha256:{B}
    # via x
never==2.0 ; sys_platform == 'win32' \\
    --hash=sha256:{C}
"""


def test_pins_apply_by_their_markers_and_go_by_normalised_names(tmp_path: Path) -> None:
    (tmp_path / "r.lock").write_text(TWO)
    pins = read_lock(tmp_path / "r.lock")
    assert list(pins) == ["a-b-c"]
    assert (pins["a-b-c"].version, pins["a-b-c"].hashes) == ("1.0", (A, B))


@pytest.mark.parametrize(
    "line",
    [
        "a==1.0",
        "a>=1.0 --hash=sha256:aa",
        "-e .",
        "--index-url x",
        "a @ file:///x --hash=sha256:aa",
        "a==1.0 --hash=sha256:abc",
    ],
)
def test_a_line_that_is_no_pin_with_a_hash_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "r.lock").write_text(line + "\n")
    with pytest.raises(DamagedError, match="not a pin with hashes"):
        read_lock(tmp_path / "r.lock")


def test_a_lock_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="No such file"):
        read_lock(tmp_path / "r.lock")


def test_the_lock_pins_what_the_design_names() -> None:
    pins = read_lock(ROOT / "requirements.lock")
    exact = {
        "torch": "2.9.1",
        "nvidia-cuda-runtime-cu12": "12.8.",
        "nvidia-cudnn-cu12": "9.10.",
        "nvidia-nccl-cu12": "2.27.",
    }
    for name, version in {**exact, "lightning": "2.6.", "hydra-core": "1.3.", "omegaconf": "2.3."}.items():
        assert pins[name].version.startswith(version)
    assert {"cookiecutter", "wandb", "tensorboard", "s3fs", "paramiko", "jupyterlab", "pandas", "uv", "pip"} <= set(
        pins
    )


def test_the_lock_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "--index" not in text
