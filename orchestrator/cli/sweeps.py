"""Commands that run sweeps, or print what they would do."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.app import app
from orchestrator.cli.options import (
    MAX_COUNT,
    CheckpointArgument,
    ConfigOption,
    DryRunOption,
    GpusPerTrialOption,
    NameOption,
    SeedsOption,
    SetOption,
    TrialsAtOnceOption,
    VerboseOption,
    WorkersPerTrialOption,
    WorkspaceOption,
    numbers,
    parts,
    rates_of_all,
    read_options,
    seed_numbers,
)
from orchestrator.cli.session import open_desk


@app.command("sweep-threshold", rich_help_panel="Sweeps")
def sweep_threshold(
    checkpoint: CheckpointArgument = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    schedules: Annotated[
        int | None,
        typer.Option(min=2, max=MAX_COUNT, help="How many schedules, spread evenly over cost."),
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Thresholds instead, with commas: 0.001,0.01.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Most that each schedule may cost instead: 8,12,16.")
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="Of budgets: evaluations, flops or kv (bytes).")
    ] = None,
    selection: Annotated[str | None, typer.Option(help="threshold or knapsack.")] = None,
    metric: Annotated[str | None, typer.Option(help="cosine, relative or loss.")] = None,
    control: Annotated[
        str | None, typer.Option(help="distill, cross_entropy, pruned or scratch.")
    ] = None,
    seeds: SeedsOption = None,
    trials_at_once: TrialsAtOnceOption = None,
    workers_per_trial: WorkersPerTrialOption = None,
    gpus_per_trial: GpusPerTrialOption = None,
    name: NameOption = None,
    dry_run: DryRunOption = False,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Prune by influence, distill and evaluate each schedule, and show the front."""
    settings = read_options(
        config,
        set_,
        sweep__num_schedules=schedules,
        sweep__thresholds=numbers(thresholds, "--thresholds"),
        sweep__budgets=numbers(budgets, "--budgets"),
        sweep__budget_unit=unit,
        sweep__selection=selection,
        sweep__seeds=seed_numbers(seeds),
        influence__metric=metric,
        distillation__control=control,
        sweep__trials_at_once=trials_at_once,
        sweep__workers_per_trial=workers_per_trial,
        sweep__gpus_per_trial=gpus_per_trial,
    )
    with open_desk(workspace, "sweep-threshold", verbose=verbose) as desk:
        from orchestrator.pipelines import sweeps as procedure
        from orchestrator.pipelines.reports import show_plan
        from orchestrator.pipelines.sweep_plans import plan_thresholds
        from orchestrator.sweeping.checks import check_sweep
        from orchestrator.training.model_lookup import resolve_teacher

        check_sweep(settings, "threshold", desk.progress)
        teacher = resolve_teacher(desk.workspace, checkpoint)
        if dry_run:
            show_plan(plan_thresholds(settings, desk, teacher, name=name), settings, desk)
        else:
            procedure.sweep_thresholds(settings, desk, teacher, name=name)


@app.command("sweep-iterations", rich_help_panel="Sweeps")
def sweep_iterations(
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    iterations: Annotated[
        str | None,
        typer.Option(help="Corrections per layer of each IIET, ramps over the depth: 0,1,3,3..0."),
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Methods: vanilla,pcformer,iiet.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Optimizer steps of each.")
    ] = None,
    rates: Annotated[
        str | None, typer.Option(help="Peak learning rates of every model: 1e-3,2e-3,4e-3.")
    ] = None,
    seeds: SeedsOption = None,
    asha: Annotated[
        bool | None,
        typer.Option("--asha/--no-asha", help="End a model's worse learning rates early."),
    ] = None,
    trials_at_once: TrialsAtOnceOption = None,
    workers_per_trial: WorkersPerTrialOption = None,
    gpus_per_trial: GpusPerTrialOption = None,
    name: NameOption = None,
    dry_run: DryRunOption = False,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Pretrain methods and iteration counts on the same tokens, and show them on one front."""
    settings = read_options(
        config,
        set_,
        sweep__iterations=parts(iterations),
        sweep__methods=parts(methods),
        sweep__seeds=seed_numbers(seeds),
        sweep__learning_rates=rates_of_all(rates),
        sweep__asha=asha,
        sweep__trials_at_once=trials_at_once,
        sweep__workers_per_trial=workers_per_trial,
        sweep__gpus_per_trial=gpus_per_trial,
        training__num_steps=steps,
    )
    with open_desk(workspace, "sweep-iterations", verbose=verbose) as desk:
        from orchestrator.pipelines import sweeps as procedure
        from orchestrator.pipelines.reports import show_plan
        from orchestrator.pipelines.sweep_plans import plan_iterations

        if dry_run:
            show_plan(plan_iterations(settings, desk, name=name), settings, desk)
        else:
            procedure.sweep_iterations(settings, desk, name=name)


@app.command("sweep", rich_help_panel="Sweeps")
def run_sweep_file(
    file: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped sweep.")],
    workspace: WorkspaceOption = None,
    dry_run: DryRunOption = False,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Run a whole sweep from its file, pretraining included."""
    settings = read_options(file, set_)
    with open_desk(workspace, "sweep", verbose=verbose) as desk:
        from orchestrator.pipelines.sweep_files import run_file

        run_file(settings, desk, dry_run=dry_run)
