"""The models that a sweep trains from scratch: their settings, and the plan of an iterations sweep.

A threshold sweep and a search train a teacher, vanilla and the model without corrections. An
iterations sweep trains methods and iteration counts, with learning rates and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from iiet.config import ModelConfig
from iiet.methods import METHODS
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.settings import BASELINE_METHOD, ModelSettings, Settings, model_label
from orchestrator.sweeping.trials import make_plan
from orchestrator.training.first_stage import share_first_stages
from orchestrator.training.job import job_key
from orchestrator.workspace.provenance import content_key

TEACHER = "teacher"


def teacher_and_baselines(settings: Settings) -> dict[str, Settings]:
    """Return the settings of the teacher and the baselines that a sweep trains."""
    return {
        TEACHER: settings_of_model(settings),
        BASELINE_METHOD: settings_of_model(settings, method=BASELINE_METHOD),
        model_label(settings.model.method, 0): settings_of_model(settings, corrections=0),
    }


def max_num_students(settings: Settings, teacher: ModelConfig) -> int:
    """Return the largest possible number of a teacher's students."""
    sweep = settings.sweep
    asked = len(sweep.thresholds) or len(sweep.budgets) or sweep.num_schedules
    num_schedules = min(asked, 1 + sum(teacher.corrections))
    if sweep.kind == "search":
        num_schedules += settings.search.num_trials
        num_schedules = min(num_schedules, teacher.corrections.num_within)
    is_pruned = settings.distillation.control == "pruned"
    return num_schedules * (1 if is_pruned else max(1, len(sweep.seeds)))


def swept_models(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and model settings of the methods and iteration counts that a sweep trains."""
    for method in settings.sweep.methods:
        if not METHODS[method].has_corrections:
            yield method, {"method": method}
            continue
        for count in settings.sweep.iterations:
            yield model_label(method, count), {"method": method, "corrections": count}


def settings_of_model(settings: Settings, **changes: Any) -> Settings:
    """Return the settings of another method or count, at that one's own (first) learning rate."""
    return settings_at_rates(settings, **changes)[0]


def settings_at_rates(settings: Settings, **changes: Any) -> list[Settings]:
    """Return the settings of another method or count at each of its own learning rates."""
    if changes.get("method", settings.model.method) != settings.model.method:
        changes["method_options"] = {}
    model = ModelSettings.model_validate({**settings.model.model_dump(), **changes})
    rates = settings.sweep.learning_rates
    own = rates.get(model.method, settings.training.learning_rate)
    own = rates.get(model_label(model.method, model.corrections), own)
    return [
        settings.model_copy(
            update={
                "model": model,
                "training": settings.training.model_copy(update={"learning_rate": rate}),
            }
        )
        for rate in (own if isinstance(own, Sequence) else (own,))
    ]


@dataclass(frozen=True, kw_only=True)
class ScratchModel:
    """One model that a sweep trains from scratch."""

    label: str
    """Name in tables and figures."""
    job: TrainingJob
    """Its training, in the folder of a pretraining run of the same settings."""
    group: str | None = None
    """Label without the seed, if the sweep has several seeds."""


def iterations_plan(
    models: Sequence[ScratchModel], *, suite: TrialSuite, name: str | None = None
) -> SweepPlan:
    """Plan a sweep that pretrains several models from scratch.

    Models with the same job are one trial. The name is made from the plan's key when unset.
    """
    trials = []
    jobs = share_first_stages([model.job for model in models])
    for model, job in zip(models, jobs, strict=True):
        config = job.model
        is_baseline = not METHODS[config.method].has_corrections
        trials.append(
            Trial(
                key=content_key("trial", job_key(job), suite.key),
                role="baseline" if is_baseline else "trial",
                label=model.label,
                model=config,
                folder=job.run_folder,
                job=job,
                suite=suite,
                seed=job.recipe.seed if model.group else None,
                group=model.group,
            )
        )
    unique = list({trial.key: trial for trial in trials}.values())
    num_seeds = len({v.job.recipe.seed for v in models if v.group}) or 1
    num_requested = len(models) // num_seeds
    return make_plan("iterations", name, unique, suite, num_requested, teacher=None)
