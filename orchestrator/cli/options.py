"""The arguments and options that several commands have as their own, and what shells offer."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import check_name_option

MAX_COUNT = 1_000_000
"""Largest count that an option takes; a larger one is a typing error."""
MAX_SEED = 2**32 - 1
"""Largest seed that every library's random generator takes."""


def complete_models(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the runs of the workspace to a shell; with `RUN/` typed, its checkpoints."""
    run, slash, _ = incomplete.partition("/")
    return _names_in(ctx, f"runs/{run}/step_*" if slash else "runs/*", incomplete)


def complete_sweeps(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the sweeps of the workspace to a shell."""
    return _names_in(ctx, "sweeps/*", incomplete)


def _names_in(ctx: typer.Context, pattern: str, incomplete: str) -> list[str]:
    from orchestrator.workspace.layout import locate_workspace

    # A shell would show an error in the middle of the command.
    with suppress(UserError, OSError, ValueError):
        named = ctx.params.get("workspace")
        root = locate_workspace(Path(named) if named else None).root
        found = [path.relative_to(root).as_posix() for path in root.glob(pattern)]
        names = sorted(name.partition("/")[2] for name in found)
        return [name for name in names if name.startswith(incomplete)]
    return []


ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="Settings: a YAML file, or the name of a shipped sweep."),
]
TeacherArgument = Annotated[
    Path | None,
    typer.Argument(
        help="Checkpoint or run, by path or name, or hub:OWNER/NAME; by default the newest IIET "
        "with corrections that is finished.",
        autocompletion=complete_models,
    ),
]
ModelsArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Checkpoints, runs (by path or name), Hugging Face folders or hub:OWNER/NAME, side by "
        "side; by default the newest of finished runs and what `pick` chose last.",
        autocompletion=complete_models,
    ),
]
SchedulesOption = Annotated[list[str] | None, typer.Option("--schedule", "-r")]
CostOption = Annotated[
    Literal["evaluations", "flops", "ms", "kv"] | None, typer.Option(help="Cost of the front.")
]
QualityOption = Annotated[
    Literal["accuracy", "bits", "perplexity", "loss"] | None,
    typer.Option(help="Quality of the front."),
]
FolderToWriteOption = Annotated[
    Path | None, typer.Option("--to", help="Folder to write (default: inside the workspace).")
]
ReplaceModelOption = Annotated[
    bool, typer.Option("--force", help="With --to: replace an export of another model.")
]
NameOption = Annotated[
    str | None,
    typer.Option(help="Name (default: from the content).", callback=check_name_option),
]
LocalOption = Annotated[
    bool, typer.Option("--local", help="Train in this process, without Ray (for debuggers).")
]
TrustRemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code in a model folder to run.")
]
