"""Commands that make tokens and models, one or many: prepare, pretrain, distill, the sweeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.command import setting, shared_options
from orchestrator.cli.options import (
    ALL_SETTINGS,
    ANYWHERE,
    TO_TRAIN,
    BaselinesOption,
    LocalOption,
    NameOption,
    TeacherArgument,
    TrainingDeviceOption,
    complete_models,
    complete_trial_sweeps,
    one_schedule,
    read_schedules,
    schedules_option,
    split_list,
)
from orchestrator.cli.session import Call
from orchestrator.settings.cluster import GpuModel
from orchestrator.settings.sweep import BudgetUnit, Selection
from orchestrator.settings.training import Control, Precision
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import check_name_option, locate_workspace

if TYPE_CHECKING:
    from orchestrator.reporting.output import Output

app = typer.Typer()

FROM_SCRATCH = ("data", "model", "training", "evaluation", "sweep", *TO_TRAIN)
OF_STUDENTS = ("distillation", "influence", "evaluation", "sweep", *TO_TRAIN)
OF_TEACHER_AND_STUDENTS = ("data", "model", "source_training", "training", *OF_STUDENTS)
READ_BY_KIND = {
    "threshold": OF_TEACHER_AND_STUDENTS,
    "search": ("search", *OF_TEACHER_AND_STUDENTS),
    "iterations": FROM_SCRATCH,
}
"""Kind of a sweep of a file -> the settings that it reads."""
AFTER_QUICKSTART = (
    "next, with a model: iiet-orch import MODEL, then iiet-orch pretrain --from NAME --dry-run",
    "next, with a text: iiet-orch config init my-sweep.yaml --data my-texts/",
)


@app.command("quickstart", rich_help_panel="Start")
@shared_options(reads=ALL_SETTINGS, plans=True)
def quickstart(
    call: Call,
    address: Annotated[str | None, setting("cluster.address")] = None,
    device: TrainingDeviceOption = None,
) -> "Output":
    """Run all steps on a CPU, from a generated task to the front, in minutes.

    With --config, run the sweep of that file, or of that name, instead of `demo`: `toy` reads text.

    Example: iiet-orch quickstart --workspace my-workspace
    """
    call.config = call.config or "demo"
    call.train_on(device)
    _refuse_unread_by_kind(call)
    result = _sweep(call)
    return result if call.dry_run else result.model_copy(update={"next_steps": AFTER_QUICKSTART})


@app.command("prepare", rich_help_panel="Train")
@shared_options(reads=("data", *ANYWHERE))
def prepare(
    call: Call,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text, JSON lines, Parquet or folders (default: English texts of Python)."
        ),
    ] = None,
    address: Annotated[str | None, setting("cluster.address")] = None,
) -> "Output":
    """Read a corpus, train or load its tokenizer, and write token files.

    Example: iiet-orch prepare my-texts/ --set data.vocab_size=4096
    """
    from orchestrator.data.mixture import open_data
    from orchestrator.pipelines import training

    if files:
        for change in call.changes:
            if change.partition("=")[0].strip() in ("data.source", "data.files"):
                raise UserError(f"--set {change} and FILES name different sources; leave one out")
        call.set("data.source", "files")
        call.set("data.files", files)
    folder = training.prepare(call.settings, **call.common)
    data = open_data(folder)
    texts = {part.folder: part.manifest for part in data.parts}.values()
    sides = [side for text in texts for side in (text.train, text.validation)]
    values = {
        "tokens": str(folder),
        "num_documents": sum(side.documents for side in sides) or None,
        "num_tokens": sum(side.tokens for side in sides) or None,
        "vocab_size": data.vocab_size,
    }
    return call.answer(values, [f"tokens: {folder}"])


@app.command("pretrain", rich_help_panel="Train")
@shared_options(reads=("data", "model", "training", *TO_TRAIN), plans=True)
def pretrain(
    call: Call,
    schedule: Annotated[
        list[str] | None,
        schedules_option("Corrections per layer (the iteration schedule): 3, or 2,2,1,1,1,1."),
    ] = None,
    schedule_of: Annotated[
        str | None,
        typer.Option(
            metavar="SWEEP:NAME",
            autocompletion=complete_trial_sweeps,
            help="Schedule of a trial of a finished sweep, instead of --schedule: NAME is its name "
            "in the table, or knee, best or cheapest of the front.",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            autocompletion=complete_models,
            help="Source model whose weights the training starts from: a run, a checkpoint, a "
            "model folder or hub:NAME. It determines sizes, context and tokenizer.",
        ),
    ] = None,
    continued: Annotated[
        Path | None,
        typer.Option(
            "--continue",
            metavar="RUN",
            autocompletion=complete_models,
            help="Finished run, by path or name, to continue with more --steps (wsd or constant).",
        ),
    ] = None,
    name: NameOption = None,
    local: LocalOption = False,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Share of the peak FLOP/s that --dry-run assumes."),
    ] = None,
    gpus: Annotated[int | None, setting("cluster.num_gpus")] = None,
    workers: Annotated[int | None, setting("cluster.num_workers")] = None,
    preset: Annotated[str | None, setting("model.preset")] = None,
    method: Annotated[str | None, setting("model.method")] = None,
    steps: Annotated[int | None, setting("training.num_steps")] = None,
    seed: Annotated[int | None, setting("training.seed")] = None,
    lr: Annotated[float | None, setting("training.learning_rate")] = None,
    dtype: Annotated[Precision | None, setting("training.precision")] = None,
    skip_bad_steps: Annotated[int | None, setting("training.skip_bad_steps")] = None,
    profile: Annotated[int | None, setting("training.profile_steps")] = None,
    storage: Annotated[str | None, setting("cluster.storage")] = None,
    gpu: Annotated[GpuModel | None, setting("cluster.gpu")] = None,
    address: Annotated[str | None, setting("cluster.address")] = None,
    device: TrainingDeviceOption = None,
) -> "Output":
    """Pretrain one model on GPUs or CPUs; an interrupted run resumes.

    Example: iiet-orch pretrain --preset tiny -r 2,2,1,1,1,1 --steps 500 --seed 1
    """
    call.train_on(device)
    if mfu is not None and not call.dry_run:
        raise UserError("--mfu is an assumption of the plan; use it with --dry-run")
    from orchestrator.pipelines.training import plan_pretrain, run_pretrain, schedule_of_trial

    if schedule_of is not None:
        if schedule:
            raise UserError(
                f"--schedule {schedule[0]} and --schedule-of {schedule_of}: a model has one "
                "schedule; leave one out"
            )
        schedule = [str(schedule_of_trial(schedule_of, workspace=locate_workspace(call.path)))]
    call.set("model.corrections", one_schedule(schedule))
    if continued is not None:
        if call.config is not None:
            raise UserError("--continue takes the run's own settings; use it without --config")
        from orchestrator.models.lookup import find_pretraining
        from orchestrator.settings import SETTINGS_NAME

        folder = find_pretraining(locate_workspace(call.path), continued)
        call.config = str(folder / SETTINGS_NAME)
        # A continued run is not profiled because the finished one was.
        call.options.setdefault("training.profile_steps", 0)
    from iiet.model.facts import facts_of

    used = call.settings.model.method
    _check_schedule(schedule, [used] if facts_of(used).has_corrections else [], [used])
    if source is None and continued is None and call.settings.training.source is not None:
        source = Path(call.settings.training.source)
    plan = plan_pretrain(
        call.settings,
        workspace=call.session.workspace,
        source=call.imported(source, also_folders=True),
        continued=continued,
        name=name,
        local=local,
        mfu=mfu,
    )
    return call.finish(plan, run_pretrain)


@app.command("distill", rich_help_panel="Train")
@shared_options(reads=("distillation", *TO_TRAIN), plans=True)
def distill(
    call: Call,
    teacher: TeacherArgument = None,
    schedule: Annotated[
        list[str] | None,
        schedules_option(
            "The student's corrections per layer: 1, or 2,1,1,0,0,0; x leaves a layer out, as in "
            "0*14,x*2,0*14; may be repeated for several students."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            callback=check_name_option,
            help="Name of the student's run; several students get it as prefix (default: from the "
            "content, as in a sweep, which then finds it).",
        ),
    ] = None,
    local: LocalOption = False,
    control: Annotated[Control | None, setting("distillation.control")] = None,
    steps: Annotated[int | None, setting("distillation.training.num_steps")] = None,
    seed: Annotated[int | None, setting("distillation.training.seed")] = None,
    lr: Annotated[float | None, setting("distillation.training.learning_rate")] = None,
    dtype: Annotated[Precision | None, setting("distillation.training.precision")] = None,
    profile: Annotated[int | None, setting("distillation.training.profile_steps")] = None,
    gpu: Annotated[GpuModel | None, setting("cluster.gpu")] = None,
    address: Annotated[str | None, setting("cluster.address")] = None,
    device: TrainingDeviceOption = None,
) -> "Output":
    """Distill a teacher into students: itself under cheaper iteration schedules (IIAD).

    Example: iiet-orch distill my-run -r 2,1,1,0,0,0 -r 1 --lr 5e-4
    """
    call.train_on(device)
    from orchestrator.pipelines.training import plan_distill, run_distill

    plan = plan_distill(
        call.settings,
        schedules=schedule or (),
        teacher=call.imported(teacher),
        name=name,
        local=local,
        **call.common,
    )
    return call.finish(plan, run_distill)


@app.command("sweep", rich_help_panel="Sweep")
@shared_options(reads=ALL_SETTINGS, config=False, plans=True)
def sweep_file(
    call: Call,
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A YAML file, or the name of a shipped sweep."),
    ],
    baselines: BaselinesOption = None,
    gpu: Annotated[GpuModel | None, setting("cluster.gpu")] = None,
    address: Annotated[str | None, setting("cluster.address")] = None,
    device: TrainingDeviceOption = None,
) -> "Output":
    """Run a whole sweep from its file, pretraining included.

    Example: iiet-orch sweep toy --set training.num_steps=300
    """
    call.config = file
    call.set("sweep.baseline_runs", baselines)
    call.train_on(device)
    _refuse_unread_by_kind(call)
    return _sweep(call)


@app.command("sweep-threshold", rich_help_panel="Sweep")
@shared_options(reads=("search", *OF_STUDENTS), plans=True)
def sweep_threshold(
    call: Call,
    teacher: TeacherArgument = None,
    baselines: BaselinesOption = None,
    name: NameOption = None,
    schedule: Annotated[
        list[str] | None,
        schedules_option(
            "A schedule in addition to those that influence chooses: 2,1,0, or 0*14,x*2,0*14 (x: "
            "left-out layer), or uniform, reversed or random*5; may be repeated."
        ),
    ] = None,
    leave_out_layers: Annotated[str | None, setting("sweep.leave_out_layers")] = None,
    schedules: Annotated[int | None, setting("sweep.num_schedules")] = None,
    thresholds: Annotated[str | None, setting("sweep.thresholds")] = None,
    budgets: Annotated[str | None, setting("sweep.budgets")] = None,
    cost: Annotated[BudgetUnit | None, setting("sweep.budget_unit")] = None,
    selection: Annotated[Selection | None, setting("sweep.selection")] = None,
    search: Annotated[int | None, setting("search.num_trials")] = None,
    elastic: Annotated[bool | None, setting("sweep.elastic", "--elastic")] = None,
    metric: Annotated[str | None, setting("influence.metric")] = None,
    control: Annotated[Control | None, setting("distillation.control")] = None,
    seeds: Annotated[str | None, setting("sweep.seeds")] = None,
    trials_at_once: Annotated[int | None, setting("sweep.trials_at_once")] = None,
    workers_per_trial: Annotated[int | None, setting("sweep.workers_per_trial")] = None,
    gpus_per_trial: Annotated[float | None, setting("sweep.gpus_per_trial")] = None,
    gpu: Annotated[GpuModel | None, setting("cluster.gpu")] = None,
    address: Annotated[str | None, setting("cluster.address")] = None,
    device: TrainingDeviceOption = None,
) -> "Output":
    """Prune by influence, distill and evaluate each schedule, and show the front.

    With --search, Optuna then suggests schedules outside the threshold's family.

    Example: iiet-orch sweep-threshold my-run --schedules 7 --dry-run
    """
    call.train_on(device)
    call.set("sweep.baseline_runs", baselines)
    call.set("sweep.schedules", read_schedules(schedule or []))
    if leave_out_layers is not None and leave_out_layers.isdecimal():
        call.set("sweep.leave_out_layers", int(leave_out_layers))
    call.set("sweep.kind", "threshold" if search is None else "search")
    if search is None:
        call.refuse_unread(OF_STUDENTS, reader="sweep-threshold without --search")
    if schedules is not None:
        for name_of_choice in ("thresholds", "budgets"):
            if getattr(call.settings.sweep, name_of_choice):
                raise UserError(
                    f"--schedules and --{name_of_choice} exclude each other; leave one out"
                )
    return _sweep(call, teacher or Path("newest"), name)


@app.command("sweep-iterations", rich_help_panel="Sweep")
@shared_options(reads=FROM_SCRATCH, plans=True)
def sweep_iterations(
    call: Call,
    schedule: Annotated[
        list[str] | None,
        schedules_option(
            "Corrections of the IIETs: for all layers (3), a ramp (3..0), or per layer "
            "(2,2,1,1,1,1); may be repeated."
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Peak learning rates of every model, with commas between: 1e-3,2e-3,4e-3.",
        ),
    ] = None,
    baselines: BaselinesOption = None,
    name: NameOption = None,
    methods: Annotated[str | None, setting("sweep.methods")] = None,
    steps: Annotated[int | None, setting("training.num_steps")] = None,
    asha: Annotated[bool | None, setting("sweep.asha", "--asha")] = None,
    seeds: Annotated[str | None, setting("sweep.seeds")] = None,
    trials_at_once: Annotated[int | None, setting("sweep.trials_at_once")] = None,
    workers_per_trial: Annotated[int | None, setting("sweep.workers_per_trial")] = None,
    gpus_per_trial: Annotated[float | None, setting("sweep.gpus_per_trial")] = None,
    gpu: Annotated[GpuModel | None, setting("cluster.gpu")] = None,
    address: Annotated[str | None, setting("cluster.address")] = None,
    device: TrainingDeviceOption = None,
) -> "Output":
    """Pretrain methods with several numbers of corrections on the same tokens; show one front.

    Example: iiet-orch sweep-iterations --methods vanilla,iiet -r 0 -r 1 -r 3..0 --seeds 0,1
    """
    call.train_on(device)
    call.set("sweep.kind", "iterations")
    call.set("sweep.baseline_runs", baselines)
    call.set("sweep.iterations", read_schedules(schedule or []))
    if rates is not None:
        from iiet.model.facts import METHODS

        call.set("sweep.learning_rates", dict.fromkeys(METHODS, split_list(rates)))
    from orchestrator.sweeping.models import has_counts

    all_methods = call.settings.sweep.methods
    _check_schedule(schedule, [*filter(has_counts, all_methods)], all_methods)
    return _sweep(call, None, name)


def _check_schedule(
    schedule: list[str] | None, readers: Sequence[str], methods: Sequence[str]
) -> None:
    """Refuse `--schedule` if none of the methods reads it; `readers` are those that do."""
    if schedule and not readers:
        raise UserError(
            f"--schedule {schedule[0]} is read by no method of: {', '.join(methods)}; leave it out"
        )


def _refuse_unread_by_kind(call: Call) -> None:
    kind = call.settings.sweep.kind
    call.refuse_unread(READ_BY_KIND[kind], reader=f"a sweep of kind {kind}")


def _sweep(call: Call, teacher: Path | None = None, name: str | None = None) -> "Output":
    from orchestrator.sweeping.stages import plan_sweep
    from orchestrator.sweeping.sweep import run_sweep

    plan = plan_sweep(call.settings, teacher=call.imported(teacher), name=name, **call.common)
    return plan if call.dry_run else run_sweep(plan, call.context)
