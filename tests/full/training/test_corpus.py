"""Each program of tests/corpus is trained as docs/reference/corpus.md says."""

from dataclasses import asdict
from pathlib import Path

import pytest

from tests.support.corpus import examine, programs, read_results


@pytest.mark.parametrize("program", programs())
def test_a_program_is_trained_as_the_page_says(program: str, tmp_path: Path) -> None:
    """On one device, on two, killed and moved; and against plain Lightning. If it changed: `make corpus`."""
    recorded, found = read_results()[program], asdict(examine(program, tmp_path))
    if recorded["verdict"] == "different":  # whether a kill changes its results depends on which save was complete
        assert found["verdict"] in ("different", "unchanged")
    else:
        assert found == recorded
