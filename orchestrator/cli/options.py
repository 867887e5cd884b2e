"""Options that several commands share: names, parsing, and the settings that they change."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.models import OptionInfo

from orchestrator.records.metrics import CostName, QualityName
from orchestrator.settings import Settings
from orchestrator.workspace.errors import UserError, quoted
from orchestrator.workspace.layout import check_name_option

MAX_COUNT = 1_000_000
"""Largest count that an option takes; a larger one is a typing error."""


def complete_models(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the runs of the workspace to a shell; with `RUN/` typed, its checkpoints."""
    run, slash, _ = incomplete.partition("/")
    return _names_in(ctx, f"runs/{run}/step_*" if slash else "runs/*", incomplete)


def complete_trial_sweeps(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the sweeps of the workspace, each with the mark before a trial's name."""
    return [f"{name}:" for name in complete_sweeps(ctx, incomplete)]


def complete_sweeps(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the sweeps of the workspace to a shell."""
    return _names_in(ctx, "sweeps/*", incomplete)


def _names_in(ctx: typer.Context, pattern: str, incomplete: str) -> list[str]:
    from orchestrator.workspace.layout import locate_workspace

    # A shell would show an error in the middle of the command.
    with suppress(UserError, OSError, ValueError):
        named = ctx.params.get("workspace")
        root = locate_workspace(Path(named) if named else None).root
        paths = [path.relative_to(root).as_posix() for path in root.glob(pattern)]
        names = sorted(name.partition("/")[2] for name in paths)
        return [name for name in names if name.startswith(incomplete)]
    return []


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
ALL_SETTINGS = tuple(Settings.model_fields)
"""All sections of the settings."""
ANYWHERE = ("cluster.address", "cluster.env")
"""Settings that every command in a Ray cluster reads."""
TO_MEASURE = (*ANYWHERE, "cluster.num_gpus", "cluster.device")
"""Cluster settings of commands that measure."""
TO_TRAIN = (
    *ANYWHERE,
    "cluster.num_gpus",
    "cluster.gpu",
    "cluster.num_workers",
    "cluster.min_gpus",
    "cluster.storage",
    "cluster.parallel",
    "cluster.num_shards",
    "cluster.max_failures",
    "cluster.collective_timeout_seconds",
    "cluster.node_wait_minutes",
)
"""Cluster settings of commands that train."""
TrainingDeviceOption = Annotated[
    Literal["cpu", "cuda"] | None,
    typer.Option("--device", help="Where to train (default: as cluster.num_gpus says)."),
]
CostOption = Annotated[CostName | None, typer.Option(help="Cost of the front.")]
QualityOption = Annotated[QualityName | None, typer.Option(help="Quality of the front.")]
NameOption = Annotated[
    str | None,
    typer.Option(help="Name (default: from the content).", callback=check_name_option),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code in a model folder to run.")
]
BaselinesOption = Annotated[
    list[str] | None,
    typer.Option("--baseline", metavar="RUN", autocompletion=complete_models,
                 help="A trained model to show with the front, by name or path; may be repeated."),
]  # fmt: skip
LocalOption = Annotated[
    bool, typer.Option("--local", help="Train in this process, without Ray (for debuggers).")
]


def schedules_option(text: str) -> OptionInfo:
    """Return the option `--schedule`, whose help text each command gives."""
    option: OptionInfo = typer.Option("--schedule", "-r", metavar="SCHEDULE", help=text)
    return option


def read_schedules(texts: list[str]) -> list[int | str]:
    """Read a repeated `--schedule`: a number for all layers, or a text."""
    # A number of more digits is not a count; it stays a text, which the settings refuse.
    return [int(text) if re.fullmatch("[0-9]{1,9}", text) else text for text in texts]


def one_schedule(texts: list[str] | None) -> str | None:
    """Read the `--schedule` of a command that takes one.

    Raises:
        UserError: If it was given several times.
    """
    if texts and len(texts) > 1:
        raise UserError(
            f"--schedule was given {len(texts)} times ({' and '.join(texts)}), and this command "
            "takes one schedule; commas separate its layers"
        )
    return texts[0] if texts else None


def split_list(text: str) -> Any:
    """Read names or numbers with commas between them, also in brackets as in a settings file."""
    from orchestrator.settings.resolve import YamlProblem, parse_yaml

    text = text.strip()
    try:
        return parse_yaml(text if text.startswith("[") else f"[{text}]")
    except YamlProblem as error:
        raise UserError(f"cannot read the list {quoted(text)}: {error}") from None
