"""`make setup` repairs: each damage that the doctor finds, by the command that its hint names. On a small environment."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.setup import broken_pip, edited, repairs, without_python, without_record, without_stamp_and_uv

pytest_plugins = ["tests.support.setup"]


@pytest.mark.parametrize("damage", [edited, without_stamp_and_uv, broken_pip, without_record, without_python])
def test_setup_repairs_what_it_made(project: Path, damage: Callable[[Path], None]) -> None:
    repairs(project, damage)
