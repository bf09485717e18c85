"""Every moment of tests/real/stores/test_two_writers.py."""

from pathlib import Path

import pytest

from tests.support.writers import Stopped, walk


@pytest.mark.parametrize("ends", [True, False], ids=["ended", "alive"])
@pytest.mark.parametrize("url", ["local", "sftp", "s3", "memory"], indirect=True)
def test_a_process_that_wakes_up_too_late_harms_nothing(url: str, ends: bool, tmp_path: Path) -> None:
    """Before each of its changes: what the other has, or goes on to make, is whole."""
    kind = {} if url.startswith("memory") else {"kind": Stopped}
    assert walk(tmp_path, lambda number: f"{url}/{number}", ends=ends, **kind) > 15  # type: ignore[arg-type]
