"""Commands about settings: show, schema, list and copy; `init` writes a file to start from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from orchestrator.cli.app import app
from orchestrator.cli.completion import complete_settings_files
from orchestrator.cli.help import Application
from orchestrator.cli.json_output import JsonOption, print_json
from orchestrator.cli.option_values import read_options
from orchestrator.cli.options import MAX_COUNT, SetOption
from orchestrator.terminal.layout import print_line
from orchestrator.terminal.tables import plain_table
from orchestrator.workspace.errors import UserError

ForceOption = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]
Size = Literal["tiny", "55m", "340m"]

config = Application(no_args_is_help=True, help="Show the settings, their schema, shipped sweeps.")
app.add_typer(config, name="config", rich_help_panel="Settings")


@config.command("show")
def show_settings(
    file: Annotated[
        str | None,
        typer.Argument(
            help="A YAML file, or a shipped sweep (default: the defaults).",
            autocompletion=complete_settings_files,
        ),
    ] = None,
    set_: SetOption = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only what differs from the defaults.")
    ] = False,
) -> None:
    """Print the resolved settings as YAML; what differs from its default is marked.

    Example: iiet-orch config show demo --changed
    """
    from orchestrator.settings.rendering import marked_yaml

    typer.echo(marked_yaml(read_options(file, set_), only_changed=changed), nl=False)


@config.command("schema")
def show_schema() -> None:
    """Print the JSON schema of the settings, for editors.

    Example: iiet-orch config schema
    """
    from orchestrator.settings import Settings

    print_json(Settings.model_json_schema())


@config.command("list")
def list_sweeps(as_json: JsonOption = False) -> None:
    """List the shipped sweeps.

    Example: iiet-orch config list
    """
    from orchestrator.settings.shipped import shipped_sweeps

    rows = []
    for name, path in shipped_sweeps().items():
        with path.open(encoding="utf-8") as file:
            rows.append((name, file.readline().removeprefix("# ").strip()))
    if as_json:
        print_json({"sweeps": [{"name": name, "text": text} for name, text in rows]})
        return
    Console(highlight=False).print(plain_table(("name", "what it does"), rows))


@config.command("copy")
def copy_sweep(
    name: Annotated[
        str,
        typer.Argument(
            help="A shipped sweep; `config list` names them.",
            autocompletion=complete_settings_files,
        ),
    ],
    to: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="File to write (default: NAME.yaml).")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Copy a shipped sweep to a file, to change it.

    Example: iiet-orch config copy toy my-sweep.yaml
    """
    from orchestrator.pipelines.training import write_new_file
    from orchestrator.settings.shipped import find_settings_file, shipped_sweeps

    source = shipped_sweeps().get(name) or find_settings_file(name)
    to = to or Path(f"{source.stem}.yaml")
    write_new_file(to, source.read_text(encoding="utf-8"), replace=force)
    print_line(Console(), f"written: {to}\nnext: iiet-orch sweep {to} --dry-run")


@app.command(rich_help_panel="Settings")
def init(
    file: Annotated[Path, typer.Argument(help="File to write.")] = Path("my-sweep.yaml"),
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Your text: a file, folder or pattern; may be repeated."),
    ] = None,
    hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="A data set of the hub instead.")
    ] = None,
    size: Annotated[Size | None, typer.Option(help="Size of the model (default: tiny).")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="train, the path of a tokenizer.json, or hub:NAME.")
    ] = "train",
    steps: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Optimizer steps of the teacher.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, max=MAX_COUNT, help="GPUs to use.")] = None,
    force: ForceOption = False,
) -> None:
    """Write a commented settings file for your own data and size; asks for what is missing.

    Example: iiet-orch init my-sweep.yaml --data my-texts/ --size tiny
    """
    if not data and not hub:
        if not sys.stdin.isatty():
            raise UserError("name your text with --data PATH, or a data set with --hub NAME")
        data = [typer.prompt("Your text (a file, folder or pattern)")]
        size = size or typer.prompt("Size: tiny, 55m or 340m", default="tiny")
    if data and hub:
        raise UserError("--data and --hub name two sources; leave one out")
    from orchestrator.pipelines.training import write_starting_file
    from orchestrator.settings.starting import SIZES, starting_settings

    if size and size not in SIZES:
        raise UserError(f"the size is one of {', '.join(SIZES)}; got {size!r}")
    settings = starting_settings(
        size or "tiny", files=data or (), hub_name=hub, tokenizer=tokenizer, steps=steps, gpus=gpus
    )
    write_starting_file(settings, file, replace=force)
    print_line(Console(), f"written: {file}\nnext: iiet-orch sweep {file} --dry-run")
