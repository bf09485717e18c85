"""Other programs do not hang labtrain."""

import time

import pytest

from labtrain.base.errors import LabtrainError
from labtrain.base.programs import run_program


def test_a_program_that_hangs_is_ended_and_named() -> None:
    began = time.monotonic()
    with pytest.raises(LabtrainError, match=r"^tail -f /dev/null took longer than 1 s, .*\n\nhint: repeat it"):
        run_program(["tail", "-f", "/dev/null"], timeout_s=1, hint="repeat it")
    assert time.monotonic() - began < 30
