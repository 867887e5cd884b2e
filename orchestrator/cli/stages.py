"""Commands that are one stage each, and the whole job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.app import app
from orchestrator.cli.options import (
    CheckpointArgument,
    ConfigOption,
    GpusOption,
    SetOption,
    VerboseOption,
    WorkersOption,
    WorkspaceOption,
    read_options,
    whole_numbers,
)
from orchestrator.cli.session import open_desk, open_session


@app.command(rich_help_panel="The whole job")
def quickstart(
    workspace: WorkspaceOption = None,
    config: ConfigOption = "toy",
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Do the whole job on the English that Python carries: from text to the front, on a CPU."""
    settings = read_options(config, set_)
    with open_desk(workspace, "quickstart", verbose=verbose) as desk:
        from orchestrator import procedure

        procedure.quickstart(settings, desk)


@app.command(rich_help_panel="Stages")
def prepare(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Text, JSON lines or Parquet; the English in Python when left out."),
    ] = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Read a corpus, train or load its tokenizer, and write token shards."""
    shortcuts = {"data__source": "files", "data__files": files} if files else {}
    settings = read_options(config, set_, **shortcuts)
    with open_session(workspace, "prepare", verbose=verbose) as session:
        from orchestrator.stages.prepare import prepare as stage

        folder = stage(settings.data, session.workspace, session.progress)
        session.console.print(f"tokens: {folder}", soft_wrap=True)


@app.command(rich_help_panel="Stages")
def pretrain(
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    gpus: GpusOption = None,
    workers: WorkersOption = None,
    preset: Annotated[str | None, typer.Option(help="Size: tiny, 55m, 340m, 740m, 1.3b.")] = None,
    method: Annotated[str | None, typer.Option(help="iiet, vanilla, pcformer, ...")] = None,
    corrections: Annotated[
        str | None, typer.Option("--corrections", "-r", help="3, or one a layer: 2,2,1,1,1,1.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; made up if left out.")] = None,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Pretrain one model through Ray Train; on GPUs, on CPUs, resumed where it stopped."""
    settings = read_options(
        config,
        set_,
        cluster__num_gpus=gpus,
        cluster__num_workers=workers,
        model__preset=preset,
        model__method=method,
        model__corrections=corrections,
        training__num_steps=steps,
    )
    from orchestrator.resources import check_resources

    check_resources(settings.cluster.num_workers, settings.cluster.num_gpus)
    with open_desk(workspace, "pretrain", verbose=verbose) as desk:
        from orchestrator.stages.prepare import prepare as prepare_stage
        from orchestrator.stages.pretrain import pretrain as stage

        tokens = prepare_stage(settings.data, desk.workspace, desk.progress)
        checkpoint = stage(
            {settings.model.method: settings},
            desk.workspace,
            tokens,
            tracking=desk.tracking,
            name=name,
            progress=desk.progress,
        )[settings.model.method]
        desk.console.print(f"checkpoint: {checkpoint}", soft_wrap=True)


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
        from orchestrator.catalog import resolve_teacher, tokens_of
        from orchestrator.stages.influence import measure_influence
        from orchestrator.views import influence_view

        teacher = resolve_teacher(desk.workspace, checkpoint)
        table = measure_influence(
            teacher,
            settings.influence,
            tokens_of(teacher, desk.workspace),
            tracking=desk.tracking,
            progress=desk.progress,
        )
        desk.console.print(influence_view(table))


@app.command(rich_help_panel="Stages")
def distill(
    schedule: Annotated[
        str, typer.Argument(help="The student's corrections per layer: 1, or 2,1,1,0,0,0.")
    ],
    checkpoint: CheckpointArgument = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    control: Annotated[
        str | None, typer.Option(help="distill, cross_entropy, pruned or scratch.")
    ] = None,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Distill a teacher into itself under a cheaper iteration schedule (IIAD)."""
    settings = read_options(config, set_, distillation__control=control)
    with open_desk(workspace, "distill", verbose=verbose) as desk:
        from orchestrator.catalog import resolve_teacher, tokens_of
        from orchestrator.stages.distill import distill as stage

        teacher = resolve_teacher(desk.workspace, checkpoint)
        tokens = tokens_of(teacher, desk.workspace)
        student = stage(
            settings,
            desk.workspace,
            teacher,
            schedule,
            tokens,
            tracking=desk.tracking,
            progress=desk.progress,
        )
        desk.console.print(f"checkpoint: {student}", soft_wrap=True)


@app.command(rich_help_panel="Stages")
def evaluate(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Checkpoints, runs or Hugging Face folders, shown side by side; the workspace's "
            "newest IIET when left out."
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
        int | None, typer.Option(help="Items of each task, from its first on; all by default.")
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
        from orchestrator import procedure

        procedure.evaluate_and_show(
            settings, desk, checkpoints, schedule, trust_remote_code=trust_remote_code
        )


@app.command(rich_help_panel="Stages")
def benchmark(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Checkpoints, runs or model folders; the workspace's newest IIET when left out."
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
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded behind it.")] = 32,
    repetitions: Annotated[int, typer.Option(min=1, help="Measurements of each, in turns.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch on a CPU.")] = 1,
    verbose: VerboseOption = False,
) -> None:
    """Measure latency, throughput and memory, and hold them against the cost model."""
    batches = whole_numbers(batch_sizes, "--batch-sizes")
    prompts = whole_numbers(contexts, "--contexts")
    with open_desk(workspace, "benchmark", verbose=verbose) as desk:
        from orchestrator.analysis import cost_tables
        from orchestrator.analysis.measured_cost import Conditions
        from orchestrator.analysis.subject import open_subjects
        from orchestrator.stages.benchmark import benchmark as stage
        from orchestrator.stages.benchmark import family_of, usual_contexts

        subjects = open_subjects(desk.workspace, checkpoints, schedule)
        if len(subjects) == 1 and not schedule:
            subjects = family_of(subjects[0])
        conditions = Conditions(
            batch_sizes=batches or (),
            contexts=prompts or usual_contexts(subjects, new_tokens),
            new_tokens=new_tokens,
            repetitions=repetitions,
            num_threads=threads,
        )
        found = stage(
            subjects,
            desk.workspace,
            conditions,
            tracking=desk.tracking,
            progress=desk.progress,
        )
        console = desk.console
        for table in cost_tables.all_tables(found.costs):
            console.print(table)
        how = cost_tables.conditions_line(conditions, device=found.device, dtype=found.dtype)
        for line in [*cost_tables.sentences(found.costs), how, f"written to {found.path}"]:
            console.print(f"  {line}", markup=False, soft_wrap=True)
