import random
import re
from pathlib import Path
from typing import Any, cast

import pytest
from packaging.markers import Marker
from pip._internal.exceptions import PipError
from pip._internal.req.constructors import install_req_from_parsed_requirement
from pip._internal.req.req_file import parse_requirements

from labtrain.base.errors import DamagedError
from labtrain.environment.lock import read_lock
from labtrain.environment.lock.pins import parse_pins
from labtrain.record.provenance import normalised
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
        f"a==1.* --hash=sha256:{A}",
        f"a[x]==1.0 --hash=sha256:{A}",
        f"a==1.0 --hash sha256:{A}",
        f"a==1.0 --hash=sha512:{A}{A}",
        f"a==1.0 --hash=sha256:{A} --config-settings=x=1",
        f"a==1.0 \\\n# a comment ends the continuation\n    --hash=sha256:{A}",
        f"a==1.0 ; sys_platform != '${{HOME}}' --hash=sha256:{A}",
    ],
)
def test_a_line_that_is_no_pin_with_a_hash_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "r.lock").write_text(line + "\n")
    with pytest.raises(DamagedError, match="not a pin with hashes"):
        read_lock(tmp_path / "r.lock")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"a==1..x --hash=sha256:{A}\n", "a==1..x: Invalid version: '1..x'"),
        (f"a==1 ; sys_platfxrm == 'linux' --hash=sha256:{A}\n", "a==1 ; sys_platfxrm == 'linux': Expected a marker"),
        (f"a==1 ; --hash=sha256:{A}\n", "a==1 ; : Expected a marker"),
        (f"a==1 ; sys_platform ~= 'x' --hash=sha256:{A}\n", "a==1 ; sys_platform ~= 'x': Undefined"),
        (f"a==1 --hash=sha256:{A}\nA==1 --hash=sha256:{B}\n", "a==1 is pinned twice"),
        (f"a==1 --hash=sha256:{A}\n#\n  a==2 --hash=sha256:{B}\n", "a is pinned as 1 and as 2"),
        (f"\n# coding: utf-7\na==1 --hash=sha256:{A}\n", "must be UTF-8"),
        (f"a==1 --hash=sha256:{A}\n\udcff", "byte 0xff in line 2 is not UTF-8"),
    ],
)
def test_a_damaged_pin_is_named_with_its_remedy(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.lock").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DamagedError) as raised:
        read_lock(tmp_path / "r.lock")
    assert str(raised.value).startswith(f"{tmp_path / 'r.lock'}: {says}")
    assert raised.value.hint == "git checkout r.lock"


Pins = list[tuple[str, str, str, list[str]]]


def by_pip(path: Path) -> Pins:
    """Read a lock with pip's own parser."""
    found = []
    for parsed in parse_requirements(str(path), session=cast(Any, None)):
        requirement = install_req_from_parsed_requirement(parsed)
        assert requirement.req is not None
        marker = str(requirement.markers or "")
        hashes = requirement.hash_options.get("sha256", [])
        found.append((normalised(requirement.req.name), str(requirement.req.specifier), marker, hashes))
    return found


def by_labtrain(path: Path) -> Pins:
    text = path.read_bytes().decode()
    return [(pin.name, f"=={pin.version}", str(Marker(pin.marker)) if pin.marker else "", list(pin.hashes))
            for pin in parse_pins(text, path)]  # fmt: skip


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-conda.lock"])
def test_the_locks_are_read_as_pip_reads_them(name: str) -> None:
    assert by_labtrain(ROOT / name) == by_pip(ROOT / name) != []


def test_a_changed_lock_is_read_as_pip_reads_it_or_refused(tmp_path: Path) -> None:
    """Whatever characters are put in, taken out or exchanged: no pin is overlooked that pip would install."""
    drawn, path, read = random.Random(1), tmp_path / "r.lock", 0
    parts = [
        "#",
        "\\",
        " ",
        "\n",
        "\t",
        ";",
        "-",
        "\x0c",
        "\u2028",
        "\xa0",
        "\n#\n  ",
        " \\\n",
        f"x==1 --hash=sha256:{C}",
    ]
    for _ in range(1500):
        text = TWO
        for _ in range(drawn.randint(1, 3)):
            at = drawn.choice([found.start() for found in re.finditer(r"(?!aa|bb|cc)[^$]", text)])  # in no hash
            text = text[:at] + drawn.choice(["", *parts]) + text[at + drawn.randint(0, 1) :]
        path.write_bytes(text.encode())
        try:
            found = by_labtrain(path)
        except DamagedError:
            continue
        try:
            assert found == by_pip(path), repr(text)
        except PipError as error:
            pytest.fail(f"pip refuses {text!r}: {error}")
        read += 1
    assert read > 100


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
