"""What a sweep will do, decided before it does anything: which trials, what each costs, what is
done already.

A trial is a schedule (or a method) trained by one job and measured by one suite. Thresholds are
only labels: all that lead to the same schedule are one trial. Each trial has a key, the hash of all
that determines its result, and a folder named by the hash of all that determines its weights; so a
second sweep, another range of thresholds or a restart finds what is finished, and other tasks can
be put to the same weights without training again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.distillation import DistillationConfig
from iiet.influence import InfluenceTable
from iiet.methods import METHODS
from iiet.schedule import (
    FamilyMember,
    schedule_at_threshold,
    schedule_family,
    spread_over_cost,
)
from orchestrator.errors import UserError
from orchestrator.provenance import content_key
from orchestrator.settings import DistillationSettings, Settings
from orchestrator.training.checkpoint import load_config, weights_key
from orchestrator.training.job import TrainingJob, job_key
from orchestrator.trial import Role, TrialResult
from orchestrator.workspace import Workspace, read_json


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """One trial, as it will be run by any process that can see the workspace."""

    key: str
    """Hash of all that determines the result; the same trial in another sweep has the same key."""
    role: Role
    """`trial`, `teacher` or `reference`."""
    label: str
    """What tables and pictures call it."""
    model: dict[str, Any]
    """`ModelConfig.to_dict()` with the schedule that is measured."""
    folder: str
    """Where it is trained (if it is), and where its result lies."""
    job: dict[str, Any] | None
    """`TrainingJob.to_dict()`; None when the checkpoint is measured as it is."""
    checkpoint: str | None
    """Checkpoint to measure when nothing is trained."""
    suite: dict[str, Any]
    """What is measured: evaluation settings, suite folder, tokens folder."""
    threshold_above: float | None = None
    """Thresholds above this, and up to `threshold_up_to`, give this schedule."""
    threshold_up_to: float | None = None
    """Largest threshold that gives this schedule."""
    parent: str | None = None
    """Weights key of the teacher."""

    def config(self) -> ModelConfig:
        """Return the model's configuration."""
        return ModelConfig.from_dict(self.model)

    @property
    def result_path(self) -> Path:
        """File of the result; it exists when the trial is finished."""
        return Path(self.folder) / f"result-{self.key}.json"

    def result(self) -> TrialResult | None:
        """Return the finished result; None while there is none.

        The label and the thresholds are this sweep's: another sweep may have measured the same
        trial under other names.
        """
        found = read_json(self.result_path)
        if not found:
            return None
        return replace(
            TrialResult.from_dict(found),
            role=self.role,
            label=self.label,
            threshold_above=self.threshold_above,
            threshold_up_to=self.threshold_up_to,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able mapping; `PlannedTrial(**mapping)` is its inverse."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """All trials of a sweep, and what it is called."""

    key: str
    """Hash of the trials' keys: the same sweep has the same key."""
    name: str
    """Name of its folder and of its run in MLflow."""
    kind: str
    """`threshold` or `iterations`."""
    tokens_folder: str
    """Prepared tokens that it trains and measures on."""
    teacher: str | None
    """Checkpoint of the teacher; None for `iterations`."""
    num_requested: int
    """Thresholds or settings asked for, before those that coincide were merged."""
    trials: tuple[PlannedTrial, ...]
    """Trials, teacher and references, each once."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able mapping."""
        return asdict(self)


def exact_cost(config: ModelConfig, full: ModelConfig) -> dict[str, float]:
    """Return the cost of a model in all units that follow from shapes, and relative to `full`."""
    cost, most = inference_cost(config), inference_cost(full)
    return {
        "evaluations": cost.evaluations_per_token,
        "relative_evaluations": cost.evaluations_per_token / most.evaluations_per_token,
        "flops_per_token": cost.decode_flops_per_token,
        "relative_flops": cost.decode_flops_per_token / most.decode_flops_per_token,
        "prefill_flops_per_token": cost.prefill_flops_per_token,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "weight_bytes_per_token": cost.weight_bytes_per_token,
        "num_parameters": cost.num_parameters,
    }


def full_config(plan: SweepPlan) -> ModelConfig:
    """Return the costliest model of a plan that is no reference: what relative costs relate to."""
    configs = [trial.config() for trial in plan.trials if trial.role != "reference"]
    configs = configs or [trial.config() for trial in plan.trials]
    return max(configs, key=lambda config: inference_cost(config).evaluations_per_token)


def choose_members(influence: InfluenceTable, settings: Settings) -> tuple[FamilyMember, ...]:
    """Return the schedules of a threshold sweep, from full to none, each once.

    With `sweep.thresholds`, those that the thresholds lead to; else `sweep.num_schedules` of the
    family, spread evenly over cost.
    """
    family = schedule_family(influence)
    if not settings.sweep.thresholds:
        return spread_over_cost(family, min(settings.sweep.num_schedules, len(family)))
    wanted = {schedule_at_threshold(influence, t) for t in settings.sweep.thresholds}
    return tuple(member for member in family if member.schedule in wanted)


def threshold_plan(
    settings: Settings,
    workspace: Workspace,
    *,
    teacher: Path,
    influence: InfluenceTable,
    suite: dict[str, Any],
    references: Sequence[tuple[str, Path]] = (),
    name: str | None = None,
) -> SweepPlan:
    """Plan a threshold sweep: the teacher, its students under the chosen schedules, references.

    Args:
        settings: Sections `sweep` and `distillation` count.
        workspace: Where trials live.
        teacher: Checkpoint of the full model.
        influence: Its influence table.
        suite: What is measured.
        references: Label and checkpoint of models to show beside the sweep.
        name: Name of the sweep; made from its key when unset.
    """
    full = load_config(teacher)
    trials = [_measured_as_it_is("teacher", "teacher", teacher, full, suite, workspace)]
    for member in choose_members(influence, settings):
        config = replace(full, schedule=member.schedule)
        trials.append(student_trial(settings, workspace, teacher, config, member, suite))
    trials += [
        _measured_as_it_is("reference", label, folder, load_config(folder), suite, workspace)
        for label, folder in references
    ]
    num_requested = len(settings.sweep.thresholds) or settings.sweep.num_schedules
    return _finish_plan("threshold", name, trials, suite, num_requested, teacher=teacher)


def iterations_plan(
    jobs: Sequence[tuple[str, TrainingJob]],
    *,
    suite: dict[str, Any],
    name: str | None = None,
) -> SweepPlan:
    """Plan a sweep that pretrains several methods or iteration counts from scratch, each a job.

    Args:
        jobs: Label and job; its folder is where a pretraining run of the same settings would go.
        suite: What is measured.
        name: Name of the sweep; made from its key when unset.
    """
    trials = []
    for label, job in jobs:
        config = job.config()
        is_baseline = not METHODS[config.method].has_corrections
        trials.append(
            PlannedTrial(
                key=content_key("trial", job_key(job), _suite_key(suite)),
                role="reference" if is_baseline else "trial",
                label=label,
                model=config.to_dict(),
                folder=job.run_folder,
                job=job.to_dict(),
                checkpoint=None,
                suite=suite,
            )
        )
    unique = list({trial.key: trial for trial in trials}.values())
    return _finish_plan("iterations", name, unique, suite, len(jobs), teacher=None)


def student_job(
    distillation: DistillationSettings,
    *,
    teacher: Path,
    config: ModelConfig,
    tokens_folder: str,
    run_folder: str = "",
) -> TrainingJob | None:
    """Return the job that makes a student of a teacher; None for the control without training.

    Args:
        distillation: Recipe, loss, and which control.
        teacher: Checkpoint of the full model.
        config: The student: the teacher's configuration under its own schedule.
        tokens_folder: Prepared tokens.
        run_folder: Where it is trained.

    Raises:
        UserError: If the parts of the loss do not go together.
    """
    if distillation.control == "pruned":
        return None
    is_scratch = distillation.control == "scratch"
    is_distilled = distillation.control == "distill"
    return TrainingJob(
        run_folder=run_folder,
        tokens_folder=tokens_folder,
        model=config.to_dict(),
        recipe=distillation.training,
        objective="pretrain" if is_scratch else "distill" if is_distilled else "cross_entropy",
        teacher_folder=str(teacher) if is_distilled else None,
        initial_folder=None if is_scratch else str(teacher),
        distillation=_loss(distillation) if is_distilled else None,
        provenance={"teacher": weights_key(teacher)},
    )


def _loss(distillation: DistillationSettings) -> DistillationConfig:
    try:
        return DistillationConfig(
            kl_weight=distillation.kl_weight,
            temperature=distillation.temperature,
            divergence=distillation.divergence,
            top_k=distillation.cache_top_k if distillation.teacher_cache == "top_k" else None,
            hidden_weight=distillation.hidden_weight,
        )
    except ValueError as error:
        raise UserError(
            f"distillation: {error}; set teacher_cache to auto, or divergence to forward"
        ) from None


def student_trial(
    settings: Settings,
    workspace: Workspace,
    teacher: Path,
    config: ModelConfig,
    member: FamilyMember,
    suite: dict[str, Any],
) -> PlannedTrial:
    """Return the trial that distills a teacher into one schedule, or into a control, and measures
    it.
    """
    job = student_job(
        settings.distillation, teacher=teacher, config=config, tokens_folder=suite["tokens_folder"]
    )
    weights = job_key(job) if job else content_key("pruned", weights_key(teacher), config.to_dict())
    folder = str(workspace.trials / weights)
    control = settings.distillation.control
    note = "" if control == "distill" else f" ({control.replace('_', ' ')})"
    return PlannedTrial(
        key=content_key("trial", weights, _suite_key(suite)),
        role="trial",
        label=f"{config.corrections}{note}",
        model=config.to_dict(),
        folder=folder,
        job=replace(job, run_folder=folder).to_dict() if job else None,
        checkpoint=None if job else str(teacher),
        suite=suite,
        threshold_above=member.threshold_above,
        threshold_up_to=member.threshold_up_to,
        parent=weights_key(teacher),
    )


def _measured_as_it_is(
    role: Role,
    label: str,
    checkpoint: Path,
    config: ModelConfig,
    suite: dict[str, Any],
    workspace: Workspace,
) -> PlannedTrial:
    weights = content_key("as it is", weights_key(checkpoint), config.to_dict())
    return PlannedTrial(
        key=content_key("trial", weights, _suite_key(suite)),
        role=role,
        label=label,
        model=config.to_dict(),
        folder=str(workspace.trials / weights),
        job=None,
        checkpoint=str(checkpoint),
        suite=suite,
    )


def _finish_plan(
    kind: str,
    name: str | None,
    trials: Sequence[PlannedTrial],
    suite: dict[str, Any],
    num_requested: int,
    *,
    teacher: Path | None,
) -> SweepPlan:
    key = content_key("sweep", kind, [trial.key for trial in trials])
    return SweepPlan(
        key=key,
        name=name or f"{kind}-{key[:8]}",
        kind=kind,
        tokens_folder=suite["tokens_folder"],
        teacher=str(teacher) if teacher else None,
        num_requested=num_requested,
        trials=tuple(trials),
    )


def _suite_key(suite: dict[str, Any]) -> str:
    # Folders differ between machines; the suite's own key and the settings do not.
    return content_key(
        {name: value for name, value in suite.items() if not name.endswith("_folder")}
    )
