"""The options that several commands share, and how they become settings."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from orchestrator.workspace.errors import UserError, quoted
from orchestrator.workspace.folders import check_name_option

MAX_COUNT = 2**31 - 1
"""Largest count that an option takes: libraries hold counts in 32 bits."""
MAX_SEED = 2**32 - 1
"""Largest seed that every library's random generator takes."""

WorkspaceOption = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        "-w",
        help="Folder for all results (default: IIET_WORKSPACE, else ./iiet-workspace).",
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="Settings: a YAML file, or the name of a shipped sweep."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Change a setting: training.num_steps=500."
    ),
]
VerboseOption = Annotated[
    bool | None,
    typer.Option(
        "--verbose/--quiet",
        "-v/-q",
        show_default=False,
        help="Show the output of libraries; or no progress, only results and warnings.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, max=MAX_COUNT, help="Data-parallel workers."),
]
GpusOption = Annotated[
    int | None, typer.Option("--gpus", min=0, max=MAX_COUNT, help="GPUs, one worker each.")
]
WaitForGpusOption = Annotated[
    bool | None,
    typer.Option("--wait-for-gpus", help="Wait for GPUs of nodes that join the cluster later."),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="Ray cluster to join, auto or local (default: RAY_ADDRESS, else local).",
    ),
]
CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(
        help="Checkpoint or run, by path or name; the workspace's newest IIET by default."
    ),
]
ModelArgument = Annotated[
    Path | None,
    typer.Argument(
        help="Checkpoint or run, by path or name; the newest IIET or imported model by default."
    ),
]
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
MetricOption = Annotated[
    Literal["cosine", "relative", "loss"] | None, typer.Option(help="Measure of influence.")
]
ControlOption = Annotated[
    Literal["distill", "cross_entropy", "pruned", "scratch"] | None,
    typer.Option(help="How students are made; the others are control experiments."),
]
ScheduleOption = Annotated[
    str | None,
    typer.Option("--schedule", "-r", help="Another iteration schedule: 1, or 2,1,1,0,0,0."),
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, max=MAX_SEED, help="Seed of the weights and the data order.")
]
LearningRateOption = Annotated[
    float | None, typer.Option("--lr", help="Peak learning rate, such as 1e-3.")
]
DtypeOption = Annotated[
    Literal["fp32", "bf16"] | None,
    typer.Option(help="Arithmetic of the training (default: bf16 on GPUs, fp32 on CPUs)."),
]
SuiteOption = Annotated[
    str | None, typer.Option(help="heldout, paper, or comma-separated lm-eval tasks.")
]
IncludePathOption = Annotated[
    Path | None, typer.Option(help="Folder with your own lm-eval task files.")
]
NumFewshotOption = Annotated[int | None, typer.Option(help="Solved examples before each item.")]
ApplyChatTemplateOption = Annotated[
    bool,
    typer.Option("--apply-chat-template", help="Write prompts with the model's chat template."),
]
ChatTemplateOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The same, with one of its named templates.")
]
LimitOption = Annotated[
    int | None, typer.Option(help="Score only the first N items of each task (default: all).")
]
BatchSizeOption = Annotated[int | None, typer.Option(help="Sequences in one forward pass.")]
TrustRemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code in a model folder to run.")
]
TrialsAtOnceOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_COUNT,
        help="Maximum number of trials at the same time (default: as many as fit).",
    ),
]
WorkersPerTrialOption = Annotated[
    int | None, typer.Option(min=1, max=MAX_COUNT, help="Data-parallel workers inside each trial.")
]
GpusPerTrialOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=MAX_COUNT,
        help="GPUs of each trial, or a share of one, such as 0.25 (default: the fewest that it "
        "fits on, or none on CPUs).",
    ),
]
SeedsOption = Annotated[
    str | None, typer.Option(help="Comma-separated seeds of every model: 0,1,2.")
]
NameOption = Annotated[
    str | None,
    typer.Option(help="Name of the sweep (default: from its content).", callback=check_name_option),
]
LoggerOption = Annotated[
    str | None,
    typer.Option(
        "--logger",
        metavar="NAMES",
        help="mlflow, or mlflow,tensorboard for TensorBoard's files, too.",
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and its cost; run nothing.")
]


def read_options(config: str | None, assignments: list[str] | None, **options: Any) -> Any:
    """Read the settings: file, then --set, then the command's own options.

    Args:
        **options: `section__key` to the option's value; None means that it was not given.

    Raises:
        UserError: Names everything that is wrong.
    """
    from orchestrator.settings import read_settings

    given = {name.replace("__", "."): value for name, value in options.items() if value is not None}
    settings = read_settings(config or None, assignments or [], given)
    if settings.evaluation.include_path:
        from orchestrator.evaluation.task_selection import user_task_folders

        user_task_folders(settings.evaluation)
    return settings


def parse_numbers(text: str | None, option: str) -> list[float] | None:
    """Read comma-separated numbers; None stays None.

    Raises:
        UserError: If one is not a number; names the option.
    """
    if text is None:
        return None
    try:
        found = [float(part) for part in _number_texts(text)]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UserError(f"{option} takes numbers with commas between them; got {quoted(text)}")
    return found


def parse_rates(text: str | None) -> dict[str, list[float]] | None:
    """Read `--rates`: the same learning rates for every method; None stays None."""
    from iiet.methods import METHODS

    rates = parse_numbers(text, "--rates")
    return None if rates is None else dict.fromkeys(METHODS, rates)


def parse_whole_numbers(
    text: str | None, option: str, *, at_least: int = 1, at_most: int = MAX_COUNT
) -> tuple[int, ...] | None:
    """Read comma-separated whole numbers, without repetitions; None stays None.

    Raises:
        UserError: If one is not a whole number or out of range; names the option.
    """
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in _number_texts(text))
    except ValueError:
        found = (at_least - 1,)
    if min(found) < at_least or max(found) > at_most:
        raise UserError(
            f"{option} takes whole numbers from {at_least} to {at_most} with commas between them; "
            f"got {quoted(text)}"
        )
    return tuple(dict.fromkeys(found))


def parse_seeds(text: str | None) -> tuple[int, ...] | None:
    """Read `--seeds`; None stays None."""
    return parse_whole_numbers(text, "--seeds", at_least=0, at_most=MAX_SEED)


def split_names(text: str | None) -> list[str | int] | None:
    """Read comma-separated names or numbers; None stays None."""
    if text is None:
        return None
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):  # As in a settings file.
        text = text[1:-1]
    names = [part.strip() for part in text.split(",") if part.strip()]
    return [*map(_count_or_text, names)]


def parse_schedules(texts: list[str] | None) -> list[str | int] | None:
    """Read a repeated `--schedule`: a number for all layers, or a text; None stays None."""
    return None if texts is None else [*map(_count_or_text, texts)]


def _count_or_text(text: str) -> int | str:
    # A number of more digits is not a count; it stays a text, which the settings refuse.
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else text


def _number_texts(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    # Only Python reads `1_0` as a number.
    if not all(re.fullmatch("[-+.0-9eE]{1,40}", part) for part in found):
        raise ValueError(text)
    return found
