"""Prepare text, pretrain models from random weights or a source model, and distill students.

A plan is made by reading only: it has the jobs, their states, and the price of the rest. A run
executes exactly its plan; if tokens are missing, it prepares them and plans again. A run's folder
is named after its key, so the same settings find it: a finished training returns at once, an
interrupted one resumes. A student is stored where a sweep would store it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from iiet.model.schedule import IterationSchedule
from orchestrator.cluster.ray import check_ray_can_run
from orchestrator.cluster.task import job_runner, joined_cluster, lack_of_resources, part_runner
from orchestrator.data.preparation import (
    ExpectedTokens,
    expected_tokens,
    find_prepared,
    tokens_folder_of,
)
from orchestrator.data.preparation import prepare as prepare_tokens
from orchestrator.data.text import unread_note
from orchestrator.models.folder import is_checkpoint, load_config
from orchestrator.models.hub import DRY_RUN, offline
from orchestrator.models.open import open_model
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.models import imported_model
from orchestrator.planning.devices import run_devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.fit import find_problems
from orchestrator.planning.machine import check_run_resources
from orchestrator.planning.price import Price, price_of
from orchestrator.planning.speeds import Speed, measured_speeds
from orchestrator.records.training import TrainingJob
from orchestrator.records.training_state import Training
from orchestrator.reporting.command_tables import price_rows, training_rows
from orchestrator.reporting.output import Plan, Result
from orchestrator.reporting.sections import two_column_table
from orchestrator.settings import SETTINGS_NAME, ClusterSettings, Settings, to_yaml
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count, shortest_schedule
from orchestrator.training.continuing import continue_job, continued_settings
from orchestrator.training.distilling import distillation_job, student_schedule
from orchestrator.training.job import check_folder, check_job, pretraining_job, training_of
from orchestrator.training.source import Source, find_source, follow_source, with_source
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import write_text
from orchestrator.workspace.journal import read_metrics
from orchestrator.workspace.layout import Workspace, check_name, find_workspace

if TYPE_CHECKING:
    from rich.console import RenderableType

UNPREPARED = (
    "the data are not prepared yet, so finished trainings cannot be recognized. A run prepares "
    "them first; `iiet-orch prepare` does only that"
)

UNIMPORTED = "the source is not imported yet, which a run does first; nothing was downloaded"

LOST_END = "the end of this training is lost, and will be trained again"


def prepare(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of prepared tokens; existing ones are verified by their checksums.

    Args:
        settings: Section `data`; `cluster.address` names a cluster whose nodes share the work.

    Raises:
        UserError: If the source is missing, empty or unreadable, stored tokens are damaged, or the
            cluster cannot be joined.
    """
    context = open_context(workspace, progress)
    space = context.workspace
    cluster = settings.cluster
    with joined_cluster(cluster, space.root, lambda _: None, context.progress):
        return prepare_tokens(
            settings.data,
            space,
            context.progress,
            verify=True,
            open_runner=part_runner(cluster),
        )


