"""Commands that make tokens and models, and `quickstart`, which runs all steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from orchestrator.cli.app import app
from orchestrator.cli.completion import complete_models
from orchestrator.cli.json_output import JsonOption
from orchestrator.cli.option_values import one_schedule, read_options, split_names
from orchestrator.cli.options import (
    MAX_COUNT,
    AddressOption,
    ConfigOption,
    DryRunOption,
    DtypeOption,
    GpusOption,
    LearningRateOption,
    LoggerOption,
    MethodOption,
    SeedOption,
    SetOption,
    TrainingDeviceOption,
    VerboseOption,
    WaitForGpusOption,
    WorkersOption,
    WorkspaceOption,
)
from orchestrator.cli.printing import show
from orchestrator.cli.session import open_session
from orchestrator.terminal.layout import print_line
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import check_name_option

LocalOption = Annotated[
    bool, typer.Option("--local", help="Train in this process, without Ray (for debuggers).")
]


ProfileOption = Annotated[
    int | None,
    typer.Option(
        "--profile",
        metavar="STEPS",
        min=0,
        max=MAX_COUNT,
        help="Record this many steps with PyTorch's profiler, time and memory.",
    ),
]


@app.command(rich_help_panel="Train")
def prepare(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text, JSON lines, Parquet or folders (default: English texts of Python)."
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Read a corpus, train or load its tokenizer, and write token shards.

    Example: iiet-orch prepare my-texts/ --set data.vocab_size=4096
    """
    shortcuts: dict[str, Any] = {"data__source": "files", "data__files": files} if files else {}
    settings = read_options(config, set_, **shortcuts)
    with open_session(workspace, "prepare", verbose=verbose, as_json=as_json) as session:
        from orchestrator.pipelines import training

        folder = training.prepare(settings, **session.common)
        if as_json:
            session.print_json({"tokens": str(folder)})
        else:
            print_line(session.console, f"tokens: {folder}")


@app.command(rich_help_panel="Train")
def pretrain(
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    gpus: GpusOption = None,
    workers: WorkersOption = None,
    preset: Annotated[
        Literal["tiny", "55m", "340m", "740m", "1.3b"] | None, typer.Option(help="Size.")
    ] = None,
    method: MethodOption = None,
    corrections: Annotated[
        list[str] | None,
        typer.Option(
            "--schedule",
            "-r",
            help="Iteration schedule: 3, or one number per layer: 2,2,1,1,1,1.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Optimizer steps.")
    ] = None,
    seed: SeedOption = None,
    lr: LearningRateOption = None,
    device: TrainingDeviceOption = None,
    dtype: DtypeOption = None,
    continue_: Annotated[
        Path | None,
        typer.Option(
            "--continue",
            metavar="RUN",
            help="Finished run, by path or name, to continue to more --steps (wsd or constant).",
            autocompletion=complete_models,
        ),
    ] = None,
    skip_bad_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_COUNT,
            help="Maximum number of consecutive steps to skip for a loss that is not finite.",
        ),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="URI for copies of the checkpoints: s3://bucket/runs.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the run (default: from its content).", callback=check_name_option
        ),
    ] = None,
    local: LocalOption = False,
    profile: ProfileOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Share of the peak FLOP/s that --dry-run assumes."),
    ] = None,
    address: AddressOption = None,
    logger: LoggerOption = None,
    wait_for_gpus: WaitForGpusOption = None,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Pretrain one model on GPUs or CPUs; an interrupted run resumes.

    Example: iiet-orch pretrain --preset tiny -r 2,2,1,1,1,1 --steps 500 --seed 1
    """
    settings = read_options(
        _settings_to_continue(workspace, continue_, config) if continue_ else config,
        set_,
        train_on=device,
        cluster__num_gpus=gpus,
        cluster__num_workers=workers,
        model__preset=preset,
        model__method=method,
        model__corrections=one_schedule(corrections),
        training__num_steps=steps,
        training__seed=seed,
        training__learning_rate=lr,
        training__precision=dtype,
        training__skip_bad_steps=skip_bad_steps,
        # A continued run is not profiled because the finished one was.
        training__profile_steps=0 if continue_ and profile is None else profile,
        cluster__storage=storage,
        cluster__address=address,
        tracking__loggers=split_names(logger),
        cluster__wait_for_gpus=wait_for_gpus,
    )
    if mfu is not None and not dry_run:
        raise UserError("--mfu is an assumption of the plan; use it with --dry-run")
    if not dry_run:
        check_resources_of_run(settings, local=local)
    with open_session(
        workspace, "pretrain", verbose=verbose, dry_run=dry_run, as_json=as_json
    ) as session:
        from orchestrator.pipelines.context import Context
        from orchestrator.pipelines.training import plan_pretrain, run_pretrain

        space, loggers = session.workspace, settings.tracking.loggers
        plan = plan_pretrain(
            settings, workspace=space, continued=continue_, name=name, local=local, mfu=mfu
        )
        if dry_run:
            show(session, plan, as_json=as_json)
            return
        context = Context(space, session.progress, loggers=loggers)
        show(session, run_pretrain(plan, context), as_json=as_json)


def _settings_to_continue(workspace: Path | None, run: Path, config: str | None) -> str:
    if config is not None:
        raise UserError("--continue takes the run's own settings; use it without --config")
    from orchestrator.settings import SETTINGS_NAME
    from orchestrator.training.model_lookup import find_run_folder
    from orchestrator.workspace.folders import locate_workspace

    path = find_run_folder(locate_workspace(workspace), run) / SETTINGS_NAME
    if not path.is_file():
        raise UserError(
            f"{path.parent} was not made by `iiet-orch pretrain`: it has no {path.name}"
        )
    return str(path)


def check_resources_of_run(settings: Any, *, local: bool) -> None:
    """Refuse too few CPUs or GPUs before heavy imports and before the workspace is made."""
    from orchestrator.planning.machine import check_run_resources

    check_run_resources(settings.cluster, local=local)
