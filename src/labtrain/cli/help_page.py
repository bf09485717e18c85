"""The layout of help pages: commands in sections, each with its full summary, and one example at the end."""

from typing import Any

import click


class _WithExample(click.Command):
    """Ends its help page with an example.

    Args:
        example: a line to type.
    """

    def __init__(self, name: str | None, *, example: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        with formatter.section("Example"):
            formatter.write_text(self.example)


class Command(_WithExample):
    """A command with an example."""


class Group(_WithExample, click.Group):
    """A group with an example, whose commands are listed in sections.

    click shortens a long summary with "..." (https://github.com/pallets/click, `make_default_short_help`). Here each
    summary is the first line of the command's docstring, in full.
    """

    def __init__(self, name: str | None, **options: Any) -> None:
        super().__init__(name, **options)
        self.sections: dict[str, list[click.Command]] = {}

    def add_section(self, heading: str, *commands: click.Command) -> None:
        """Add commands, listed in this order below a heading."""
        for command in commands:
            self.add_command(command)
        self.sections[heading] = list(commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for heading, commands in (self.sections or {"Commands": list(self.commands.values())}).items():
            with formatter.section(heading):
                formatter.write_dl(
                    [(f"{command.name:<{width}}", summary_of(command)) for command in commands if not command.hidden]
                )


def summary_of(command: click.Command) -> str:
    """Return the first line of a command's help, without its full stop."""
    return (command.help or "").partition("\n")[0].removesuffix(".")
