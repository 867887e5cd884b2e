"""The command that searches iteration schedules."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from orchestrator.cli.app import app
from orchestrator.cli.json_output import JsonOption
from orchestrator.cli.option_values import read_options, split_names
from orchestrator.cli.options import (
    MAX_COUNT,
    MAX_SEED,
    AddressOption,
    CheckpointArgument,
    ConfigOption,
    DryRunOption,
    GpusPerTrialOption,
    LoggerOption,
    NameOption,
    SetOption,
    TrainingDeviceOption,
    TrialsAtOnceOption,
    VerboseOption,
    WaitForGpusOption,
    WorkersPerTrialOption,
    WorkspaceOption,
)
from orchestrator.cli.sweeps import run_sweep_command


@app.command("search", rich_help_panel="Sweeps")
def search_schedules(
    checkpoint: CheckpointArgument = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_COUNT,
            help="Maximum number of schedules to try after those of the threshold sweep.",
        ),
    ] = None,
    quality: Annotated[
        Literal["accuracy", "bits", "loss"] | None,
        typer.Option(help="Quality to weigh against NFE."),
    ] = None,
    sampler: Annotated[
        Literal["nsga2", "tpe", "gp"] | None, typer.Option(help="Optuna's sampler.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Random seed of the suggestions.")
    ] = None,
    schedules: Annotated[
        int | None,
        typer.Option(min=2, max=MAX_COUNT, help="Schedules of the threshold sweep to start from."),
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
    """Search schedules with any count in any layer, starting from those of a threshold sweep.

    Example: iiet-orch search my-run --trials 30 --sampler tpe
    """
    wanted = None
    if quality:
        from orchestrator.reporting.front_axes import QUALITIES

        wanted = QUALITIES[quality].removeprefix("quality/")
    settings = read_options(
        config,
        set_,
        train_on=device,
        sweep__kind="search",
        search__num_trials=trials,
        search__objective=wanted,
        search__sampler=sampler,
        search__seed=seed,
        sweep__num_schedules=schedules,
        sweep__trials_at_once=trials_at_once,
        sweep__workers_per_trial=workers_per_trial,
        sweep__gpus_per_trial=gpus_per_trial,
        cluster__address=address,
        tracking__loggers=split_names(logger),
        cluster__wait_for_gpus=wait_for_gpus,
    )
    run_sweep_command(
        settings,
        "search",
        workspace,
        teacher=checkpoint or "newest",
        name=name,
        dry_run=dry_run,
        as_json=as_json,
        verbose=verbose,
    )
