"""`--help` of every command: sections, whole summaries, and one example that parses."""

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from labtrain.cli import main
from labtrain.cli.help_page import Command, Group, summary_of

SECTIONS = {
    "Experiment": {"new", "update", "demo", "batch-size", "lr-find", "schema"},
    "Checkpoints": {"store"},
    "Environment": {"doctor", "lock", "upgrade", "completion"},
}


def commands(group: Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield `labtrain` and each command below it, with the words that name it."""
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


ALL = dict(commands())
each_command = pytest.mark.parametrize("path", ALL, ids=lambda path: "-".join(path) or "labtrain")


def help_of(path: tuple[str, ...]) -> str:
    done = CliRunner().invoke(main, [*path, "--help"], terminal_width=80, prog_name="labtrain")
    assert done.exit_code == 0
    return done.stdout


def test_every_command_is_in_one_section() -> None:
    found = {heading: {command.name for command in section} for heading, section in main.sections.items()}
    assert list(found) == ["Experiment", "Runs", "Checkpoints", "Environment"]
    assert found.pop("Runs") == set(main.commands).difference(*SECTIONS.values())
    assert found == SECTIONS
    text = help_of(())
    assert [text.index(f"\n{heading}:\n") for heading in main.sections] == sorted(
        text.index(f"\n{heading}:\n") for heading in main.sections
    )


@pytest.mark.parametrize("path", [path for path, command in ALL.items() if isinstance(command, Group)])
def test_no_summary_is_cut_off_or_wrapped(path: tuple[str, ...]) -> None:
    """Each command of a group is one line of at most 80 columns, which holds the first sentence of its help."""
    group = ALL[path]
    assert isinstance(group, Group)
    lines = help_of(path).splitlines()
    assert max(map(len, lines)) <= 80
    for name, command in group.commands.items():
        assert command.help is not None
        assert command.help.splitlines()[0].endswith("."), name
        assert any(re.fullmatch(rf"  {name} +{re.escape(summary_of(command))}", line) for line in lines), name


@each_command
def test_each_help_page_has_one_example_that_parses(path: tuple[str, ...]) -> None:
    """The example is a line of this very command, or of one below it, with arguments and options that exist."""
    *_, example = help_of(path).rpartition("\nExample:\n")
    assert help_of(path).count("Example:") == 1
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) == 1
    program, *words = shlex.split(lines[0])
    assert (program, *words[: len(path)]) == ("labtrain", *path)
    command: click.Command = main
    while isinstance(command, Group):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


@each_command
def test_every_option_says_what_it_does(path: tuple[str, ...]) -> None:
    command = ALL[path]
    assert isinstance(command, Command | Group)
    assert [each.name for each in command.params if isinstance(each, click.Option) and not each.help] == []
