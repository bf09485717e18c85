"""What somebody else may have written, damaged at random: no traceback, no harm, no code run."""

from pathlib import Path

import pytest

from tests.conftest import need
from tests.support.mutation import World, commands, judge, typed

MUTATIONS = 300


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A run, and a home of its own."""
    need("ssh-keygen", "openssh-client")
    made = World(tmp_path / "world")
    monkeypatch.setenv("HOME", str(made.root / "home"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("TMPDIR", str(made.out))
    for name in ("SSH_AUTH_SOCK", "DISPLAY", "SSH_ASKPASS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(made.lab)
    return made


def test_whole_runs_are_read(world: World) -> None:
    """Every command does its work where nothing is damaged, so a damage is what it stops at."""
    for name, command in commands(world).items():
        world.fresh()
        if not name.startswith("verify"):
            command()
    world.fresh()
    for line in typed("ls", str(world.lab / "runs")).splitlines()[1:]:
        assert "complete" in line
    assert world.listing() == world.before


def test_a_damaged_run_harms_nobody(world: World) -> None:
    """Each of 300 damages is told in one error: nothing else is written, nothing is run, nothing hangs."""
    wrong = [text for seed in range(MUTATIONS) for text in judge(world, seed, quick=3, slow=0.02)]
    assert not wrong, f"{len(wrong)} of {MUTATIONS}\n" + "\n\n".join(wrong[:10])
