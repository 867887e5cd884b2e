"""Commands that show and clean a workspace, check the machine, and write settings files."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from orchestrator.cli.command import setting, shared_options
from orchestrator.cli.options import ALL_SETTINGS
from orchestrator.cli.session import Call
from orchestrator.settings.files import Size
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Kind, RemovableKind

if TYPE_CHECKING:
    from orchestrator.reporting.output import Output

app = typer.Typer()
config_app = typer.Typer(
    no_args_is_help=True, help="Write and show settings; list the shipped sweeps."
)


@app.command("ui", rich_help_panel="See results")
@shared_options(workspace="existing")
def ui(
    call: Call,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
    sync: Annotated[
        bool,
        typer.Option(
            "--sync",
            help="Publish everything in MLflow again, instead of starting it.",
        ),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="With --sync: delete the workspace's own store first.",
        ),
    ] = False,
) -> "Output | None":
    """Start MLflow on 127.0.0.1, and print links to its pages and to the newest sweep's page.

    Example: iiet-orch ui --port 5001
    """
    if sync:
        from orchestrator.pipelines import syncing

        call.workspace_use = "kept"
        return syncing.sync(replace=replace, **call.common)
    if replace or call.as_json:
        raise UserError(f"{'--replace' if replace else '--json'} is for --sync; add it")
    from orchestrator.pipelines.ui import serve
    from orchestrator.workspace.layout import open_workspace

    serve(open_workspace(call.session.workspace.root), port=port)
    return None


@app.command("list", rich_help_panel="Keep order")
@shared_options(workspace="existing")
def list_workspace(
    call: Call,
    kind: Annotated[
        Literal[Kind, "running"] | None,
        typer.Argument(
            metavar="KIND",
            help="runs, checkpoints, trials, sweeps, models (default: all but checkpoints), or "
            "running, what runs now with its progress, speed and time left.",
        ),
    ] = None,
) -> "Output":
    """List runs, trials, sweeps and the models in exports/, the newest first, or what runs now.

    Example: iiet-orch list running
    """
    from orchestrator.pipelines import upkeep

    space = call.session.workspace
    note = call.session.progress.note
    if kind == "running":
        return upkeep.show_status(space, note=note)
    return upkeep.list_workspace(space, kind, with_checkpoints=call.as_json, note=note)


@app.command("clean", rich_help_panel="Keep order")
@shared_options(workspace="existing", plans=True)
def clean(
    call: Call,
    kinds: Annotated[
        list[RemovableKind] | None,
        typer.Argument(
            metavar="KIND", help="temporary, ray, checkpoints or damaged (default: all)."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
) -> "Output | None":
    """Delete files that are no longer needed: lists them with sizes and reasons, then asks.

    Finished weights, evaluations, and files of running processes are never deleted.

    Example: iiet-orch clean checkpoints --dry-run
    """
    from orchestrator.pipelines import upkeep

    plan = upkeep.plan_clean(call.session.workspace, kinds or (), note=call.session.progress.note)
    if call.dry_run or not plan.found or (call.as_json and not yes):
        return plan
    if not call.as_json:
        call.show(plan)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(
                "nothing was deleted; --yes deletes without asking, --dry-run only lists"
            )
        if not typer.confirm(f"Delete all of this ({plan.size})?"):
            return None
    return upkeep.run_clean(plan, call.session.workspace)


@app.command("doctor", rich_help_panel="Start")
@shared_options(workspace="named")
def doctor(call: Call) -> "Output":
    """Check this machine and the workspace; name a remedy for what is broken.

    Also shows which shipped sweeps fit this machine, and their hours as estimated by
    `sweep NAME --dry-run`. Exits with 1 if something is broken, but not if a sweep does not fit.
    Nothing is written, downloaded or started.

    Example: iiet-orch doctor
    """
    from orchestrator.pipelines.doctor import Findings, examine
    from orchestrator.sweeping.shipped import price_shipped_sweeps

    findings = []
    for finding in examine(call.session.workspace):
        findings.append(finding)
        if not call.as_json:
            call.show(finding)  # At once, because some checks take seconds.
    return Findings(findings=findings, sweeps=price_shipped_sweeps(call.session.workspace))


@config_app.command("show")
@shared_options(reads=ALL_SETTINGS, config=False, workspace=None)
def show_settings(
    call: Call,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]", help="A YAML file, or a shipped sweep (default: the defaults)."
        ),
    ] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only what differs from the defaults.")
    ] = False,
) -> "Output | None":
    """Print the resolved settings as YAML; what differs from its default is marked.

    Example: iiet-orch config show demo --changed
    """
    call.config = file
    from orchestrator.settings.files import changed_values, marked_yaml

    if call.as_json:
        shown = changed_values(call.settings) if changed else call.settings.model_dump(mode="json")
        return call.answer({"settings": shown}, [])
    typer.echo(marked_yaml(call.settings, only_changed=changed), nl=False)
    return None


@config_app.command("schema")
@shared_options(workspace=None, has_json=False)
def show_schema(_call: Call) -> None:
    """Print the JSON schema of the settings, for editors.

    Example: iiet-orch config schema
    """
    from orchestrator.settings import Settings

    typer.echo(json.dumps(Settings.model_json_schema(), indent=2))


@config_app.command("list")
@shared_options(workspace=None)
def list_sweeps(call: Call) -> "Output":
    """List the shipped sweeps.

    Example: iiet-orch config list
    """
    from orchestrator.reporting.sections import two_column_table
    from orchestrator.settings.files import shipped_sweeps

    rows = []
    for name, path in shipped_sweeps().items():
        with path.open(encoding="utf-8") as file:
            rows.append((name, file.readline().removeprefix("# ").strip()))
    return call.answer(
        {"sweeps": [{"name": name, "text": text} for name, text in rows]},
        [two_column_table(None, rows)],
    )


@config_app.command("init")
@shared_options(workspace=None, has_json=False)
def init(
    call: Call,
    file: Annotated[
        Path | None, typer.Argument(help="File to write (default: my-sweep.yaml).")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Your text: a file, folder or pattern; may be repeated."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="SWEEP", help="Copy a shipped sweep; `config list` names them."
        ),
    ] = None,
    size: Annotated[Size | None, typer.Option(help="Size of the model (default: tiny).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    hub: Annotated[str | None, setting("data.hub_name")] = None,
    tokenizer: Annotated[str | None, setting("data.tokenizer")] = None,
    steps: Annotated[int | None, setting("training.num_steps")] = None,
    gpus: Annotated[int | None, setting("cluster.num_gpus")] = None,
) -> "Output":
    """Write a commented settings file for your own data and size; asks for what is missing.

    With --from, copy a shipped sweep instead, to change it.

    Example: iiet-orch config init my-sweep.yaml --data my-texts/ --size tiny
    """
    from orchestrator.settings.files import (
        find_settings_file,
        shipped_sweeps,
        starting_settings,
        starting_yaml,
    )
    from orchestrator.workspace.files import write_text

    notes: list[str] = []
    if (data is not None) + (hub is not None) + (source is not None) > 1:
        raise UserError("--data, --hub and --from name different sources; leave all but one out")
    if source is not None:
        copied = shipped_sweeps().get(source) or find_settings_file(source)
        file = file or Path(f"{copied.stem}.yaml")
        text = copied.read_text(encoding="utf-8")
    else:
        file = file or Path("my-sweep.yaml")
        is_asked = not data and not hub
        if is_asked:
            if not sys.stdin.isatty():
                raise UserError("name your text with --data PATH, or a data set with --hub NAME")
            data = [typer.prompt("Your text (a file, folder or pattern)")]
        call.set("data.source", "hub" if hub else "files")
        call.set("data.files", data)
        settings = starting_settings(size or "tiny", call.options)
        if settings.data.source == "files":
            from orchestrator.data.text import TEXT_SUFFIXES, find_files, read_file, unread_note

            for path in find_files(settings.data):
                if path.suffix in TEXT_SUFFIXES:  # Raises if it is not text.
                    next(read_file(path, settings.data.text_field), None)
            if unread := unread_note(settings.data):
                notes.append(unread)
        chosen_tokenizer = settings.data.tokenizer
        if chosen_tokenizer != "train" and not chosen_tokenizer.startswith("hub:"):
            from orchestrator.models.tokenizer import load_tokenizer

            load_tokenizer(chosen_tokenizer)
        if is_asked and size is None:
            size = typer.prompt("Size: tiny, 55m or 340m", default="tiny")
            if size not in get_args(Size):
                raise UserError(f"the size is one of {', '.join(get_args(Size))}; got {size!r}")
            settings = starting_settings(size, call.options)
        from orchestrator.pipelines.starting import fit_to_text

        settings, sentences = fit_to_text(settings, keeps_steps=steps is not None)
        notes += sentences
        text = starting_yaml(settings)
    if file.exists() and not (force and file.is_file()):
        raise UserError(f"{file} exists; give another name, or replace a file with --force")
    write_text(file, text)
    notes += [f"written: {file}", f"next: iiet-orch sweep {file} --dry-run"]
    return call.answer({}, notes)
