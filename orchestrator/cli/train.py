"""Commands that make tokens and models, one or many: prepare, pretrain, distill, the sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.command import Command
from orchestrator.cli.options import (
    ONLY_MEASUREMENTS,
    ONLY_SWEEPS,
    ONLY_TRAININGS,
    BaselinesOption,
    LocalOption,
    NameOption,
    SchedulesOption,
    TeacherArgument,
    complete_models,
    complete_trial_sweeps,
    one_schedule,
    read_schedules,
    split_list,
)
from orchestrator.cli.session import Call
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import locate_workspace

if TYPE_CHECKING:
    from orchestrator.reporting.result import Result

HERE = {"--address": "cluster.address"}
MEASURED_LATER = {
    "influence": "`iiet-orch influence` measures the trained model",
    "evaluation": "`iiet-orch evaluate` measures the trained model",
}
OF_THE_TEACHER = {
    "data": "students read the tokens that their teacher was trained on",
    "model": "students have their teacher's shape",
    "training": "the teacher is trained already; distillation.training is the students' recipe",
    "source_training": "the teacher is trained already",
}
UNREAD_WITHOUT_DROPPING = {"influence": "only --drop-layers reads it", **ONLY_MEASUREMENTS}
"""What `distill` does not read without `--drop-layers`: it measures nothing then."""
ONLY_SEARCHES = {"search": "only a sweep of kind search reads it"}
FROM_SCRATCH = dict.fromkeys(
    ("source_training", "distillation", "influence"), "all models are trained from scratch"
)
UNREAD_BY_KIND: dict[str, dict[str, str]] = {
    "threshold": ONLY_SEARCHES | ONLY_MEASUREMENTS,
    "search": ONLY_MEASUREMENTS,
    "iterations": FROM_SCRATCH | ONLY_SEARCHES | ONLY_MEASUREMENTS,
}
"""Kind of a sweep -> sections and settings that it does not read, and what decides instead."""
AFTER_QUICKSTART = (
    "next, with a model: iiet-orch import MODEL, then iiet-orch pretrain --from NAME --dry-run",
    "next, with a text: iiet-orch config init my-sweep.yaml --data my-texts/",
)
TRIALS = {
    "--seeds": "sweep.seeds",
    "--trials-at-once": "sweep.trials_at_once",
    "--workers-per-trial": "sweep.workers_per_trial",
    "--gpus-per-trial": "sweep.gpus_per_trial",
}


@Command("quickstart", group="Start", options=HERE, config="option", trains=True, plans=True)
def quickstart(call: Call) -> Result:
    """Run all steps on a CPU, from a generated task to the front, in minutes.

    With --config, run the sweep of that file, or of that name, instead of `demo`: `toy` reads text.

    Example: iiet-orch quickstart --workspace my-workspace
    """
    call.config = call.config or "demo"
    call.refuse_unread(UNREAD_BY_KIND[call.settings.sweep.kind])
    result = _sweep(call)
    return result if call.dry_run else result.model_copy(update={"next_steps": AFTER_QUICKSTART})


@Command(
    "prepare",
    group="Train",
    options=HERE,
    config="option",
    unread=dict.fromkeys(
        (
            "model", "training", "source_training", "distillation", "influence", "evaluation",
            "sweep", "search",
        ),
        "the section data alone says what is prepared",
    )
    | ONLY_TRAININGS
    | dict.fromkeys(
        ("cluster.num_gpus", "cluster.device"),
        "data are prepared on the CPUs of this machine, or of the nodes of cluster.address",
    ),
)  # fmt: skip
def prepare(call: Call, files: Annotated[list[str] | None, typer.Argument()] = None) -> Result:
    """Read a corpus, train or load its tokenizer, and write token shards.

    Example: iiet-orch prepare my-texts/ --set data.vocab_size=4096

    Args:
        files: Text, JSON lines, Parquet or folders (default: English texts of Python).

    Keys:
        tokens: folder of the prepared tokens
        num_documents: documents of the text, with those held out; `null` without a text
        num_tokens: their tokens, likewise
        vocab_size: entries of the vocabulary
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


