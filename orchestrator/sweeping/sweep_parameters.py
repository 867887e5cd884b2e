"""Parameters of a sweep's run in MLflow: what it tries, and what all its trainings share."""

from __future__ import annotations

import re
from typing import Any

from orchestrator.records.training import job_parameters, shared_parameters
from orchestrator.records.trial import SweepPlan
from orchestrator.settings import Settings

SCHEDULE_CHOICES = ("num_schedules", "thresholds", "budgets")
"""Settings of which one decides how many students there are; a later one wins."""


def sweep_parameters(plan: SweepPlan, settings: Settings) -> dict[str, str]:
    """Return the parameters that apply to this kind of sweep, those that all trainings share
    among them.

    A setting that is off, or an empty list, is left out.
    """
    sweep = settings.sweep
    params: dict[str, Any] = {"kind": plan.kind, "num_trials": len(plan.trials)}
    if plan.kind == "iterations":
        params |= {name: getattr(sweep, name) for name in ("methods", "iterations", "num_layers")}
        if sweep.asha:
            params |= {
                name: getattr(sweep, name) for name in type(sweep).model_fields if "asha" in name
            }
    else:
        params |= {"teacher": plan.teacher, "influence_metric": settings.influence.metric}
        params |= _schedule_choice(settings)
        params |= {
            "control": settings.distillation.control,
            "elastic": sweep.elastic or None,
            "distilled_baselines": sweep.distilled_baselines,
        }
    if plan.kind == "search":
        params |= {f"search.{name}": value for name, value in settings.search}
    params["seeds"] = sweep.seeds
    own = {name: _text(v) for name, v in params.items() if v is not None and v != () and v != {}}
    jobs = [t.job for t in plan.trials if t.job and not t.is_distilled_baseline]
    shared = shared_parameters([job_parameters(job) for job in jobs])
    is_schedule = re.compile("schedule|r_[0-9]+").fullmatch
    return {name: value for name, value in shared.items() if not is_schedule(name)} | own


def _schedule_choice(settings: Settings) -> dict[str, Any]:
    sweep = settings.sweep
    name = [name for name in SCHEDULE_CHOICES if getattr(sweep, name)][-1]
    choice = {name: getattr(sweep, name), "selection": sweep.selection}
    has_unit = name == "budgets" or sweep.budget_unit != "evaluations"
    return choice | ({"budget_unit": sweep.budget_unit} if has_unit else {})


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(each)}" for key, each in value.items())
    return str(value)
