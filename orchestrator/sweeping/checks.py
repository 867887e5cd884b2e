"""What a sweep's settings can have wrong together, found before the first token is trained on.

Single settings are checked where they are read. Here are those that only do not go together, or
with this machine, and the tasks: who finds out after hours of pretraining that a task does not
exist has lost them.
"""

from __future__ import annotations

from typing import Literal

from orchestrator.cluster.placement import check_trial_size
from orchestrator.evaluation.task_selection import lm_eval_task_fingerprints
from orchestrator.planning.trial_gpus import assign_trial_gpus
from orchestrator.settings import Settings, method_of_label
from orchestrator.sweeping.students import loss_of
from orchestrator.terminal.progress import Progress
from orchestrator.training.teacher_cache_policy import check_teacher_cache
from orchestrator.workspace.errors import UserError

Kind = Literal["threshold", "iterations", "search"]


def check_sweep(settings: Settings, kind: Kind, progress: Progress | None = None) -> None:
    """Check what a sweep can be refused for without having trained anything.

    Args:
        settings: The whole tree.
        kind: What is swept; a command may not follow `sweep.kind`.
        progress: Told which tasks will be skipped; without it tasks are not looked at.

    Raises:
        UserError: Says which settings do not go together and what to change.
    """
    check_trial_size(assign_trial_gpus(settings).sweep)
    if kind != "iterations" and settings.distillation.control == "distill":
        loss_of(settings.distillation)
        check_teacher_cache(settings.distillation)
    if kind in ("threshold", "search"):
        _check_thresholds(settings)
    _check_stopping(settings, kind)
    if kind == "search":
        _check_search(settings)
    if progress:
        lm_eval_task_fingerprints(settings.evaluation, progress, needs_accuracy=True)


def _check_thresholds(settings: Settings) -> None:
    below = [threshold for threshold in settings.sweep.thresholds if threshold < 0]
    if below and settings.influence.metric != "loss":
        raise UserError(
            f"sweep.thresholds: {below[0]:g} is below 0, which no influence of the metric "
            f"{settings.influence.metric} is; give thresholds of at least 0, such as 0.001,0.01"
        )


def _check_stopping(settings: Settings, kind: Kind) -> None:
    sweep = settings.sweep
    if sweep.asha and kind == "iterations":
        _check_there_are_rates_to_end(settings)
    elif sweep.asha:
        raise UserError(
            f"sweep.asha compares learning rates, and all trials of a {kind} sweep have the same; "
            "leave it out"
        )


def _check_search(settings: Settings) -> None:
    if settings.sweep.seeds:
        raise UserError(
            "a search distills each schedule once, and sweep.seeds is for threshold sweeps; "
            "leave it out"
        )


def _check_there_are_rates_to_end(settings: Settings) -> None:
    if settings.sweep.seeds:
        raise UserError(
            "sweep.asha looks for each model's best learning rate, under one seed; leave "
            "sweep.seeds out, and train the best rates under several seeds afterwards"
        )
    methods, rates = settings.sweep.methods, settings.sweep.learning_rates
    swept = [own for name, own in rates.items() if method_of_label(name) in methods]
    if not any(isinstance(own, tuple) and len(own) > 1 for own in swept):
        raise UserError(
            "sweep.asha ends the worse of a model's learning rates, and no model has more than "
            "one; name several: --rates 1e-3,2e-3,4e-3, or sweep.learning_rates for each model"
        )
