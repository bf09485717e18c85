"""The results of tests/corpus are those of the programs that are there."""

import ast

import pytest

from tests.support.corpus import CORPUS, programs, read_results


def test_each_program_has_a_result() -> None:
    assert list(read_results()) == programs()


@pytest.mark.parametrize("program", programs())
def test_a_program_is_what_its_result_says(program: str) -> None:
    """Its docstring, and how many of its lines are for labtrain; an import of it counts with the line that uses it."""
    text, result = (CORPUS / f"{program}.py").read_text(), read_results()[program]
    tree = ast.parse(text)
    assert " ".join((ast.get_docstring(tree) or "").split()) == result["form"]
    changed = [line for line in text.splitlines() if "# labtrain:" in line and not line.startswith("import")]
    assert len(changed) == {"unchanged": 0, "one line": 1}.get(result["verdict"], len(changed))
    named = [line for line in text.splitlines() if "labtrain" in line]
    assert all("# labtrain:" in line for line in named)
