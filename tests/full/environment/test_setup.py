"""`make setup` repairs: more of tests/real/environment/test_setup.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.setup import python_that_is_none, repairs, replaced, uninstalled, without_metadata

pytest_plugins = ["tests.support.setup"]


@pytest.mark.parametrize("damage", [replaced, without_metadata, uninstalled, python_that_is_none])
def test_setup_repairs_what_it_made(project: Path, damage: Callable[[Path], None]) -> None:
    repairs(project, damage)
