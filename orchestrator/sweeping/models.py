"""The models that a sweep trains from scratch, each with its own settings; all exist, or nothing is
read.

A threshold sweep's file and a search's train a teacher, vanilla and the mix alone; the others train
methods and iteration counts. Text may take hours to be read, and a teacher days to be trained: a
model that cannot be is found before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from iiet.config import ModelConfig
from iiet.methods import METHODS
from orchestrator.settings import BASELINE_METHOD, ModelSettings, Settings, model_label
from orchestrator.sweeping.budgets import check_budgets
from orchestrator.sweeping.checks import Kind
from orchestrator.sweeping.students import check_student_batch
from orchestrator.training.model_config import build_model_config
from orchestrator.workspace.errors import UserError

TEACHER = "teacher"


def check_models(settings: Settings, kind: Kind) -> None:
    """Check the models of a sweep that trains its own, without any of their data.

    Args:
        settings: Sections `model` and `sweep` count.
        kind: What is swept.

    Raises:
        UserError: Names what no model can be made of, all at once.
    """
    vocab_size = settings.data.vocab_size
    if kind == "iterations":
        problems = []
        for _, changes in models_of(settings):
            try:
                build_model_config(with_model(settings, **changes).model, vocab_size=vocab_size)
            except UserError as error:
                problems.append(str(error))
        names = [name for name, _ in models_of(settings)]
        idle = [n for n in settings.sweep.learning_rates if "r = " in n and n not in names]
        if idle:
            problems.append(
                f"sweep.learning_rates has a rate of {', '.join(idle)}, which is not swept; swept "
                f"are {', '.join(names)}"
            )
        if problems:
            raise UserError("; ".join(dict.fromkeys(problems)))
        return
    config = build_model_config(settings.model, vocab_size=vocab_size)
    if settings.distillation.control != "pruned":
        check_student_batch(settings.distillation, config)
    check_budgets(settings.sweep, config)
    if not METHODS[config.method].has_corrections or not sum(config.corrections):
        raise UserError(
            f"a {kind} sweep prunes its teacher's corrections, and a teacher of "
            f"model.method={settings.model.method} and model.corrections="
            f"{settings.model.corrections} has none; take method iiet with 1 correction or more"
        )


def teacher_and_baselines(settings: Settings) -> dict[str, Settings]:
    """Return the settings of the models that the students of a sweep are measured against."""
    return {
        TEACHER: with_model(settings),
        BASELINE_METHOD: with_model(settings, method=BASELINE_METHOD),
        model_label(settings.model.method, 0): with_model(settings, corrections=0),
    }


def most_students(settings: Settings, teacher: ModelConfig) -> int:
    """Return how many students a teacher will have at most."""
    sweep = settings.sweep
    asked = len(sweep.thresholds) or len(sweep.budgets) or sweep.num_schedules
    num_schedules = min(asked, 1 + sum(teacher.corrections))
    if sweep.kind == "search":
        num_schedules += settings.search.num_trials
        num_schedules = min(num_schedules, teacher.corrections.num_within)
    is_pruned = settings.distillation.control == "pruned"
    return num_schedules * (1 if is_pruned else max(1, len(sweep.seeds)))


def models_of(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and model settings of the methods and iteration counts that a sweep trains."""
    for method in settings.sweep.methods:
        if not METHODS[method].has_corrections:
            yield method, {"method": method}
            continue
        for count in settings.sweep.iterations:
            yield model_label(method, count), {"method": method, "corrections": count}


def with_model(settings: Settings, **changes: Any) -> Settings:
    """Return the settings of another method or count, at that one's own (first) learning rate."""
    return with_rates(settings, **changes)[0]


def with_rates(settings: Settings, **changes: Any) -> list[Settings]:
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
