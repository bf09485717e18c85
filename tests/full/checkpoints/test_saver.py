"""Crashes in a delivery: more of tests/real/checkpoints/test_saver.py."""

from pathlib import Path

import pytest

from tests.support.saver import Torn, judge, saves_in_a_child


@pytest.mark.parametrize("url", ["s3", "sftp"], indirect=True)
def test_a_crash_in_a_delivery(url: str, tmp_path: Path) -> None:
    """Between any two changes of the spool or the store, and with half a file uploaded."""
    number = 0
    while True:
        number += 1
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        place = f"{url}/{number}"

        def arm(at: int = number) -> None:
            Torn.left = at

        durable = saves_in_a_child(run_dir, place, arm=arm, remote=True)
        if not durable:
            break
        judge(run_dir, place, durable)
    assert number > 20
