"""Commands that show and clean a workspace, check the machine, and write settings files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from orchestrator.cli.command import Command
from orchestrator.cli.session import Call
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Kind, RemovableKind

if TYPE_CHECKING:
    from orchestrator.reporting.result import Result

Size = Literal["tiny", "55m", "340m"]


@Command("ui", group="See results", workspace="existing")
def ui(
    call: Call,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    sync: Annotated[bool, typer.Option("--sync")] = False,
    replace: Annotated[bool, typer.Option("--replace")] = False,
) -> Result | None:
    """Print the page of the newest sweep, start MLflow on 127.0.0.1, and print links to its pages.

    Example: iiet-orch ui --port 5001

    Args:
        port: Port on 127.0.0.1.
        sync: Instead publish all trainings, sweeps, measurements and models in MLflow again.
        replace: With --sync: delete the workspace's own store, and make it anew.
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


@Command("list", group="Keep order", workspace="existing")
def list_workspace(
    call: Call,
    kind: Annotated[Literal[Kind, "running"] | None, typer.Argument(metavar="KIND")] = None,
) -> Result:
    """List runs, trials, sweeps and the models in exports/, the newest first, or what runs now.

    Example: iiet-orch list running

    Args:
        kind: runs, checkpoints, trials, sweeps, models (default: all but checkpoints), or running,
            what runs now with its progress, speed and time left.
    """
    from orchestrator.pipelines import upkeep

    space = call.session.workspace
    note = call.session.progress.note
    if kind == "running":
        return upkeep.show_status(space, note=note)
    return upkeep.list_workspace(space, kind, with_checkpoints=call.as_json, note=note)


@Command("clean", group="Keep order", workspace="existing", plans=True)
def clean(
    call: Call,
    kinds: Annotated[list[RemovableKind] | None, typer.Argument(metavar="KIND")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y")] = False,
) -> Result | None:
    """Delete what is no longer needed: shows it with sizes and reasons, then asks.

    Finished weights, evaluations, and what a running process holds are never touched.

    Example: iiet-orch clean checkpoints --dry-run

    Args:
        kinds: temporary, ray, checkpoints or damaged (default: all).
        yes: Delete without asking.
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


@Command("doctor", group="Start", workspace="named")
def doctor(call: Call) -> Result:
    """Check this machine and the workspace; name a remedy for what is broken.

    Then say which shipped sweeps fit this machine, and the hours that they take from their start,
    as estimated by `sweep NAME --dry-run`. Exits with 1 if something is broken, not if a sweep does
    not fit. Nothing is written, downloaded or started.

    Example: iiet-orch doctor
    """
    from orchestrator.pipelines.doctor import Findings, examine, price_shipped_sweeps

    findings = []
    for finding in examine(call.session.workspace):
        findings.append(finding)
        if not call.as_json:
            call.show(finding)  # At once, because some checks take seconds.
    return Findings(findings=findings, sweeps=price_shipped_sweeps(call.session.workspace))


@Command("config show", group="Start", config="argument", workspace=None)
def show_settings(
    call: Call,
    file: Annotated[str | None, typer.Argument(metavar="[FILE]")] = None,
    changed: bool = False,
) -> Result | None:
    """Print the resolved settings as YAML; what differs from its default is marked.

    Example: iiet-orch config show demo --changed

    Args:
        file: A YAML file, or a shipped sweep (default: the defaults).
        changed: Only what differs from the defaults.

    Keys:
        settings: section to its settings by name, as in a file
    """
    call.config = file
    from orchestrator.settings.files import changed_values, marked_yaml

    if call.as_json:
        shown = changed_values(call.settings) if changed else call.settings.model_dump(mode="json")
        return call.answer({"settings": shown}, [])
    typer.echo(marked_yaml(call.settings, only_changed=changed), nl=False)
    return None


@Command("config schema", group="Start", workspace=None, has_json=False)
def show_schema(_call: Call) -> None:
    """Print the JSON schema of the settings, for editors.

    Example: iiet-orch config schema
    """
    from orchestrator.settings import Settings

    typer.echo(json.dumps(Settings.model_json_schema(), indent=2))


@Command("config list", group="Start", workspace=None)
def list_sweeps(call: Call) -> Result:
    """List the shipped sweeps.

    Example: iiet-orch config list

    Keys:
        sweeps: one entry per shipped sweep: `name`, and `text`, what it does
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


@Command(
    "config init",
    group="Start",
    options={
        "--hub": "data.hub_name",
        "--tokenizer": "data.tokenizer",
        "--steps": "training.num_steps",
        "--gpus": "cluster.num_gpus",
    },
    workspace=None,
    has_json=False,
)
def init(
    call: Call,
    file: Annotated[Path | None, typer.Argument()] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="PATH")] = None,
    source: Annotated[str | None, typer.Option("--from", metavar="SWEEP")] = None,
    size: Size | None = None,
    force: bool = False,
) -> Result:
    """Write a commented settings file for your own data and size; asks for what is missing.

    With --from, copy a shipped sweep instead, to change it.

    Example: iiet-orch config init my-sweep.yaml --data my-texts/ --size tiny

    Args:
        file: File to write (default: my-sweep.yaml).
        data: Your text: a file, folder or pattern; may be repeated.
        source: Copy a shipped sweep; `config list` names them.
        size: Size of the model (default: tiny).
        force: Replace a file that exists.
    """
    from orchestrator.settings.files import (
        find_settings_file,
        shipped_sweeps,
        starting_settings,
        starting_yaml,
    )
    from orchestrator.workspace.files import write_text

    hub = call.options.get("data.hub_name")
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
            from orchestrator.data.text import find_files, read_file

            for path in find_files(settings.data):
                if path.suffix == ".txt":  # Raises if it is not text.
                    next(read_file(path, settings.data.text_field), None)
        tokenizer = settings.data.tokenizer
        if tokenizer != "train" and not tokenizer.startswith("hub:"):
            from orchestrator.models.tokenizer import load_tokenizer

            load_tokenizer(tokenizer)
        if is_asked and size is None:
            size = typer.prompt("Size: tiny, 55m or 340m", default="tiny")
            if size not in get_args(Size):
                raise UserError(f"the size is one of {', '.join(get_args(Size))}; got {size!r}")
            settings = starting_settings(size, call.options)
        text = starting_yaml(settings)
    if file.exists() and not (force and file.is_file()):
        raise UserError(f"{file} exists; give another name, or replace a file with --force")
    write_text(file, text)
    return call.answer({}, [f"written: {file}", f"next: iiet-orch sweep {file} --dry-run"])
