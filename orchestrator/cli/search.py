"""The command that searches free schedules beside those that a threshold leads to."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.app import app
from orchestrator.cli.options import (
    MAX_COUNT,
    MAX_SEED,
    CheckpointArgument,
    ConfigOption,
    DryRunOption,
    GpusPerTrialOption,
    NameOption,
    SetOption,
    TrialsAtOnceOption,
    VerboseOption,
    WorkersPerTrialOption,
    WorkspaceOption,
    read_options,
)
from orchestrator.cli.session import open_desk


@app.command("search", rich_help_panel="Sweeps")
def search(
    checkpoint: CheckpointArgument = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=0, max=MAX_COUNT, help="Most schedules to try beside those of the threshold sweep."
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="Against evaluations: accuracy, bits_per_byte or validation_loss."),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="nsga2 or tpe.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Seed of the suggestions.")
    ] = None,
    schedules: Annotated[
        int | None,
        typer.Option(min=2, max=MAX_COUNT, help="Schedules of the threshold sweep to start from."),
    ] = None,
    trials_at_once: TrialsAtOnceOption = None,
    workers_per_trial: WorkersPerTrialOption = None,
    gpus_per_trial: GpusPerTrialOption = None,
    name: NameOption = None,
    dry_run: DryRunOption = False,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Search free schedules, any count in any layer, starting from the threshold's."""
    settings = read_options(
        config,
        set_,
        search__num_trials=trials,
        search__objective=objective,
        search__sampler=sampler,
        search__seed=seed,
        sweep__num_schedules=schedules,
        sweep__trials_at_once=trials_at_once,
        sweep__workers_per_trial=workers_per_trial,
        sweep__gpus_per_trial=gpus_per_trial,
    )
    with open_desk(workspace, "search", verbose=verbose) as desk:
        from orchestrator.pipelines import sweeps as procedure
        from orchestrator.sweeping.checks import check_sweep
        from orchestrator.training.model_lookup import resolve_teacher

        check_sweep(settings, "search", desk.progress)
        teacher = resolve_teacher(desk.workspace, checkpoint)
        if dry_run:
            procedure.show_search_plan(settings, desk, teacher, name)
        else:
            procedure.search_schedules(settings, desk, teacher, name=name)
