"""Help while typing: `labtrain schema` for editors, `labtrain completion` for shells."""

import importlib.util
from pathlib import Path

import click

from labtrain.base.console import say, shown, warn
from labtrain.cli import help_page


@click.command(cls=help_page.Command, example="labtrain schema")
def schema() -> None:
    """Write JSON Schemas of the configuration, for editors.

    Run it in an experiment, and again after a change of the classes that conf/ names. It imports these classes. The
    schemas in .vscode/labtrain/ complete and check conf/*.yaml: labtrain's keys, and the arguments of your classes.
    """
    from labtrain.launch.experiment import experiment_at
    from labtrain.project.schema import write_schemas

    written, problems = write_schemas(experiment_at(Path.cwd()))
    for path in written:
        say(shown(path))
    for problem in problems:
        warn(f"{problem}; its arguments are not checked")
    if problems and importlib.util.find_spec("torch") is None:
        click.echo("\nhint: make setup && .venv/bin/labtrain schema", err=True)


@click.command(cls=help_page.Command, example="labtrain completion bash")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell code that completes commands, options and run ids.

    Append it to ~/.bashrc or ~/.zshrc; for fish write it to ~/.config/fish/completions/labtrain.fish. For train.py,
    Hydra has its own: eval "$(python train.py -sc install=bash)".
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(click.get_current_context().find_root().command, {}, "labtrain", "_LABTRAIN_COMPLETE").source())
