"""What is trained from a teacher whose influence is not known yet, at most."""

from __future__ import annotations

from iiet.config import ModelConfig
from orchestrator.planning.estimate import Estimate
from orchestrator.settings import Settings
from orchestrator.sweeping.distilled_baselines import baselines_upper_bound
from orchestrator.sweeping.elastic_plans import elastic_upper_bound
from orchestrator.sweeping.student_plans import student_estimates
from orchestrator.terminal.render import format_count


def students_upper_bound(settings: Settings, teacher: ModelConfig) -> tuple[list[Estimate], str]:
    """Return the trainings of a teacher's students at most, and a sentence that counts them.

    Their schedules are unknown, so each student makes all of the teacher's corrections.
    """
    sweep, distillation = settings.sweep, settings.distillation
    is_pruned, num_seeds = distillation.control == "pruned", max(1, len(sweep.seeds))
    number = len(sweep.thresholds) or len(sweep.budgets) or sweep.num_schedules
    number = min(number, 1 + sum(teacher.corrections))
    if sweep.kind == "search":
        number = min(number + settings.search.num_trials, teacher.corrections.num_within)
    baselines = student_estimates(settings, teacher, baselines_upper_bound(settings, teacher))
    trainings, counts = [], format_count(number if is_pruned else number * num_seeds, "student")
    if not is_pruned and (sweep.compare or not sweep.elastic):
        student = teacher, distillation.training
        trainings = student_estimates(settings, teacher, [student] * number)
    if sweep.elastic:
        elastic = elastic_upper_bound(settings, teacher)
        trainings = student_estimates(settings, teacher, [elastic]) + trainings
        beside = f", and {counts}" if sweep.compare else ""
        counts = f"{format_count(num_seeds, 'elastic training')}{beside}"
    more = f" and {format_count(len(baselines), 'distilled baseline')}" if baselines else ""
    trainings += baselines
    priced = "they are priced as if each made all of the teacher's corrections"
    return trainings, (
        f"its students' schedules are not known yet: at most {counts}{more}; "
        f"{priced if trainings else 'none of them is trained'}"
    )
