"""docs/reference is what docs/reference.py writes from the code."""

import importlib.util
import re
from types import ModuleType

import pytest

from tests.conftest import ROOT


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load()


@pytest.mark.parametrize(
    "name", ["configuration.md", "commands.md", "receipt.md", "corpus.md", "gpus.md", "gpu-checks.md"]
)
def test_a_page_says_what_the_code_says(name: str) -> None:
    """A changed key, command, option or field fails here until `make reference` writes the page."""
    assert (ROOT / "docs/reference" / name).read_text() == reference.pages()[name], "make reference"


def test_every_key_command_and_field_has_a_meaning() -> None:
    for name, text in reference.pages().items():
        begins = "| " if name == "gpus.md" else "| `"
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith(begins)]
        assert len(rows) > 10
        for first, *_, last in rows:
            assert last.strip("| ") != "", f"{name}: {first}"


def test_every_command_has_its_example() -> None:
    """That of its help page, once."""
    text = reference.pages()["commands.md"]
    sections = text.split("\n## ")[1:]
    assert len(sections) == len(list(reference._leaves(reference.labtrain, "labtrain")))
    for section in sections:
        assert len(re.findall(rf"^Example: `{section.splitlines()[0]}[ `]", section, re.MULTILINE)) == 1, section
