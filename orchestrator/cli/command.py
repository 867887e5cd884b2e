"""The options that commands share, and options that change settings.

A command is a plain function for Typer, and its signature shows its own options. `shared_options`
adds those that commands share, gives the function a `Call` and prints what it returns; `setting`
makes an option of a field of the settings. Both read annotations as values, so modules of commands
do not postpone them by `from __future__ import annotations`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import OptionInfo

from orchestrator.cli.options import split_list
from orchestrator.cli.session import Call, WorkspaceUse
from orchestrator.settings import find_field
from orchestrator.workspace.errors import Interrupted

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY


class SettingOption(OptionInfo):
    """An option that changes a setting."""

    key: str
    """The setting, such as `training.num_steps`."""
    is_list: bool
    """Whether its text is a list with commas between the values."""


def setting(key: str, *flags: str) -> SettingOption:
    """Return the option that changes a setting; its range and help are those of the field.

    Args:
        flags: Names of the option (default: that of the parameter). A switch names its own, so that
            it has no opposite such as `--no-elastic`.
    """
    field = find_field(key)
    option = SettingOption(default=..., param_decls=flags)
    option.key = key
    option.is_list = get_origin(field.annotation) is tuple
    option.metavar = "A,B,..." if option.is_list else None
    option.help = " ".join((field.description or "").split())
    for limit in field.metadata:
        above = getattr(limit, "gt", None)
        if isinstance(above, int):  # Typer has closed ranges only, which is the same for these.
            option.min = above + 1
        option.min = getattr(limit, "ge", option.min)
        option.max = getattr(limit, "le", option.max)
    return option


def _shared(name: str, value_type: Any, *flags: str, text: str, metavar: str | None = None) -> Any:
    default = False if value_type is bool else None
    option = typer.Option(*flags, help=text, metavar=metavar)
    annotation = Annotated[value_type, option]
    return inspect.Parameter(name, KEYWORD_ONLY, default=default, annotation=annotation)


SHARED = [
    _shared(
        "config", str | None, "--config", "-c", metavar="FILE",
        text="Settings: a YAML file, or the name of a shipped sweep.",
    ),
    _shared(
        "set_", list[str] | None, "--set", "-s", metavar="KEY=VALUE",
        text="Change a setting: training.num_steps=500.",
    ),
    _shared(
        "workspace", Path | None, "--workspace", "-w", metavar="FOLDER",
        text="Folder for all results (default: IIET_WORKSPACE, else ./iiet-workspace).",
    ),
    _shared(
        "dry_run", bool, "--dry-run",
        text="Print what would be done and what it takes; do nothing.",
    ),
    _shared(
        "as_json", bool, "--json",
        text="Print JSON alone; the reference of the commands names its keys.",
    ),
    _shared("verbose", bool, "--verbose", "-v", text="Show the output of libraries, too."),
    _shared("quiet", bool, "--quiet", "-q", text="Show no progress, only results and warnings."),
]  # fmt: skip
"""Options that commands share; the names are those of `Call`'s arguments."""


def shared_options(
    *,
    reads: Sequence[str] = (),
    config: bool = True,
    workspace: WorkspaceUse | None = "made",
    plans: bool = False,
    has_json: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Return a decorator: a function of a `Call` and its own options also has the shared ones.

    What the function returns is printed; it returns None if it has printed something itself.

    Args:
        reads: Sections of the settings, and single settings, that the command reads. It then takes
            `--set`, and refuses all others, see `Call.refuse_unread`.
        config: Whether `--config` names the settings file, and not an argument of its own.
        workspace: How the workspace is opened, see `open_session`; None if the command has none.
        plans: Whether it takes `--dry-run`.
        has_json: Whether it takes `--json`.
    """
    has_log = workspace in ("made", "read")
    is_taken = {
        "config": bool(reads) and config,
        "set_": bool(reads),
        "workspace": workspace is not None,
        "dry_run": plans,
        "as_json": has_json,
        "verbose": has_log,
        "quiet": has_log,
    }
    shared = [parameter for parameter in SHARED if is_taken[parameter.name]]

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        _call, *own = inspect.signature(function).parameters.values()
        setting_options = {
            parameter.name: option
            for parameter in own
            for option in get_args(parameter.annotation)[1:]
            if isinstance(option, SettingOption)
        }

        def run(ctx: typer.Context, **values: Any) -> None:
            call = Call(
                ctx.command_path.partition(" ")[2],
                reads,
                workspace,
                has_settings=bool(reads or setting_options),
                **{parameter.name: values.pop(parameter.name) for parameter in shared},
            )
            for name, option in setting_options.items():
                is_text_of_list = option.is_list and values[name] is not None
                value = split_list(values[name]) if is_text_of_list else values[name]
                call.set(option.key, value, option=f"--{name.replace('_', '-')}")
            try:
                with call.stack:
                    if reads:
                        call.refuse_unread()
                    call.print(function(call, **values))
            except (KeyboardInterrupt, typer.Abort):  # The latter at a prompt.
                raise Interrupted from None

        # Typer reads the options from the signature, and the help from the docstring.
        context = inspect.Parameter("ctx", KEYWORD_ONLY, annotation=typer.Context)
        options = [parameter.replace(kind=KEYWORD_ONLY) for parameter in own]
        command: Any = run
        command.__signature__ = inspect.Signature([context, *options, *shared])
        command.__doc__ = function.__doc__
        command.reads = reads
        return run

    return decorate