class TrainingPlan(Plan):
    """Trainings that run at the same time, and their price."""

    kind: Literal["pretrain", "distill"]
    models: dict[str, Settings]
    """Label -> settings; section `cluster` of the first one applies to all."""
    jobs: dict[str, TrainingJob]
    """Label -> training; without prepared tokens it can be planned but not run."""
    workspace: Workspace
    tokens: ExpectedTokens | None = None
    """Tokens of a pretraining, prepared or not."""
    unread: str | None = None
    """Which files in the text's folders are not read, if any."""
    name: str | None = None
    """Name of a single run's folder, if one was given."""
    is_continued: bool = False
    """Whether a finished run is continued, on its own tokens."""
    notes: tuple[str, ...] = ()
    """Sentences that a run prints at its start."""
    local: bool = False
    """Whether to train in this process, without Ray."""
    mfu: float | None = None
    """Assumed share of the peak FLOP/s; a usual range when unset."""
    source: Path | None = None
    """The source model: its checkpoint, or the folder to import first."""
    source_defaults: dict[str, Any] = Field(default_factory=dict)
    """Setting -> its default with this source model, if that differs."""

    @property
    def has_source(self) -> bool:
        """Whether the source model, if any, is imported."""
        return self.source is None or is_checkpoint(self.source)

    @property
    def has_tokens(self) -> bool:
        """Whether there are tokens; without them, trainings can only be priced."""
        return all(job.tokens_folder for job in self.jobs.values())

    @property
    def cluster(self) -> ClusterSettings:
        """Where the trainings run."""
        return next(iter(self.models.values())).cluster

    def estimate(self, label: str) -> Estimate:
        """Return the estimate of the rest of a training on the devices of the settings; imports
        PyTorch."""
        return replace(Estimate.of(self.jobs[label]), devices=run_devices(self.cluster))

    @cached_property
    def trainings(self) -> dict[str, Training | None]:
        """Label -> the training in its folder; None while its key is unknown."""
        return {
            label: training_of(job) if self.has_source else None for label, job in self.jobs.items()
        }

    @property
    def finished(self) -> dict[str, Path]:
        """Label of each finished training -> its checkpoint."""
        return {
            label: Path(str(training.outcome.checkpoint))
            for label, training in self.trainings.items()
            if training and training.outcome
        }

    @property
    def damaged(self) -> list[str]:
        """Which damaged ends of trainings must be trained again."""
        return [
            f"{training.lost_end}; {LOST_END}"
            for training in self.trainings.values()
            if training and training.lost_end
        ]

    @cached_property
    def trainings_left(self) -> list[Estimate]:
        """Estimates of the unfinished trainings."""
        return self._trainings_left_of(*self.jobs)

    def _trainings_left_of(self, *labels: str) -> list[Estimate]:
        return [self.estimate(label) for label in labels if label not in self.finished]

    @cached_property
    def price(self) -> Price:
        """Tokens, FLOPs, hours, memory and disk of the remaining work."""
        return self._price_of(self.trainings_left)

    def _price_of(self, trainings: Sequence[Estimate]) -> Price:
        new_bytes = self.tokens.new_bytes if self.tokens else 0
        return price_of(
            trainings,
            self.workspace.root,
            speeds=self.speeds,
            new_token_bytes=new_bytes,
            mfu=self.mfu,
        )

    @cached_property
    def speeds(self) -> list[Speed]:
        """How fast earlier trainings of the workspace were."""
        return measured_speeds(self.workspace)

    @cached_property
    def problems(self) -> dict[str, str | None]:
        """Machine or cluster -> why the trainings do not fit there; None if they do."""
        return self._problems_of(self.trainings_left, self.price)

    def _problems_of(self, trainings: Sequence[Estimate], price: Price) -> dict[str, str | None]:
        # The fewest GPUs have the largest shares of a step.
        smallest_cluster = self.cluster.model_copy(update={"num_gpus": self.cluster.fewest_gpus})
        devices = run_devices(smallest_cluster)
        on_fewest = [replace(training, devices=devices) for training in trainings]
        lack = self.lack if trainings else None
        address = LOCAL if self.local else self.cluster.ray_address
        return find_problems(on_fewest, price.disk, self.workspace.root, address, lack)

    @cached_property
    def lack(self) -> str | None:
        """Why there are no slots for the workers; a cluster is asked once for all trainings."""
        check = partial(check_run_resources, self.cluster, local=self.local)
        if self.local:
            return lack_of_resources(ClusterSettings(address=LOCAL), check)
        return lack_of_resources(self.cluster, check)

    def state(self, label: str) -> str:
        """Return as text whether a training is finished, or where it starts."""
        if not self.has_source:
            return UNIMPORTED
        if not self.jobs[label].tokens_folder:
            return UNPREPARED
        training = self.trainings[label]
        assert training is not None, "it is known which training it is"
        if training.outcome:
            return f"finished: {training.folder}"
        steps_done = self.estimate(label).steps_done
        text = f"from step {steps_done:,}" if steps_done else "not begun"
        return f"{training.lost_end}; {LOST_END}; {text}" if training.lost_end else text

    def to_json(self) -> dict[str, Any]:
        """Return the trainings; those of `distill` as the entries of `students`.

        Keys:
            method: of the model
            schedule: its iteration schedule as text, that of a student relative to its teacher; or
                `null` without corrections
            source: (optional) checkpoint or model folder that it starts from
            source_defaults: (optional) setting to its default with this source, if that differs
            state: whether it is finished, or where it starts
            price: of the remaining training, as in a sweep
            problems: machine or cluster to why the training does not fit there, or `null`
        """
        students = [self._training_to_json(label) for label in self.jobs]
        return {"students": students} if self.kind == "distill" else students[0]

    def _training_to_json(self, label: str) -> dict[str, Any]:
        job = self.jobs[label]
        trainings = self._trainings_left_of(label)
        price = self._price_of(trainings)
        return {
            "method": job.model.method,
            "schedule": label if self.kind == "distill" else job.schedule_text,
            **self._source_json,
            "state": self.state(label),
            "price": price.model_dump(mode="json"),
            "problems": self._problems_of(trainings, price),
        }

    def shown(self) -> Iterable[RenderableType]:
        for label in self.jobs:
            training = self.estimate(label)
            trainings = self._trainings_left_of(label)
            price = self._price_of(trainings)
            devices = training.devices
            workers = format_count(devices.num_workers, "GPU" if devices.on_gpus else "CPU worker")
            rows = [
                *training_rows(training, self.tokens),
                *([("other files", self.unread)] if self.unread else []),
                *self._source_rows,
                *([("schedule", label)] if self.kind == "distill" else []),
                ("state", self.state(label)),
                *price_rows(price, self._problems_of(trainings, price)),
            ]
            yield two_column_table(f"Plan: {training.config.method}, {workers}", rows)

    @property
    def _source_json(self) -> dict[str, Any]:
        if self.source is None:
            return {}
        return {"source": str(self.source), "source_defaults": self.source_defaults}

    @property
    def _source_rows(self) -> list[tuple[str, str]]:
        rows = []
        if self.source is not None:
            rows.append(("source", str(self.source)))
        if self.source_defaults:
            rows.append(("defaults with a source", _assignments(self.source_defaults)))
        return rows


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
    )


