"""What must be true of the repository's files as a whole."""

import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

# Written so that this file does not name them.
REGISTRIES = [
    "python" + "hosted.org",
    "py" + "pi.org",
    "npm" + "js.org",
    "deb." + "deb" + "ian.org",
    "pytorch.org/" + "whl",
]


def grep(pattern: str) -> list[str]:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    command = ["git", "grep", "-lIE", pattern, "--", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        pytest.skip("not a git repository")
    return done.stdout.split()


@pytest.mark.parametrize("host", REGISTRIES)
def test_no_file_names_the_host_of_a_package_registry(host: str) -> None:
    """A lock pins bytes, not hosts: a lab behind a mirror installs the very same."""
    assert grep(re.escape(host)) == []


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    assert grep("/ho" + r"me/[a-z]+/|/Us" + r"ers/|/ro" + r"ot/\.") == []


def test_the_readme_and_the_design_name_the_commands_that_exist() -> None:
    from labtrain.cli import main

    text = (ROOT / "README.md").read_text()
    for command in main.commands:
        assert f"labtrain {command}" in text, command