@Command(
    "pretrain",
    group="Train",
    options={
        "--gpus": "cluster.num_gpus",
        "--workers": "cluster.num_workers",
        "--preset": "model.preset",
        "--method": "model.method",
        "--steps": "training.num_steps",
        "--seed": "training.seed",
        "--lr": "training.learning_rate",
        "--dtype": "training.precision",
        "--skip-bad-steps": "training.skip_bad_steps",
        "--profile": "training.profile_steps",
        "--storage": "cluster.storage",
        **HERE,
    },
    config="option",
    unread={
        "distillation": "`iiet-orch distill` trains students of the trained model",
        **MEASURED_LATER,
        **ONLY_SWEEPS,
        **ONLY_MEASUREMENTS,
    },
    trains=True,
    plans=True,
)
def pretrain(
    call: Call,
    schedule: SchedulesOption = None,
    schedule_of: Annotated[
        str | None, typer.Option(metavar="SWEEP:NAME", autocompletion=complete_trial_sweeps)
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="MODEL", autocompletion=complete_models)
    ] = None,
    continue_: Annotated[
        Path | None, typer.Option("--continue", metavar="RUN", autocompletion=complete_models)
    ] = None,
    name: NameOption = None,
    local: LocalOption = False,
    mfu: Annotated[float | None, typer.Option(min=0.01, max=1.0)] = None,
) -> Result:
    """Pretrain one model on GPUs or CPUs; an interrupted run resumes.

    Example: iiet-orch pretrain --preset tiny -r 2,2,1,1,1,1 --steps 500 --seed 1

    Args:
        schedule: Corrections per layer (the iteration schedule): 3, or 2,2,1,1,1,1.
        schedule_of: Instead: the schedule of a trial of a finished sweep, by the name in its table,
            or of the front's knee, best or cheapest.
        from_: Model whose weights the training starts from: a run, a checkpoint, a model folder or
            hub:NAME. Sizes, context and tokenizer are the model's.
        continue_: Finished run, by path or name, to continue to more --steps (wsd or constant).
        mfu: Share of the peak FLOP/s that --dry-run assumes.
    """
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
    if continue_ is not None:
        if call.config is not None:
            raise UserError("--continue takes the run's own settings; use it without --config")
        from orchestrator.models.lookup import find_pretraining
        from orchestrator.settings import SETTINGS_NAME

        folder = find_pretraining(locate_workspace(call.path), continue_)
        call.config = str(folder / SETTINGS_NAME)
        # A continued run is not profiled because the finished one was.
        call.options.setdefault("training.profile_steps", 0)
    from iiet.facts import facts_of

    method = call.settings.model.method
    _check_schedule(schedule, [method] if facts_of(method).has_corrections else [], [method])
    source = from_
    if source is None and continue_ is None and call.settings.training.source is not None:
        source = Path(call.settings.training.source)
    plan = plan_pretrain(
        call.settings,
        workspace=call.session.workspace,
        source=call.imported(source, also_folders=True),
        continued=continue_,
        name=name,
        local=local,
        mfu=mfu,
    )
    return call.finish(plan, run_pretrain)


@Command(
    "distill",
    group="Train",
    options={
        "--control": "distillation.control",
        "--steps": "distillation.training.num_steps",
        "--seed": "distillation.training.seed",
        "--lr": "distillation.training.learning_rate",
        "--dtype": "distillation.training.precision",
        "--profile": "distillation.training.profile_steps",
        **HERE,
    },
    config="option",
    unread={**OF_THE_TEACHER, "evaluation": MEASURED_LATER["evaluation"], **ONLY_SWEEPS},
    trains=True,
    plans=True,
)
def distill(
    call: Call,
    teacher: TeacherArgument = None,
    schedule: SchedulesOption = None,
    drop_layers: Annotated[int | None, typer.Option(min=1)] = None,
    name: NameOption = None,
    local: LocalOption = False,
) -> Result:
    """Distill a teacher into itself under cheaper iteration schedules (IIAD), a student each.

    With --drop-layers, the student has fewer layers instead, and the teacher may be of any method.

    Example: iiet-orch distill my-run -r 2,1,1,0,0,0 -r 1 --lr 5e-4

    Args:
        schedule: The student's corrections per layer: 1, or 2,1,1,0,0,0; repeated for several
            students.
        drop_layers: Instead: drop this many layers, those of least block influence.
        name: Name of the student's run, if there is one student (default: from the content, as in
            a sweep, which then finds it).
    """
    if drop_layers is None:
        call.refuse_unread(UNREAD_WITHOUT_DROPPING)
    from orchestrator.pipelines.training import plan_distill, run_distill

    plan = plan_distill(
        call.settings,
        schedules=schedule or (),
        drop_layers=drop_layers,
        teacher=call.imported(teacher),
        name=name,
        local=local,
        **call.common,
    )
    return call.finish(plan, run_distill)