def source_defaults_text(defaults: Mapping[str, Any]) -> str:
    """Return the end of a sentence on a source model: the defaults that differ with it, if any."""
    return f"; defaults: {_assignments(defaults)}" if defaults else ""


class PretrainResult(Result):
    """A finished training."""

    checkpoint: Path
    """Folder of the last checkpoint."""
    validation_loss: float
    """Nats per token at the last step; NaN if it was not measured."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per logged training step."""
        rows: dict[int, dict[str, Any]] = {}
        for step, values in read_metrics(self.checkpoint.parent):
            rows.setdefault(step, {"step": step}).update(values)
        return [rows[step] for step in sorted(rows)]

    def shown(self) -> Iterable[RenderableType]:
        return [f"checkpoint: {self.checkpoint}"]


class DistillResult(PretrainResult):
    """A distilled student."""

    schedule: str
    """The student's iteration schedule, relative to its teacher: `2,1,1,0`, `0*14,x*2,0*14`."""


class StudentsResult(Result):
    """All students that were distilled from a teacher."""

    students: list[DistillResult]
    """One entry per schedule."""

    def shown(self) -> Iterable[RenderableType]:
        return [line for student in self.students for line in student.shown()]


@offline(DRY_RUN)
def plan_pretrain(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    source: Path | str | None = None,
    continued: Path | str | None = None,
    name: str | None = None,
    local: bool = False,
    mfu: float | None = None,
) -> TrainingPlan:
    """Return the plan of a pretraining.

    Args:
        settings: Sections `data`, `model`, `training` and `cluster`.
        source: The source model, instead of `training.source`: a run, trial, checkpoint, model
            folder, or `hub:OWNER/NAME`.
        continued: Finished run to continue, by path or name; the settings are those in its
            `settings.yaml`, with more steps. The result is bitwise that of one longer training.
        name: Name of the run's folder; made from method, schedule and content when unset.
        local: Train in this process, without Ray.
        mfu: Share of the peak FLOP/s that the plan assumes; a usual range if unset.

    Raises:
        UserError: If the settings do not fit each other or this machine.
    """
    if settings.source_training is not None:
        raise UserError(
            "source_training: only a sweep trains the source of its model first; leave the section "
            "out, and name a model by --from or training.source"
        )
    if source is not None and continued is not None:
        raise UserError(
            f"training.source={source}: a run that is continued ({continued}) has its source; "
            "leave --from out"
        )
    space = find_workspace(workspace)
    earlier = None
    source_options: dict[str, Any] = {}
    if continued is not None:
        settings, earlier = continued_settings(settings, space, Path(continued))
        settings = with_source(settings, earlier.initial_folder)
        tokens: Path | None = Path(earlier.tokens_folder)
    else:
        settings = with_source(settings, source or settings.training.source)
        if settings.training.source is not None:
            model_source = find_source(space, settings.training.source)
            prepared = find_prepared(settings.data, space.tokens)
            settings, defaults = follow_source(settings, model_source, prepared)
            source_options = {"source": model_source.folder, "source_defaults": defaults}
        tokens = find_prepared(settings.data, space.tokens)
    models = {settings.model.method: settings}
    options: dict[str, Any] = {"name": name, "local": local, "mfu": mfu, **source_options}
    if earlier is None:
        options["unread"] = unread_note(settings.data)
    return plan_models(models, space, tokens, earlier=earlier, **options)


