"""Check a sweep's settings together, and with this machine, before anything is read or trained.

Single settings are checked where they are read. Text may take hours to prepare and a teacher days
to train, so a missing task or an impossible model is found first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from iiet.methods import METHODS
from orchestrator.data.preparation import sequence_length
from orchestrator.evaluation.selection import lm_eval_task_fingerprints
from orchestrator.models.config import build_model_config
from orchestrator.planning.estimate import assign_trial_gpus
from orchestrator.planning.machine import (
    Resources,
    check_available,
    check_resources,
    check_run_resources,
)
from orchestrator.settings import Settings
from orchestrator.settings.resolve import list_of_problems
from orchestrator.settings.schema import broken_sweep_rules
from orchestrator.settings.sweep import has_layers
from orchestrator.sweeping.model_plans import (
    ModelVariant,
    baseline_models,
    learning_rates,
    settings_of,
    swept_models,
)
from orchestrator.sweeping.plan import check_budgets
from orchestrator.sweeping.trials import check_student_batch
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError


def check_sweep(settings: Settings, progress: Progress | None = None) -> None:
    """Check that a sweep's settings go together.

    Args:
        settings: All sections.
        progress: Gets a note of each task that is skipped; tasks are not checked when unset.

    Raises:
        UserError: Says which settings do not go together and what to change.
    """
    if broken := broken_sweep_rules(settings):
        raise UserError(list_of_problems("settings", broken))
    assign_trial_gpus(settings)
    if settings.sweep.asha and not any(
        len(learning_rates(settings, model)) > 1 for model in swept_models(settings)
    ):
        raise UserError(
            "sweep.asha ends the worse of a model's learning rates, and no model has more than "
            "one; name several for each model: --set 'sweep.learning_rates={iiet: [1e-3, 2e-3]}'"
        )
    if progress:
        lm_eval_task_fingerprints(settings.evaluation, progress, needs_accuracy=True)


def check_devices(
    settings: Settings, resources: Resources | None = None, *, pretrains: bool
) -> None:
    """Check that there are the CPUs and GPUs of one trial.

    Args:
        resources: Nodes of a cluster that was joined; this machine's when unset.
        pretrains: Whether the sweep trains a teacher first, on the devices of section `cluster`.

    Raises:
        UserError: If there are too few.
    """
    sweep, cluster = assign_trial_gpus(settings).sweep, settings.cluster
    num_workers, num_gpus = sweep.workers_per_trial, sweep.gpus_per_trial or 0
    if resources:
        check_available(num_workers, num_gpus, resources, per_trial=True)
    else:
        check_resources(num_workers, num_gpus, cluster.ray_address, per_trial=True)
    if pretrains:
        check_run_resources(cluster, resources)


def check_models(settings: Settings) -> None:
    """Check that the models of a sweep can be built, without any data.

    Args:
        settings: Sections `model` and `sweep` count, and `evaluation.apply_chat_template`.

    Raises:
        UserError: Names everything that is wrong with the models, all at once.
    """
    if settings.evaluation.apply_chat_template:
        raise UserError(
            "evaluation.apply_chat_template: models that are trained from scratch have no chat "
            "template; leave it out, or distill an imported model that has one"
        )
    kind = settings.sweep.kind
    build = partial(
        build_model_config,
        vocab_size=settings.data.vocab_size,
        context_length=sequence_length(settings.data),
    )
    if kind == "iterations":
        problems = []
        models = list(swept_models(settings))
        for model in models:
            try:
                build(settings_of(settings, model).model)
            except UserError as error:
                problems.append(str(error))
        problems += _settings_of_no_model(settings, models)
        if problems:
            raise UserError("; ".join(dict.fromkeys(problems)))
        return
    config = build(settings.model)
    if problems := _settings_of_no_model(settings, baseline_models(settings)):
        raise UserError("; ".join(problems))
    if settings.distillation.control != "pruned":
        check_student_batch(settings.distillation, config)
    check_budgets(settings.sweep, config)
    if METHODS[config.method].repeats_stack:
        raise UserError(
            f"a {kind} sweep prunes the corrections of single layers, and model.method="
            f"{config.method} repeats the whole stack; take method iiet, or compare numbers of "
            "repetitions with sweep.kind=iterations"
        )
    if not METHODS[config.method].has_corrections or not sum(config.corrections):
        raise UserError(
            f"a {kind} sweep prunes its teacher's corrections, and a teacher of "
            f"model.method={settings.model.method} and model.corrections="
            f"{settings.model.corrections} has none; take method iiet with 1 correction or more"
        )


def _settings_of_no_model(settings: Settings, models: Sequence[ModelVariant]) -> list[str]:
    """Return which learning rates and numbers of layers are those of a model that is not trained.

    Args:
        models: What is trained, apart from a teacher and its students.
    """
    sweep, names = settings.sweep, ", ".join(model.name for model in models)
    known = {key for model in models for key in model.keys}
    rates = [name for name in sweep.learning_rates if name not in {*METHODS, *known}]
    if sweep.kind == "iterations":
        trained = f"is not swept; swept are {names}"
    else:
        # Other rates may be those of the teacher, or of an iterations sweep from the same file.
        rates = [name for name in rates if has_layers(name)]
        trained = f"is no baseline of this sweep; baselines are {names}"
    layers = [name for name in sweep.num_layers if name not in known]
    problems = [
        (f"sweep.learning_rates has a rate of {', '.join(rates)}", rates),
        (f"sweep.num_layers has a number of layers of {', '.join(layers)}", layers),
    ]
    return [f"{problem}, which {trained}" for problem, found in problems if found]
