"""Commands that run sweeps, or print what they would do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from orchestrator.cli.app import app
from orchestrator.cli.json_output import JsonOption
from orchestrator.cli.option_values import (
    parse_numbers,
    parse_rates,
    parse_schedules,
    parse_seeds,
    read_options,
    split_names,
)
from orchestrator.cli.options import (
    MAX_COUNT,
    AddressOption,
    CheckpointArgument,
    ConfigOption,
    ControlOption,
    DistilledBaselinesOption,
    DryRunOption,
    GpusPerTrialOption,
    LoggerOption,
    MethodsOption,
    MetricOption,
    NameOption,
    SeedsOption,
    SetOption,
    SettingsFileArgument,
    TrainingDeviceOption,
    TrialsAtOnceOption,
    VerboseOption,
    WaitForGpusOption,
    WorkersPerTrialOption,
    WorkspaceOption,
)
from orchestrator.cli.printing import show
from orchestrator.cli.session import open_session


@app.command("sweep-threshold", rich_help_panel="Sweeps")
def sweep_threshold(
    checkpoint: CheckpointArgument = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    schedules: Annotated[
        int | None,
        typer.Option(min=2, max=MAX_COUNT, help="Number of schedules, spread evenly over cost."),
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Comma-separated thresholds instead: 0.001,0.01.")
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Comma-separated budgets instead, one schedule each: 8,12,16."),
    ] = None,
    cost: Annotated[
        Literal["evaluations", "flops", "kv"] | None,
        typer.Option(help="Cost that the budgets are of; kv is in bytes."),
    ] = None,
    selection: Annotated[
        Literal["threshold", "knapsack"] | None,
        typer.Option(help="Schedules to choose from: the nested family, or the best at each cost."),
    ] = None,
    distilled_baselines: DistilledBaselinesOption = None,
    elastic: Annotated[
        bool | None,
        typer.Option("--elastic/--no-elastic", help="Train one set of weights for all schedules."),
    ] = None,
    compare: Annotated[
        bool | None,
        typer.Option("--compare/--no-compare", help="With --elastic, train students, too."),
    ] = None,
    metric: MetricOption = None,
    control: ControlOption = None,
    seeds: SeedsOption = None,
    trials_at_once: TrialsAtOnceOption = None,
    workers_per_trial: WorkersPerTrialOption = None,
    gpus_per_trial: GpusPerTrialOption = None,
    name: NameOption = None,
    device: TrainingDeviceOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    address: AddressOption = None,
    logger: LoggerOption = None,
    wait_for_gpus: WaitForGpusOption = None,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Prune by influence, distill and evaluate each schedule, and show the front.

    Example: iiet-orch sweep-threshold my-run --schedules 7 --dry-run
    """
    settings = read_options(
        config,
        set_,
        train_on=device,
        sweep__kind="threshold",
        sweep__num_schedules=schedules,
        sweep__thresholds=parse_numbers(thresholds, "--thresholds"),
        sweep__budgets=parse_numbers(budgets, "--budgets"),
        sweep__budget_unit=cost,
        sweep__selection=selection,
        sweep__distilled_baselines=split_names(distilled_baselines),
        sweep__elastic=elastic,
        sweep__compare=compare,
        sweep__seeds=parse_seeds(seeds),
        influence__metric=metric,
        distillation__control=control,
        sweep__trials_at_once=trials_at_once,
        sweep__workers_per_trial=workers_per_trial,
        sweep__gpus_per_trial=gpus_per_trial,
        cluster__address=address,
        tracking__loggers=split_names(logger),
        cluster__wait_for_gpus=wait_for_gpus,
    )
    run_sweep_command(
        settings,
        "sweep-threshold",
        workspace,
        teacher=checkpoint or "newest",
        name=name,
        dry_run=dry_run,
        as_json=as_json,
        verbose=verbose,
    )


@app.command("sweep-iterations", rich_help_panel="Sweeps")
def sweep_iterations(
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            "--schedule",
            "-r",
            help="Iteration schedule of an IIET: 2, or 2,1,1,0,0,0, or a ramp over the layers, "
            "3..0; may be repeated.",
        ),
    ] = None,
    methods: MethodsOption = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Optimizer steps of each model.")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="Comma-separated peak learning rates of every model: 1e-3,2e-3,4e-3."),
    ] = None,
    seeds: SeedsOption = None,
    asha: Annotated[
        bool | None,
        typer.Option("--asha/--no-asha", help="Stop a model's worse learning rates early."),
    ] = None,
    trials_at_once: TrialsAtOnceOption = None,
    workers_per_trial: WorkersPerTrialOption = None,
    gpus_per_trial: GpusPerTrialOption = None,
    name: NameOption = None,
    device: TrainingDeviceOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    address: AddressOption = None,
    logger: LoggerOption = None,
    wait_for_gpus: WaitForGpusOption = None,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Pretrain methods and iteration counts on the same tokens and show them on one front.

    Example: iiet-orch sweep-iterations --methods vanilla,iiet -r 0 -r 1 -r 3..0 --seeds 0,1
    """
    settings = read_options(
        config,
        set_,
        train_on=device,
        sweep__kind="iterations",
        sweep__iterations=parse_schedules(schedule),
        sweep__methods=split_names(methods),
        sweep__seeds=parse_seeds(seeds),
        sweep__learning_rates=parse_rates(rates),
        sweep__asha=asha,
        sweep__trials_at_once=trials_at_once,
        sweep__workers_per_trial=workers_per_trial,
        sweep__gpus_per_trial=gpus_per_trial,
        training__num_steps=steps,
        cluster__address=address,
        tracking__loggers=split_names(logger),
        cluster__wait_for_gpus=wait_for_gpus,
    )
    run_sweep_command(
        settings,
        "sweep-iterations",
        workspace,
        name=name,
        dry_run=dry_run,
        as_json=as_json,
        verbose=verbose,
    )


@app.command("sweep", rich_help_panel="Sweeps")
def sweep_file(
    file: SettingsFileArgument,
    workspace: WorkspaceOption = None,
    device: TrainingDeviceOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    address: AddressOption = None,
    logger: LoggerOption = None,
    wait_for_gpus: WaitForGpusOption = None,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Run a whole sweep from its file, pretraining included.

    Example: iiet-orch sweep toy --set training.num_steps=300
    """
    settings = read_options(
        file,
        set_,
        train_on=device,
        cluster__address=address,
        cluster__wait_for_gpus=wait_for_gpus,
        tracking__loggers=split_names(logger),
    )
    run_sweep_command(
        settings, "sweep", workspace, dry_run=dry_run, as_json=as_json, verbose=verbose
    )


def run_sweep_command(
    settings: Any,
    command: str,
    workspace: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
    verbose: bool | None,
    teacher: Path | str | None = None,
    name: str | None = None,
) -> None:
    with open_session(
        workspace, command, verbose=verbose, dry_run=dry_run, as_json=as_json
    ) as session:
        options = {**session.common, "teacher": teacher, "name": name}
        from orchestrator.pipelines import sweeps

        run = sweeps.plan_sweep if dry_run else sweeps.sweep
        show(session, run(settings, **options), as_json=as_json)
