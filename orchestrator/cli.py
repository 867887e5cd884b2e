"""The command line: thin commands that read settings, call stages and print one table.

Nothing heavy is imported at the top, so that `--help` is instant. Each command runs inside
`_session`, which opens the workspace, sends the libraries' noise to a log, draws progress, and
turns the four ways a command can end into exit codes: 0 done, 1 failed, 2 the user's mistake, 130
interrupted with the state saved.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from orchestrator.errors import Interrupted, StageFailed, UserError

app = typer.Typer(
    name="iiet-orch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pretrain, sweep and distill iterative Transformers; show accuracy against their cost.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

WorkspaceOption = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        "-w",
        help="Folder for all that is made; IIET_WORKSPACE, else ./iiet-workspace.",
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="Settings: a YAML file, or the name of a shipped sweep."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="A setting, as training.num_steps=500."),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Let the libraries' own output through.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Data-parallel workers."),
]
GpusOption = Annotated[int | None, typer.Option("--gpus", min=0, help="GPUs, one worker each.")]
CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(help="Checkpoint or run folder; the workspace's newest IIET when left out."),
]
TrialsAtOnceOption = Annotated[
    int | None, typer.Option(min=1, help="Trials side by side; as many as CPUs if left out.")
]
NameOption = Annotated[str | None, typer.Option(help="Name of the sweep; made up if left out.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and its price.")]


@dataclass(frozen=True)
class Session:
    """What a command works with."""

    workspace: Any
    progress: Any
    console: Console


@contextmanager
def _session(workspace: Path | None, command: str, *, verbose: bool) -> Iterator[Session]:
    """Open the workspace, send noise to its log, and say on failure where the log lies."""
    from orchestrator.console import terminal_progress
    from orchestrator.logs import command_log
    from orchestrator.workspace import open_workspace

    space = open_workspace(workspace)
    console = Console(highlight=False)
    with command_log(space.logs, command, verbose=verbose) as log:
        try:
            with terminal_progress(console) as progress:
                yield Session(space, progress, console)
        except (UserError, Interrupted):
            raise
        except KeyboardInterrupt:
            raise Interrupted from None
        except StageFailed as error:
            where = f"\nThe log is {log.path}" if log.path else ""
            raise StageFailed(f"{error}{where}") from error
        except Exception as error:
            if log.path is None:
                raise
            with log.path.open("a", encoding="utf-8") as file:
                traceback.print_exception(error, file=file)
            raise StageFailed(
                f"{type(error).__name__}: {error}\nThe traceback is in {log.path}"
            ) from error


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 failed, 2 the user's mistake, 130 interrupted.
    """
    try:
        app(arguments, prog_name="iiet-orch")
    except SystemExit as end:  # Typer's own way to end, after it has shown what was wrong
        return end.code if isinstance(end.code, int) else 0
    except (UserError, StageFailed) as error:
        _complain(str(error))
        return 2 if isinstance(error, UserError) else 1
    except Interrupted as error:
        _complain(str(error) or "interrupted; the same command goes on from the last saved state")
        return 130
    return 0


def _complain(text: str) -> None:
    Console(stderr=True, highlight=False).print(f"iiet-orch: {text}", markup=False, soft_wrap=True)


def _settings(config: str | None, assignments: list[str] | None, **shortcuts: Any) -> Any:
    """Read the settings: file, then --set, then the command's own options."""
    from orchestrator.settings import read_settings
    from orchestrator.shipped import find_settings_file

    path = find_settings_file(config) if config else None
    named = [
        f"{name.replace('__', '.')}={_as_yaml(value)}"
        for name, value in shortcuts.items()
        if value is not None
    ]
    return read_settings(path, [*(assignments or []), *named])


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} takes numbers with commas between them; got {text!r}") from None


def _as_yaml(value: Any) -> str:
    # JSON is YAML: texts that look like numbers or lists keep their type.
    return json.dumps(value)


@contextmanager
def _desk(workspace: Path | None, command: str, *, verbose: bool) -> Iterator[Any]:
    """Open a session with MLflow's store, for commands that are more than one stage."""
    with _session(workspace, command, verbose=verbose) as session:
        from orchestrator.procedure import Desk
        from orchestrator.tracking import open_tracking

        tracking = open_tracking(session.workspace, warn=session.progress.note)
        yield Desk(session.workspace, tracking, session.progress, session.console)