def schedule_of_trial(
    name: str, *, workspace: Workspace | Path | str | None = None
) -> IterationSchedule:
    """Return the schedule of a trial of a stored sweep, to train a model with it.

    Args:
        name: `SWEEP:NAME`. NAME is a trial's label or schedule in the sweep's table; or `knee`,
            `best` or `cheapest` of its front.

    Raises:
        UserError: If there is no such sweep or trial, or its method has no corrections.
    """
    from orchestrator.reporting.front import parse_axes, reason_against_accuracy, sweep_front
    from orchestrator.reporting.results import load_sweep_results

    sweep_name, mark, trial_name = name.partition(":")
    if not mark:
        raise UserError(f"--schedule-of takes SWEEP:NAME, such as my-sweep:knee; got {name!r}")
    space = find_workspace(workspace)
    sweep = load_sweep_results(space, sweep_name)
    named = [
        trial
        for trial in sweep.results
        if trial_name in (trial.label, trial.group, trial.schedule_text)
    ]
    if not named:
        reason = reason_against_accuracy(space, sweep.results)
        front, _ = sweep_front(space, [sweep], parse_axes(against_accuracy=reason))
        if trial_name not in front.picks:
            known = ", ".join([*front.picks, *(trial.name for trial in sweep.results)])
            raise UserError(
                f"--schedule-of {name}: the sweep {sweep_name} has no trial {trial_name!r}; there "
                f"are: {known}"
            )
        named = [front.picks[trial_name].trial]
    trial = named[0]
    if trial.schedule is None:
        raise UserError(
            f"--schedule-of {name}: {trial.method} makes no corrections, so it has no schedule; "
            "name a trial that has one"
        )
    return IterationSchedule(trial.schedule)


def plan_models(
    models: Mapping[str, Settings],
    workspace: Workspace,
    tokens: Path | None,
    *,
    name: str | None = None,
    earlier: TrainingJob | None = None,
    model_source: Source | None = None,
    **options: Any,
) -> TrainingPlan:
    """Return the plan of pretraining every model; models of one shape share the machine.

    Args:
        models: Label -> settings.
        tokens: Folder of prepared tokens, if they are.
        name: Name of the run, for a single model.
        earlier: Finished run that it continues.
        model_source: What `pretraining_job` takes as the source of each model.
        options: Other fields of the plan.
    """
    notes: list[str] = []
    if source := options.get("source"):
        notes.append(
            f"the training starts from {source}{source_defaults_text(options['source_defaults'])}"
        )
    jobs = [
        pretraining_job(settings_of_model, workspace, tokens, name, source=model_source)
        for settings_of_model in models.values()
    ]
    if earlier:
        jobs = [continue_job(earlier, job, notes.append) for job in jobs]
    if tokens:
        for job in jobs:
            check_folder(job)
    plan = TrainingPlan(
        kind="pretrain",
        models=dict(models),
        jobs=dict(zip(models, jobs, strict=True)),
        workspace=workspace,
        tokens=expected_tokens(next(iter(models.values())).data, tokens),
        name=name,
        is_continued=earlier is not None,
        notes=tuple(notes),
        **options,
    )
    for training in plan.trainings_left:
        training.check_workers()
    return plan


