"""Texts of a sweep's plan: a table, sentences, and the parameters of its MLflow run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from iiet.cost import inference_cost
from orchestrator.records.training import job_parameters, shared_parameters
from orchestrator.records.trial import (
    SweepTrials,
)
from orchestrator.reporting.costs import full_trial
from orchestrator.reporting.sections import Column, Table, TableRow
from orchestrator.settings import Settings, SweepSettings
from orchestrator.settings.evaluation import usual_metric
from orchestrator.sweeping.states import TrialState
from orchestrator.sweeping.student_schedules import most_left_out
from orchestrator.sweeping.trials import num_models
from orchestrator.terminal.render import format_bytes, format_count


def plan_table(plan: SweepTrials, states: Sequence[TrialState]) -> Table:
    """Return a table of a plan's trials and their states; narrow terminals show fewer columns.

    Columns of learning rates and numbers of layers appear if the values differ.
    """
    trials = [state.trial for state in states]  # Also models that are pretrained first.
    full_flops = inference_cost(full_trial(plan).model).decode_flops_per_token
    costs = [inference_cost(trial.model) for trial in trials]
    rates = [f"{trial.job.recipe.learning_rate:g}" if trial.job else "" for trial in trials]
    layers = [str(trial.model.num_layers) for trial in trials]
    columns = {
        Column("model", is_text=True): [trial.label for trial in trials],
        Column("thresholds", 3, is_text=True): [trial.threshold_text for trial in trials],
        Column("rate", 2): rates if len({*rates} - {""}) > 1 else [],
        Column("layers", 1): layers if len({*layers}) > 1 else [],
        Column("NFE"): [str(cost.evaluations_per_token) for cost in costs],
        Column("FLOPs", 4): [f"{cost.decode_flops_per_token / full_flops:.0%}" for cost in costs],
        Column("KV/token", 5): [format_bytes(cost.kv_bytes_per_token) for cost in costs],
        Column("state", is_text=True): [
            f"from step {state.steps_done:,}" if state.steps_done else state.status
            for state in states
        ],
    }
    shown = {column: cells for column, cells in columns.items() if any(cells)}
    rows = [TableRow(cells) for cells in zip(*shown.values(), strict=True)]
    return Table([*shown], rows, f"Plan of {plan.name}")


def plan_sentences(
    plan: SweepTrials, sweep: SweepSettings, states: Sequence[TrialState]
) -> list[str]:
    """Return sentences on what was merged, and what is reused."""
    # Contents of the plan.
    if plan.kind == "iterations":
        requested = "model"
        distinct = ""
    else:
        nouns = {"thresholds": "threshold", "budgets": "budget", "num_schedules": "schedule"}
        requested = nouns[sweep.schedule_choice]
        distinct = " schedule" if plan.num_distinct == 1 else " schedules"
    contents = (
        f"{format_count(plan.num_requested, requested)} asked for, "
        f"{plan.num_distinct:,} distinct{distinct}"
    )
    if num_seeds := len({trial.seed for trial in plan.trials if trial.seed is not None}):
        contents += f", each under {format_count(num_seeds, 'seed')}"
    if num_suggested := num_models(plan.trials) - plan.num_distinct:
        contents += f"; {num_suggested:,} more that the search suggested"

    # Progress of the plan.
    numbers = Counter(state.status for state in states)
    verb = "is" if len(states) == 1 else "are"
    trials = format_count(len(states), "trial")
    progress = f"{numbers['finished']:,} of {trials} {verb} finished and reused"
    if num_stopped := numbers["stopped early"]:
        progress += f", {num_stopped:,} stopped early and left so"
    if num_begun := sum(bool(state.steps_done) for state in states):
        progress += f", {num_begun:,} partly trained"
    sentences = [contents, progress] if plan.num_distinct else [progress]
    if any(trial.threshold_text for trial in plan.trials):
        parts = []
        if full_trial(plan).model.corrections.num_corrections:
            parts.append("correction")
        if any(trial.teacher_schedule for trial in plan.trials):
            parts.append("layer")
        sentences.append(f"thresholds: a {' or '.join(parts)} whose influence is below is left out")
    return sentences


def sweep_parameters(plan: SweepTrials, settings: Settings) -> dict[str, str]:
    """Return the parameters of this kind of sweep, and those that its trainings share.

    Settings that are off, and empty lists, are left out.
    """
    sweep = settings.sweep
    params: dict[str, Any] = {"kind": plan.kind, "num_trials": len(plan.trials)}
    if plan.kind == "iterations":
        names = ["methods", "iterations", "num_layers"]
        names += [name for name in type(sweep).model_fields if sweep.asha and "asha" in name]
        params |= {name: getattr(sweep, name) for name in names}
    else:
        choice = sweep.schedule_choice
        num_left_out = most_left_out(sweep, full_trial(plan).model)
        params |= {
            "teacher": plan.teacher,
            "influence_metric": settings.influence.metric
            or usual_metric(of_whole_layers=num_left_out > 0),
            choice: getattr(sweep, choice),
            "schedules": sweep.schedules,
            "leave_out_layers": num_left_out or None,
            "selection": sweep.selection,
            "control": settings.distillation.control,
            "elastic": sweep.elastic or None,
        }
        if choice == "budgets" or sweep.budget_unit != "evaluations":
            params["budget_unit"] = sweep.budget_unit
    if plan.kind == "search":
        params |= {f"search.{name}": value for name, value in settings.search}
    params["seeds"] = sweep.seeds
    params["baseline_runs"] = sweep.baseline_runs

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key}: {text(part)}" for key, part in value.items())
        return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

    jobs = [t.job for t in plan.trials if t.job]
    shared = shared_parameters([job_parameters(job) for job in jobs])
    return {
        **{n: str(v) for n, v in shared.items() if n != "schedule" and not n.startswith("r_")},
        **{name: text(value) for name, value in params.items() if value not in (None, (), {})},
    }
