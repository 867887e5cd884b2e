"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli.completion import (
    INFLUENCE_METRICS,
    METHODS,
    complete_method_list,
    complete_methods,
    complete_metrics,
    complete_models,
    complete_settings,
    complete_settings_files,
    complete_sweeps,
    list_completer,
)
from orchestrator.workspace.layout import check_name_option

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
    typer.Option(
        "--config",
        "-c",
        help="Settings: a YAML file, or the name of a shipped sweep.",
        autocompletion=complete_settings_files,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change a setting: training.num_steps=500.",
        autocompletion=complete_settings,
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
        help="Checkpoint or run, by path or name, or hub:OWNER/NAME; the workspace's newest IIET "
        "by default.",
        autocompletion=complete_models,
    ),
]
ModelArgument = Annotated[
    Path | None,
    typer.Argument(
        help="Checkpoint or run, by path or name, or hub:OWNER/NAME; the newest IIET or imported "
        "model by default.",
        autocompletion=complete_models,
    ),
]
SweepsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SWEEP",
        help="Names of sweeps, several on one front (default: the newest).",
        autocompletion=complete_sweeps,
    ),
]
SweepArgument = Annotated[
    str | None,
    typer.Argument(help="Name of a sweep (default: the newest).", autocompletion=complete_sweeps),
]
SettingsFileArgument = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or the name of a shipped sweep.", autocompletion=complete_settings_files
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(METHODS),
        help="Or one that another package adds.",
        autocompletion=complete_methods,
    ),
]
MethodsOption = Annotated[
    str | None,
    typer.Option(
        metavar=f"{'|'.join(METHODS)},...",
        help="With commas between: vanilla,iiet.",
        autocompletion=complete_method_list,
    ),
]
DistilledBaselinesOption = Annotated[
    str | None,
    typer.Option(
        metavar="vanilla|fewer_layers,...",
        help="Distill baselines of the students' FLOPs, too.",
        autocompletion=list_completer(("vanilla", "fewer_layers")),
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
ReplaceModelOption = Annotated[
    bool, typer.Option("--force", help="With --to: replace an export of another model.")
]
MetricOption = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(INFLUENCE_METRICS),
        autocompletion=complete_metrics,
        help="Measure of influence; packages may add others.",
    ),
]
ControlOption = Annotated[
    Literal["distill", "cross_entropy", "pruned", "scratch"] | None,
    typer.Option(help="How students are made; the others are control experiments."),
]
ScheduleOption = Annotated[
    list[str] | None,
    typer.Option("--schedule", "-r", help="Another iteration schedule: 1, or 2,1,1,0,0,0."),
]
SchedulesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--schedule", "-r", help="Another iteration schedule: 1, or 2,1,1,0,0,0; may be repeated."
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|cuda|cuda:N", help="Where to compute (default: on a GPU if there is one)."
    ),
]
TrainingDeviceOption = Annotated[
    Literal["cpu", "cuda"] | None,
    typer.Option("--device", help="Where to train (default: as cluster.num_gpus says)."),
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
    str | None,
    typer.Option(
        help="heldout, paper, or comma-separated lm-eval tasks.",
        autocompletion=list_completer(("heldout", "paper"), group="iiet_orch.tasks"),
    ),
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
        metavar="mlflow|tensorboard,...",
        help="mlflow,tensorboard writes TensorBoard's files, too.",
        autocompletion=list_completer(("mlflow", "tensorboard"), group="iiet_orch.loggers"),
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and its cost; run nothing.")
]