def run_pretrain(plan: TrainingPlan, context: Context) -> PretrainResult:
    """Pretrain one model, after preparing its tokens; a finished run is found again.

    Raises:
        Interrupted: After Ctrl-C; says at which step the state is saved.
        RunFailed: If a training failed or diverged.
    """
    plan.check()
    (settings,) = plan.models.values()
    cluster = plan.cluster
    check = partial(check_run_resources, cluster)
    joined = joined_cluster(cluster, context.workspace.root, check, context.progress)
    with nullcontext() if plan.local else joined:
        if not plan.is_continued:
            tokens = prepare_tokens(
                settings.data,
                context.workspace,
                context.progress,
                open_runner=None if plan.local else part_runner(cluster),
            )
            if str(tokens) != next(iter(plan.jobs.values())).tokens_folder:
                plan = plan_models(
                    plan.models,
                    context.workspace,
                    tokens,
                    name=plan.name,
                    local=plan.local,
                    source=plan.source,
                    source_defaults=plan.source_defaults,
                )
        (result,) = run_trainings(plan, context).values()
    return result


def pretrain(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    source: Path | str | None = None,
    continued: Path | str | None = None,
    name: str | None = None,
    local: bool = False,
    progress: Progress | None = None,
) -> PretrainResult:
    """Pretrain one model, after preparing its tokens; a finished run is found again.

    Arguments are those of `plan_pretrain`, errors also those of `run_pretrain`.
    """
    plan = plan_pretrain(
        settings,
        workspace=workspace,
        source=imported_model(source, workspace, progress, also_folders=True),
        continued=continued,
        name=name,
        local=local,
    )
    plan.check()  # Before the workspace is made.
    return run_pretrain(plan, open_context(workspace, progress))


@offline(DRY_RUN)
def plan_distill(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    schedules: Sequence[str | IterationSchedule] = (),
    teacher: Path | str | None = None,
    name: str | None = None,
    local: bool = False,
    progress: Progress | None = None,
) -> TrainingPlan:
    """Return the plan of distilling a student under each schedule; equal schedules are one student.

    A student that leaves layers out starts with the weights of the other layers.

    Args:
        settings: Sections `distillation` and `cluster`.
        schedules: The students' corrections: `1`, or a number for each layer (`2,1,1,0,0,0`); `x`
            for a left-out layer (`0*14,x*2,0*14`).
        teacher: A checkpoint or run, by path or name; the newest finished IIET with
            corrections when unset.
        name: Name of the run's folder. With several students, the schedule is added, as in
            `mine-2,1,1`. When unset, the folders are those of a sweep's trials.
        local: Train in this process, without Ray.

    Raises:
        UserError: If there is no such teacher, a schedule does not fit it, the control trains
            nothing, or the name is that of another run.
    """
    if not schedules:
        raise UserError(
            "--schedule says how many corrections the student's layers make, such as --schedule 1 "
            "or --schedule 2,1,1,0,0,0; x leaves a layer out: --schedule 0*14,x*2,0*14"
        )
    space = find_workspace(workspace)
    note = (progress or Progress()).note
    model = open_model(teacher, space, folders="none", with_corrections=True, note=note)
    checkpoint = model.path
    # Refuse a schedule that does not fit before looking for tokens.
    full = load_config(checkpoint).corrections
    # Equal schedules give one student.
    students = dict.fromkeys(
        student_schedule(schedule, full, "--schedule") for schedule in schedules
    )
    tokens = tokens_folder_of(checkpoint, space)
    jobs: dict[str, TrainingJob] = {}
    for student in students:
        job = distillation_job(settings, space, checkpoint, student, tokens)
        if name is not None:
            run_name = name
            if len(students) > 1:  # Names cannot contain `*`: `2*4,0*20` becomes `2x4,0x20`.
                schedule_text = shortest_schedule(student.corrections).replace("*", "x")
                run_name = check_name(f"{name}-{schedule_text}", "--name")
            job = job.model_copy(update={"run_folder": str(space.runs / run_name)})
            check_folder(job)
        jobs[str(student)] = job
    models = dict.fromkeys(jobs, settings)
    plan = TrainingPlan(kind="distill", models=models, jobs=jobs, workspace=space, local=local)
    for training in plan.trainings_left:
        training.check_workers()
    return plan


