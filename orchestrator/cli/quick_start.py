"""The command that runs all steps."""

from __future__ import annotations

from orchestrator.cli.app import app
from orchestrator.cli.json_output import JsonOption
from orchestrator.cli.option_values import read_options, split_names
from orchestrator.cli.options import (
    AddressOption,
    ConfigOption,
    DryRunOption,
    LoggerOption,
    SetOption,
    TrainingDeviceOption,
    VerboseOption,
    WorkspaceOption,
)
from orchestrator.cli.printing import show
from orchestrator.cli.session import open_session


@app.command(rich_help_panel="All steps")
def quickstart(
    workspace: WorkspaceOption = None,
    config: ConfigOption = "demo",
    device: TrainingDeviceOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    address: AddressOption = None,
    logger: LoggerOption = None,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Run all steps on a CPU, from a generated task to the front, in minutes.

    With --config, run the sweep of that file, or of that name: `toy` reads text.

    Example: iiet-orch quickstart --workspace my-workspace
    """
    settings = read_options(
        config,
        set_,
        train_on=device,
        cluster__address=address,
        tracking__loggers=split_names(logger),
    )
    with open_session(
        workspace, "quickstart", verbose=verbose, dry_run=dry_run, as_json=as_json
    ) as session:
        from orchestrator.pipelines import sweeps

        run = sweeps.plan_sweep if dry_run else sweeps.sweep
        show(session, run(settings, **session.common), as_json=as_json)
