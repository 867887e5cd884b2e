"""The application that Typer runs: the registered commands in their panels, and what all take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from orchestrator.cli.command import COMMANDS
from orchestrator.workspace.provenance import installed_version

NO_COLOR = "--no-color"


def build_app(word: str | None = None) -> typer.Typer:
    """Return the application; given a word, other commands than this have their names alone.

    To import the settings and to inspect the options of all commands would take longer than most
    commands do.
    """
    options: dict[str, Any] = {
        "no_args_is_help": True,
        "pretty_exceptions_enable": False,
        "rich_markup_mode": "rich",
        "context_settings": {"help_option_names": ["-h", "--help"]},
    }
    app = typer.Typer(
        name="iiet-orch",
        help="Pretrain, sweep and distill iterative Transformers; show accuracy against cost.",
        **options,
    )
    app.callback()(_options_of_all)
    config = typer.Typer(help="Show the settings, their schema, shipped sweeps.", **options)
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        is_built = word is None or word in (name, group)
        (config if group else app).command(
            last,
            rich_help_panel=None if group else command.group,
            context_settings=command.context_settings,
        )(command.build() if is_built else _named(command.text))
    app.add_typer(config, name="config", rich_help_panel="Settings")
    return app


def _named(text: str) -> Any:
    def command() -> None:
        raise AssertionError("only the command that is called is built")

    command.__doc__ = text
    return command


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"iiet-orch {installed_version('iiet-orch')}")
        raise typer.Exit


def _options_of_all(
    _version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version."),
    ] = False,
    _no_color: Annotated[
        bool, typer.Option(NO_COLOR, help="Print no colours; so does NO_COLOR=1.")
    ] = False,
) -> None:
    pass