def run_distill(plan: TrainingPlan, context: Context) -> StudentsResult:
    """Distill a teacher into students; a finished student is found again.

    Raises:
        Interrupted: After Ctrl-C; says at which step the state is saved.
        RunFailed: If a training failed or diverged.
    """
    if not plan.local:
        check_ray_can_run(plan.cluster.ray_address)
    students = [
        DistillResult(
            checkpoint=result.checkpoint,
            validation_loss=result.validation_loss,
            schedule=label,
        )
        for label, result in run_trainings(plan, context).items()
    ]
    return StudentsResult(students=students)


def distill(
    settings: Settings,
    *,
    schedule: str | IterationSchedule,
    workspace: Workspace | Path | str | None = None,
    teacher: Path | str | None = None,
    name: str | None = None,
    local: bool = False,
    progress: Progress | None = None,
) -> DistillResult:
    """Distill a teacher into a student under one schedule; a finished student is found again.

    Arguments are those of `plan_distill`, errors also those of `run_distill`; a teacher
    may be `hub:OWNER/NAME`, too.
    """
    plan = plan_distill(
        settings,
        workspace=workspace,
        schedules=[schedule],
        teacher=imported_model(teacher, workspace, progress),
        name=name,
        local=local,
        progress=progress,
    )
    plan.check()  # Before the workspace is made.
    return run_distill(plan, open_context(workspace, progress)).students[0]


def run_trainings(
    plan: TrainingPlan, context: Context, *, kind: str | None = None
) -> dict[str, PretrainResult]:
    """Train all unfinished jobs of a plan, with progress and MLflow runs of this kind.

    Raises:
        UserError: If a job cannot run; then no job starts.
        Interrupted, RunFailed: As `pretrain`.
    """
    from orchestrator.training.watching import RunMonitor

    plan.check()
    jobs = plan.jobs
    cluster = plan.cluster
    progress = context.progress
    for job in jobs.values():
        for num_gpus in {cluster.num_gpus, cluster.fewest_gpus}:
            check_job(job, num_workers=num_gpus or cluster.num_workers)
    for note in plan.notes:
        progress.note(note)
    if plan.kind == "pretrain":
        for label, job in jobs.items():
            write_text(job.folder / SETTINGS_NAME, to_yaml(plan.models[label]))
    monitor = RunMonitor(jobs, context.tracking, progress)
    monitor.open_runs(kind or plan.kind, plan.models)
    if any(jobs[label].recipe.profile_steps for label in plan.finished):
        progress.note("no profile of a run that is finished: no step is trained")
    progress.start(plan.kind, sum(job.recipe.num_steps for job in jobs.values()))
    with monitor:
        run_jobs = job_runner(local=plan.local, say=partial(progress.advance, 0))
        outcomes = run_jobs(
            list(jobs.values()),
            cluster,
            watch=monitor.poll,
            note=progress.note,
            failed=monitor.note_failure,
        )
        results = {
            label: PretrainResult(
                checkpoint=Path(str(outcome.checkpoint)), validation_loss=outcome.validation_loss
            )
            for label, outcome in zip(jobs, outcomes, strict=True)
        }
    losses = {
        label: f"{result.validation_loss:.3f}"
        for label, result in results.items()
        if not math.isnan(result.validation_loss)
    }
    if plan.kind == "distill":
        students = "; ".join(f"{label}: {loss}" for label, loss in losses.items())
        text = f"by schedule {students}"
    else:
        text = ", ".join(f"{label} {loss}" for label, loss in losses.items())
    ending = ", found again" if len(plan.finished) == len(jobs) else ""
    progress.finish(f"validation loss {text}{ending}")
    return results
