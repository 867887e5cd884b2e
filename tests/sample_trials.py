"""Trials that were measured, and stored values of their items, without a plan or weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from iiet.methods import METHODS
from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.evaluation.store import EvaluationStore, MeasuredTask
from orchestrator.records.evaluation import (
    FILTER_MARK,
    NO_FILTER,
    EvaluationKeys,
    EvaluationResult,
    Suite,
)
from orchestrator.records.metrics import CONFIDENCE_KEEPS_99
from orchestrator.records.trial import Trial
from orchestrator.reporting.front import Front, FrontAxes, find_front
from orchestrator.reporting.results import model_results
from orchestrator.workspace.layout import Workspace


def sample_trial(
    *, key: str = "k", method: str = "iiet", schedule: tuple[int, ...] | None = None, **values: Any
) -> Trial:
    """Return a trial of a tiny model; other fields of `Trial` are given by name.

    Numbers are given by group, as `cost={"evaluations": 6}`.
    """
    corrections = schedule or (0,) * 6
    model = ModelConfig(
        vocab_size=300,
        dim=16,
        num_layers=len(corrections),
        num_heads=2,
        num_kv_heads=2,
        ffn_dim=32,
        context_length=16,
        method=method,
        schedule=IterationSchedule(corrections) if METHODS[method].facts.has_corrections else None,
    )
    groups = {name: values.pop(name, {}) for name in ("cost", "quality", "train")}
    values_of_trial = {"role": "trial", "folder": "", "suite": Suite(), **values}
    trial = Trial(key=key, model=model, **values_of_trial)
    for group, numbers in groups.items():
        trial = trial.with_numbers(group, numbers)
    return trial


def with_items(
    workspace: Workspace, results: Iterable[Trial], evaluations: Mapping[str, EvaluationResult]
) -> tuple[Trial, ...]:
    """Store the evaluations, by key of the trial, and return the trials that name them."""
    store = EvaluationStore(workspace.evaluations)
    stored_trials = []
    for trial in results:
        evaluation = evaluations[trial.key]
        keys = {name: f"{trial.key}-{name}" for name in evaluation.results}
        for name, result in evaluation.results.items():
            numbers = {
                f"{metric},{filter_name or NO_FILTER}": value
                for label, value in result.metrics.items()
                for metric, _, filter_name in [label.partition(FILTER_MARK)]
            }
            run = {"results": {name: numbers}, "versions": {name: result.version}, "n-shot": {}}
            items = result.items or [str(number) for number in range(result.num_items)]
            task = MeasuredTask(name=name, output=run, items=items, values=result.values)
            store.write(keys[name], task, {})
        stored = EvaluationKeys(tasks=keys, groups=evaluation.groups, skipped=evaluation.skipped)
        stored_trials.append(trial.model_copy(update={"evaluation": stored}))
    return tuple(stored_trials)


def sample_front(
    trials: Iterable[Trial],
    axes: FrontAxes | None = None,
    *,
    sweep_of: Mapping[str, str] | None = None,
) -> Front:
    """Return the front of trials; `sweep_of` gives each key's sweep if they are from several."""
    models = model_results(trials)
    if sweep_of:
        models = [replace(model, sweep=sweep_of[model.key]) for model in models]
    return find_front(models, axes)


def keeping(front: Front, keeps: dict[str, float]) -> Front:
    """Return the front with these confidences of keeping the quality, and 0.5 of all others."""
    placed = [
        model.with_numbers({CONFIDENCE_KEEPS_99: keeps.get(model.key, 0.5)})
        for model in front.placed
    ]
    return replace(front, placed=tuple(placed))
