"""Commands that measure models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.app import app
from orchestrator.cli.options import (
    MAX_COUNT,
    CheckpointArgument,
    ConfigOption,
    SetOption,
    VerboseOption,
    WorkspaceOption,
    read_options,
    whole_numbers,
)
from orchestrator.cli.session import open_desk
from orchestrator.terminal.layout import print_line


@app.command(rich_help_panel="Stages")
def influence(
    checkpoint: CheckpointArgument = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    metric: Annotated[str | None, typer.Option(help="cosine, relative or loss.")] = None,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Measure how much each correction of each layer matters."""
    settings = read_options(config, set_, influence__metric=metric)
    with open_desk(workspace, "influence", verbose=verbose) as desk:
        from orchestrator.pipelines.influence import measure_influence
        from orchestrator.reporting.influence_tables import influence_terminal_table
        from orchestrator.training.model_lookup import resolve_teacher, tokens_folder_of

        teacher = resolve_teacher(desk.workspace, checkpoint)
        table = measure_influence(
            teacher,
            settings.influence,
            tokens_folder_of(teacher, desk.workspace),
            tracking=desk.tracking,
            progress=desk.progress,
        )
        desk.console.print(influence_terminal_table(table))


@app.command(rich_help_panel="Stages")
def evaluate(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Checkpoints, runs (by path or name) or Hugging Face folders, side by side; the "
            "newest IIET or imported model by default."
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    suite: Annotated[
        str | None, typer.Option(help="heldout, paper, or names of lm-eval tasks with commas.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with lm-eval task files of your own.")
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option("--schedule", "-r", help="Another iteration schedule; may be repeated."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Solved examples before each item.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Items of each task, from its first on; all by default."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in one pass.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that lies in a model folder.")
    ] = False,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Measure accuracy and bits per byte with lm-eval."""
    settings = read_options(
        config,
        set_,
        evaluation__suite=suite,
        evaluation__include_path=str(include_path) if include_path else None,
        evaluation__num_fewshot=num_fewshot,
        evaluation__limit=limit,
        evaluation__batch_size=batch_size,
    )
    with open_desk(workspace, "evaluate", verbose=verbose) as desk:
        from orchestrator.pipelines import sweeps as procedure

        procedure.evaluate_and_show(
            settings, desk, checkpoints, schedule, trust_remote_code=trust_remote_code
        )


@app.command(rich_help_panel="Stages")
def benchmark(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Checkpoints, runs (by path or name) or model folders; the newest IIET or "
            "imported model by default."
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
    batch_sizes: Annotated[str, typer.Option(help="Rows decoded together, with commas.")] = "1,8",
    contexts: Annotated[
        str | None, typer.Option(help="Tokens of the prompt: 32 and half the context if left out.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=2, max=MAX_COUNT, help="Tokens decoded behind it.")
    ] = 32,
    repetitions: Annotated[
        int, typer.Option(min=1, max=10_000, help="Measurements of each, in turns.")
    ] = 9,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of PyTorch on a CPU.")] = 1,
    verbose: VerboseOption = False,
) -> None:
    """Measure latency, throughput and memory, and hold them against the cost model."""
    batches = whole_numbers(batch_sizes, "--batch-sizes")
    prompts = whole_numbers(contexts, "--contexts")
    with open_desk(workspace, "benchmark", verbose=verbose) as desk:
        from orchestrator.evaluation.cost_measurement import MeasurementSettings
        from orchestrator.evaluation.evaluated_model import open_models
        from orchestrator.pipelines.benchmarking import benchmark as stage
        from orchestrator.pipelines.benchmarking import family_of, usual_contexts
        from orchestrator.reporting import benchmark_tables

        models = open_models(desk.workspace, checkpoints, schedule, warn=desk.progress.note)
        if len(models) == 1 and not schedule:
            models = family_of(models[0])
        conditions = MeasurementSettings(
            batch_sizes=batches or (),
            contexts=prompts or usual_contexts(models, new_tokens),
            new_tokens=new_tokens,
            repetitions=repetitions,
            num_threads=threads,
        )
        found = stage(
            models,
            desk.workspace,
            conditions,
            tracking=desk.tracking,
            progress=desk.progress,
        )
        console = desk.console
        for table in benchmark_tables.cost_and_share_tables(found.costs):
            console.print(table)
        how = benchmark_tables.conditions_sentence(
            conditions, device=found.device, dtype=found.dtype
        )
        for line in [
            *benchmark_tables.benchmark_sentences(found.costs),
            how,
            f"written to {found.path}",
        ]:
            print_line(console, f"  {line}")
