"""The command that distills students."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.app import app
from orchestrator.cli.options import (
    AddressOption,
    CheckpointArgument,
    ConfigOption,
    ControlOption,
    DryRunOption,
    DtypeOption,
    LearningRateOption,
    LoggerOption,
    SeedOption,
    SetOption,
    VerboseOption,
    WorkspaceOption,
    read_options,
    split_names,
)
from orchestrator.cli.printing import print_training_plan
from orchestrator.cli.session import open_session
from orchestrator.cli.training import LocalOption, ProfileOption, check_resources_of_run
from orchestrator.terminal.layout import print_line


@app.command(rich_help_panel="Train")
def distill(
    schedule: Annotated[
        str, typer.Argument(help="The student's corrections per layer: 1, or 2,1,1,0,0,0.")
    ],
    checkpoint: CheckpointArgument = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    control: ControlOption = None,
    seed: SeedOption = None,
    lr: LearningRateOption = None,
    dtype: DtypeOption = None,
    local: LocalOption = False,
    profile: ProfileOption = None,
    dry_run: DryRunOption = False,
    address: AddressOption = None,
    logger: LoggerOption = None,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Distill a teacher into itself under a cheaper iteration schedule (IIAD).

    Example: iiet-orch distill 2,1,1,0,0,0 my-run --lr 5e-4
    """
    settings = read_options(
        config,
        set_,
        distillation__control=control,
        distillation__training__seed=seed,
        distillation__training__learning_rate=lr,
        distillation__training__precision=dtype,
        distillation__training__profile_steps=profile,
        cluster__address=address,
        tracking__loggers=split_names(logger),
    )
    if dry_run:
        with open_session(workspace, "distill", verbose=verbose, dry_run=True) as session:
            from orchestrator.pipelines import training_dry_runs

            plan = training_dry_runs.plan_distill(
                settings, workspace=session.workspace, schedule=schedule, teacher=checkpoint
            )
            print_training_plan(session.console, plan)
        return
    check_resources_of_run(settings, local=local)
    with open_session(workspace, "distill", verbose=verbose) as session:
        from orchestrator.pipelines.context import Context
        from orchestrator.pipelines.distilling import distill_in_context

        loggers = settings.tracking.loggers
        context = Context(session.workspace, session.progress, loggers=loggers)
        result = distill_in_context(
            settings, context, schedule=schedule, teacher=checkpoint, local=local
        )
        print_line(session.console, f"checkpoint: {result.checkpoint}")