@Command("sweep", group="Sweep", options=HERE, config="argument", trains=True, plans=True)
def sweep_file(
    call: Call,
    file: Annotated[str, typer.Argument(metavar="FILE")],
    baselines: BaselinesOption = None,
) -> Result:
    """Run a whole sweep from its file, pretraining included.

    Example: iiet-orch sweep toy --set training.num_steps=300

    Args:
        file: A YAML file, or the name of a shipped sweep.
    """
    call.config = file
    call.set("sweep.baseline_runs", baselines)
    call.refuse_unread(UNREAD_BY_KIND[call.settings.sweep.kind])
    return _sweep(call)


@Command(
    "sweep-threshold",
    group="Sweep",
    options={
        "--schedules": "sweep.num_schedules",
        "--thresholds": "sweep.thresholds",
        "--budgets": "sweep.budgets",
        "--cost": "sweep.budget_unit",
        "--selection": "sweep.selection",
        "--search": "search.num_trials",
        "--elastic": "sweep.elastic",
        "--metric": "influence.metric",
        "--control": "distillation.control",
        **TRIALS,
        **HERE,
    },
    config="option",
    unread=OF_THE_TEACHER | ONLY_MEASUREMENTS,
    trains=True,
    plans=True,
)
def sweep_threshold(
    call: Call,
    teacher: TeacherArgument = None,
    baselines: BaselinesOption = None,
    name: NameOption = None,
) -> Result:
    """Prune by influence, distill and evaluate each schedule, and show the front.

    With --search, Optuna then suggests schedules outside the threshold's family.

    Example: iiet-orch sweep-threshold my-run --schedules 7 --dry-run
    """
    call.set("sweep.baseline_runs", baselines)
    is_search = "search.num_trials" in call.options
    call.set("sweep.kind", "search" if is_search else "threshold")
    if not is_search:
        call.refuse_unread({"search": "--search N makes a search of the sweep"})
    if "sweep.num_schedules" in call.options:
        for name_of_choice in ("thresholds", "budgets"):
            if getattr(call.settings.sweep, name_of_choice):
                raise UserError(
                    f"--schedules and --{name_of_choice} exclude each other; leave one out"
                )
    return _sweep(call, teacher or Path("newest"), name)


@Command(
    "sweep-iterations",
    group="Sweep",
    options={
        "--methods": "sweep.methods",
        "--steps": "training.num_steps",
        "--asha": "sweep.asha",
        **TRIALS,
        **HERE,
    },
    config="option",
    unread=UNREAD_BY_KIND["iterations"],
    trains=True,
    plans=True,
)
def sweep_iterations(
    call: Call,
    schedule: SchedulesOption = None,
    rates: Annotated[str | None, typer.Option(metavar="A,B,...")] = None,
    baselines: BaselinesOption = None,
    name: NameOption = None,
) -> Result:
    """Pretrain methods and iteration counts on the same tokens and show them on one front.

    Example: iiet-orch sweep-iterations --methods vanilla,iiet -r 0 -r 1 -r 3..0 --seeds 0,1

    Args:
        schedule: Corrections of the IIETs: for all layers (3), a ramp (3..0), or per layer
            (2,2,1,1,1,1); may be repeated.
        rates: Peak learning rates of every model, with commas between: 1e-3,2e-3,4e-3.
    """
    call.set("sweep.kind", "iterations")
    call.set("sweep.baseline_runs", baselines)
    call.set("sweep.iterations", read_schedules(schedule or []))
    if rates is not None:
        from iiet.facts import METHODS

        call.set("sweep.learning_rates", dict.fromkeys(METHODS, split_list(rates)))
    from orchestrator.sweeping.models import has_counts

    methods = call.settings.sweep.methods
    _check_schedule(schedule, [*filter(has_counts, methods)], methods)
    return _sweep(call, None, name)


def _check_schedule(
    schedule: list[str] | None, readers: Sequence[str], methods: Sequence[str]
) -> None:
    """Refuse `--schedule` if none of the methods reads it; `readers` are those that do."""
    if schedule and not readers:
        raise UserError(
            f"--schedule {schedule[0]} is read by no method of: {', '.join(methods)}; leave it out"
        )


def _sweep(call: Call, teacher: Path | None = None, name: str | None = None) -> Result:
    from orchestrator.pipelines.sweep_stages import plan_sweep
    from orchestrator.pipelines.sweeps import run_sweep

    plan = plan_sweep(call.settings, teacher=call.imported(teacher), name=name, **call.common)
    return plan if call.dry_run else run_sweep(plan, call.context)