@app.command(rich_help_panel="The whole job")
def quickstart(
    workspace: WorkspaceOption = None,
    config: ConfigOption = "toy",
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Do the whole job on the English that Python carries: from text to the front, on a CPU."""
    settings = _settings(config, set_)
    with _desk(workspace, "quickstart", verbose=verbose) as desk:
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
    settings = _settings(config, set_, **shortcuts)
    with _session(workspace, "prepare", verbose=verbose) as session:
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
    settings = _settings(
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
    with _desk(workspace, "pretrain", verbose=verbose) as desk:
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
    settings = _settings(config, set_, influence__metric=metric)
    with _desk(workspace, "influence", verbose=verbose) as desk:
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
    settings = _settings(config, set_, distillation__control=control)
    with _desk(workspace, "distill", verbose=verbose) as desk:
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
    checkpoint: CheckpointArgument = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    suite: Annotated[
        str | None, typer.Option(help="heldout, or names of lm-eval tasks with commas.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with lm-eval task files of your own.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", "-r", help="Another iteration schedule.")
    ] = None,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Measure accuracy and bits per byte with lm-eval."""
    settings = _settings(
        config,
        set_,
        evaluation__suite=suite,
        evaluation__include_path=str(include_path) if include_path else None,
    )
    with _desk(workspace, "evaluate", verbose=verbose) as desk:
        from orchestrator import procedure

        procedure.evaluate_and_show(settings, desk, checkpoint, schedule)


@app.command("sweep-threshold", rich_help_panel="Sweeps")
def sweep_threshold(
    checkpoint: CheckpointArgument = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    schedules: Annotated[
        int | None, typer.Option(min=2, help="How many schedules, spread evenly over cost.")
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Thresholds instead, with commas: 0.001,0.01.")
    ] = None,
    trials_at_once: TrialsAtOnceOption = None,
    name: NameOption = None,
    dry_run: DryRunOption = False,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Prune by influence, distill and evaluate each schedule, and show the front."""
    settings = _settings(
        config,
        set_,
        sweep__num_schedules=schedules,
        sweep__thresholds=_numbers(thresholds, "--thresholds"),
        sweep__trials_at_once=trials_at_once,
    )
    with _desk(workspace, "sweep-threshold", verbose=verbose) as desk:
        from orchestrator import procedure
        from orchestrator.catalog import resolve_teacher

        teacher = resolve_teacher(desk.workspace, checkpoint)
        if dry_run:
            plan = procedure.plan_thresholds(settings, desk, teacher, name=name)
            procedure.show_plan(plan, desk)
        else:
            procedure.sweep_thresholds(settings, desk, teacher, name=name)


@app.command("sweep-iterations", rich_help_panel="Sweeps")
def sweep_iterations(
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    iterations: Annotated[
        str | None, typer.Option(help="Corrections per layer of each IIET: 0,1,2,3.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Methods: vanilla,pcformer,iiet.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each.")] = None,
    trials_at_once: TrialsAtOnceOption = None,
    name: NameOption = None,
    dry_run: DryRunOption = False,
    set_: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Pretrain methods and iteration counts on the same tokens, and show them on one front."""
    counts = _numbers(iterations, "--iterations")
    settings = _settings(
        config,
        set_,
        sweep__iterations=[int(c) for c in counts] if counts else None,
        sweep__methods=methods.split(",") if methods else None,
        sweep__trials_at_once=trials_at_once,
        training__num_steps=steps,
    )
    with _desk(workspace, "sweep-iterations", verbose=verbose) as desk:
        from orchestrator import procedure

        if dry_run:
            procedure.show_plan(procedure.plan_iterations(settings, desk, name=name), desk)
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
    settings = _settings(file, set_)
    with _desk(workspace, "sweep", verbose=verbose) as desk:
        from orchestrator import procedure

        procedure.run_file(settings, desk, dry_run=dry_run)


@app.command("report", rich_help_panel="Results")
def show_report(
    sweep: Annotated[
        str | None, typer.Argument(help="Name of a sweep; the newest when left out.")
    ] = None,
    workspace: WorkspaceOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Write and show a sweep's front again: table, pictures, one HTML page."""
    with _desk(workspace, "report", verbose=verbose) as desk:
        from orchestrator import procedure

        procedure.report_and_show(desk, sweep)


@app.command(rich_help_panel="Results")
def ui(
    workspace: WorkspaceOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open MLflow on 127.0.0.1 and print links that land on the runs and fronts."""
    from orchestrator.ui import serve
    from orchestrator.workspace import open_workspace

    serve(open_workspace(workspace), port=port)


@app.command(rich_help_panel="Results")
def sync(workspace: WorkspaceOption = None, verbose: VerboseOption = False) -> None:
    """Tell MLflow what it missed while it did not answer."""
    with _desk(workspace, "sync", verbose=verbose) as desk:
        desk.console.print(f"{desk.tracking.replay()} records delivered")


if __name__ == "__main__":
    main()
