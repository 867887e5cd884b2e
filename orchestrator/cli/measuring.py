"""Commands that measure models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.app import app
from orchestrator.cli.completion import complete_models
from orchestrator.cli.json_output import JsonOption
from orchestrator.cli.option_values import parse_whole_numbers, read_options
from orchestrator.cli.options import (
    MAX_COUNT,
    AddressOption,
    ApplyChatTemplateOption,
    BatchSizeOption,
    ChatTemplateOption,
    CheckpointArgument,
    ConfigOption,
    DeviceOption,
    DryRunOption,
    IncludePathOption,
    LimitOption,
    MetricOption,
    NumFewshotOption,
    SchedulesOption,
    SetOption,
    SuiteOption,
    TrustRemoteCodeOption,
    VerboseOption,
    WorkspaceOption,
)
from orchestrator.cli.session import Session, open_session
from orchestrator.terminal.render import print_line

if TYPE_CHECKING:
    from orchestrator.records.evaluation import EvaluationResult


@app.command(rich_help_panel="Measure")
def influence(
    checkpoint: CheckpointArgument = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    metric: MetricOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    address: AddressOption = None,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Measure how much each correction of each layer matters.

    Example: iiet-orch influence my-run --metric loss
    """
    settings = read_options(
        config, set_, influence__metric=metric, cluster__address=address, cluster__device=device
    )
    with open_session(workspace, "influence", verbose=verbose, as_json=as_json) as session:
        from orchestrator.pipelines.influence import measure_influence
        from orchestrator.reporting.influence_tables import influence_terminal_table

        result = measure_influence(settings, model=checkpoint, **session.common)
        if as_json:
            session.print_json(result.to_json())
        else:
            session.console.print(influence_terminal_table(result.table))


@app.command(rich_help_panel="Measure")
def evaluate(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Checkpoints, runs (by path or name), Hugging Face folders or hub:OWNER/NAME, "
            "side by side; by default the newest IIET or imported model.",
            autocompletion=complete_models,
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    suite: SuiteOption = None,
    include_path: IncludePathOption = None,
    schedule: SchedulesOption = None,
    num_fewshot: NumFewshotOption = None,
    apply_chat_template: ApplyChatTemplateOption = False,
    chat_template: ChatTemplateOption = None,
    limit: LimitOption = None,
    batch_size: BatchSizeOption = None,
    log_samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write results and samples in lm-eval's files, for other tools."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    dry_run: DryRunOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    address: AddressOption = None,
    set_: SetOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Measure accuracy and bits per byte with lm-eval; resumes after an interruption.

    Example: iiet-orch evaluate my-run -r 2 -r 2,1,1,0,0,0 --suite heldout
    """
    settings = read_options(
        config,
        set_,
        evaluation__suite=suite,
        evaluation__include_path=str(include_path) if include_path else None,
        evaluation__num_fewshot=num_fewshot,
        evaluation__apply_chat_template=chat_template or apply_chat_template or None,
        evaluation__limit=limit,
        evaluation__batch_size=batch_size,
        cluster__address=address,
        cluster__device=device,
    )
    with open_session(
        workspace,
        "evaluate",
        verbose=verbose,
        dry_run=dry_run,
        as_json=as_json,
        must_write=False,
    ) as session:
        from orchestrator.pipelines import evaluating

        options = {"models": checkpoints or [], "schedules": schedule or [], **session.common}
        if dry_run:
            from orchestrator.pipelines.evaluation_dry_runs import plan_evaluation
            from orchestrator.reporting.price_table import two_column_table

            plan = plan_evaluation(settings, **options)
            if as_json:
                session.print_json(plan.to_json())
            else:
                session.console.print(two_column_table("Plan of the evaluation", plan.rows))
            return
        result = evaluating.evaluate(
            settings, log_samples=log_samples, trust_remote_code=trust_remote_code, **options
        )
        if as_json:
            session.print_json(result.to_json())
        _print_evaluations(session, result.evaluations, with_table=not as_json)


def _print_evaluations(
    session: Session, evaluations: Mapping[str, EvaluationResult], *, with_table: bool
) -> None:
    from orchestrator.reporting.evaluation_tables import (
        average_notes,
        evaluation_table,
        tasks_with_other_items,
    )

    if with_table:
        session.console.print(evaluation_table(evaluations))
        for sentence in average_notes(evaluations):
            print_line(session.console, f"  {sentence}")
    if different := tasks_with_other_items(list(evaluations.values())):
        session.progress.note(
            f"not comparable: {', '.join(different)} had other items for some of the models, "
            "which were trained on different tokens"
        )


@app.command(rich_help_panel="Measure")
def benchmark(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Checkpoints, runs (by path or name), model folders or hub:OWNER/NAME; the newest "
            "IIET or imported model by default.",
            autocompletion=complete_models,
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            "--schedule",
            "-r",
            help="Iteration schedule; may be repeated. One IIET without it: from full to none.",
        ),
    ] = None,
    batch_sizes: Annotated[
        str, typer.Option(help="Comma-separated numbers of rows that are decoded together.")
    ] = "1,8",
    contexts: Annotated[
        str | None, typer.Option(help="Tokens of the prompt (default: 32 and half the context).")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=2, max=MAX_COUNT, help="Tokens decoded after it.")
    ] = 32,
    repetitions: Annotated[
        int, typer.Option(min=1, max=10_000, help="Measurements of each model, in turns.")
    ] = 9,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of PyTorch on a CPU.")] = 1,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    address: AddressOption = None,
    verbose: VerboseOption = None,
) -> None:
    """Measure latency, throughput and memory, and compare them with the cost model.

    Example: iiet-orch benchmark my-run --batch-sizes 1,8
    """
    batches = parse_whole_numbers(batch_sizes, "--batch-sizes")
    prompts = parse_whole_numbers(contexts, "--contexts")
    settings = read_options(None, [], cluster__address=address, cluster__device=device)
    with open_session(workspace, "benchmark", verbose=verbose, as_json=as_json) as session:
        from orchestrator.evaluation.cost_measurement import MeasurementSettings
        from orchestrator.pipelines import benchmarking
        from orchestrator.reporting import benchmark_tables

        found = benchmarking.benchmark(
            cluster=settings.cluster,
            models=checkpoints or [],
            schedules=schedule or [],
            conditions=MeasurementSettings(
                batch_sizes=batches or (),
                contexts=prompts or (),
                new_tokens=new_tokens,
                repetitions=repetitions,
                num_threads=threads,
            ),
            **session.common,
        )
        if as_json:
            session.print_json({"path": str(found.path), **found.to_json()})
            return
        for table in benchmark_tables.cost_and_share_tables(found.costs):
            session.console.print(table)
        lines = benchmark_tables.benchmark_sentences(found.costs)
        how = benchmark_tables.conditions_sentence(
            found.conditions, device=found.device, dtype=found.dtype
        )
        for line in (*lines, how, f"written to {found.path}"):
            print_line(session.console, f"  {line}")
