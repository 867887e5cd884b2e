"""The command that distills students."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.app import app
from orchestrator.cli.json_output import JsonOption
from orchestrator.cli.option_values import read_options, split_names
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
    TrainingDeviceOption,
    VerboseOption,
    WorkspaceOption,
)
from orchestrator.cli.printing import show
from orchestrator.cli.session import open_session
from orchestrator.cli.training import LocalOption, ProfileOption, check_resources_of_run
from orchestrator.workspace.errors import UserError


@app.command(rich_help_panel="Train")
def distill(
    checkpoint: CheckpointArgument = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            "--schedule",
            "-r",
            help="The student's corrections per layer: 1, or 2,1,1,0,0,0; repeated for several "
            "students.",
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    control: ControlOption = None,
    seed: SeedOption = None,
    lr: LearningRateOption = None,
    device: TrainingDeviceOption = None,
    dtype: DtypeOption = None,
    local: LocalOption = False,
    profile: ProfileOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    address: AddressOption = None,
    logger: LoggerOption = None,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Distill a teacher into itself under cheaper iteration schedules (IIAD), a student each.

    Example: iiet-orch distill my-run -r 2,1,1,0,0,0 -r 1 --lr 5e-4
    """
    if not schedule:
        raise UserError(
            "--schedule says how many corrections the student's layers make, such as --schedule 1 "
            "or --schedule 2,1,1,0,0,0"
        )
    settings = read_options(
        config,
        set_,
        train_on=device,
        distillation__control=control,
        distillation__training__seed=seed,
        distillation__training__learning_rate=lr,
        distillation__training__precision=dtype,
        distillation__training__profile_steps=profile,
        cluster__address=address,
        tracking__loggers=split_names(logger),
    )
    if not dry_run:
        check_resources_of_run(settings, local=local)
    with open_session(
        workspace, "distill", verbose=verbose, dry_run=dry_run, as_json=as_json
    ) as session:
        from orchestrator.pipelines.context import Context
        from orchestrator.pipelines.hub_imports import local_model
        from orchestrator.pipelines.training import plan_distill, run_distill

        loggers = settings.tracking.loggers if not dry_run else ()
        context = Context(session.workspace, session.progress, loggers=loggers)
        teacher = local_model(context, checkpoint)
        plan = plan_distill(
            settings,
            workspace=session.workspace,
            schedules=schedule,
            teacher=teacher,
            local=local,
        )
        show(session, plan if dry_run else run_distill(plan, context), as_json=as_json)
