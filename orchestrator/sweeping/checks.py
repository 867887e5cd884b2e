"""Check a sweep's settings together, and with this machine, before anything is read or trained.

Single settings are checked where they are read. Text may take hours to prepare and a teacher days
to train, so a missing task or an impossible model is found first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

from iiet.influence_metrics import INFLUENCE_METRICS
from iiet.methods import METHODS
from orchestrator.data.preparation import sequence_length
from orchestrator.evaluation.task_selection import lm_eval_task_fingerprints
from orchestrator.planning.estimate import assign_trial_gpus
from orchestrator.planning.machine import (
    Resources,
    check_available,
    check_on_cluster,
    check_resources,
    check_run_resources,
)
from orchestrator.settings import Settings
from orchestrator.settings.sweep import has_layers
from orchestrator.sweeping.model_plans import (
    ModelVariant,
    baseline_models,
    learning_rates,
    settings_of,
    swept_models,
)
from orchestrator.sweeping.selection import check_budgets
from orchestrator.sweeping.student_plans import check_student_batch, distillation_config
from orchestrator.terminal.progress import Progress
from orchestrator.training.model_config import build_model_config
from orchestrator.training.teacher_cache_policy import check_teacher_cache
from orchestrator.workspace.errors import UserError


def check_sweep(settings: Settings, progress: Progress | None = None) -> None:
    """Check that a sweep's settings go together.

    Args:
        settings: All sections.
        progress: Gets a note of each task that is skipped; tasks are not checked when unset.

    Raises:
        UserError: Says which settings do not go together and what to change.
    """
    kind = settings.sweep.kind
    sweep = assign_trial_gpus(settings).sweep
    if kind != "iterations" and settings.distillation.control == "distill":
        distillation_config(settings.distillation)
        check_teacher_cache(settings.distillation)
    if kind in ("threshold", "search"):
        _check_thresholds(settings)
    if sweep.asha:
        _check_asha(settings)
    _check_elastic(settings)
    if kind == "iterations":
        _refuse_chat_template(settings)
    if sweep.distilled_baselines:
        _check_distilled_baselines(settings)
    if kind == "search" and sweep.seeds:
        raise UserError(
            "a search distills each schedule once, and sweep.seeds is for threshold sweeps; "
            "leave it out"
        )
    if kind == "search" and settings.search.sampler == "gp" and find_spec("scipy") is None:
        raise UserError(
            "search.sampler=gp needs scipy, which is not installed; run `pip install scipy`, or "
            "set nsga2 or tpe"
        )
    if progress:
        lm_eval_task_fingerprints(settings.evaluation, progress, needs_accuracy=True)


def check_devices(settings: Settings, *, pretrains: bool) -> None:
    """Check that this machine has the CPUs and GPUs of one trial.

    Args:
        pretrains: Whether the sweep trains a teacher first, on the devices of section `cluster`.

    Raises:
        UserError: If it has not.
    """
    sweep, cluster = assign_trial_gpus(settings).sweep, settings.cluster
    check_resources(
        sweep.workers_per_trial,
        sweep.gpus_per_trial or 0,
        cluster.ray_address,
        per_trial=True,
    )
    if pretrains:
        check_run_resources(cluster)


def check_on_nodes(settings: Settings, resources: Resources, *, pretrains: bool) -> None:
    """Check that a cluster has the CPUs and GPUs of one trial; see `check_devices`."""
    sweep = assign_trial_gpus(settings).sweep
    gpus = sweep.gpus_per_trial or 0
    check_available(sweep.workers_per_trial, gpus, resources, per_trial=True)
    if pretrains:
        check_on_cluster(settings.cluster, resources)


def check_models(settings: Settings) -> None:
    """Check that the models of a sweep can be built, without any data.

    Args:
        settings: Sections `model` and `sweep` count, and `evaluation.apply_chat_template`.

    Raises:
        UserError: Names everything that is wrong with the models, all at once.
    """
    _refuse_chat_template(settings)
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


def _check_thresholds(settings: Settings) -> None:
    below = [threshold for threshold in settings.sweep.thresholds if threshold < 0]
    if below and not INFLUENCE_METRICS[settings.influence.metric].may_be_negative:
        raise UserError(
            f"sweep.thresholds: {below[0]:g} is below 0, which no influence of the metric "
            f"{settings.influence.metric} is; give thresholds of at least 0, such as 0.001,0.01"
        )


def _check_elastic(settings: Settings) -> None:
    sweep, distillation = settings.sweep, settings.distillation
    elastic = distillation.training.elastic
    if not sweep.elastic:
        if sweep.compare:
            raise UserError(
                "sweep.compare trains a student for each schedule beside elastic weights, and "
                "sweep.elastic is off; set it, or leave sweep.compare out"
            )
        if elastic and sweep.kind != "iterations":
            raise UserError(
                "distillation.training.elastic trains several schedules at once, and a sweep's "
                "students have one each; leave it out, or set sweep.elastic"
            )
        return
    if sweep.kind != "threshold":
        raise UserError(
            f"sweep.elastic trains the schedules of a threshold sweep at once, and sweep.kind="
            f"{sweep.kind} does not know them before training; leave it out, or set sweep.kind to "
            "threshold"
        )
    if distillation.control != "distill":
        raise UserError(
            f"sweep.elastic trains one set of weights for all schedules, and distillation.control="
            f"{distillation.control} is about students of one schedule; leave one of the two out"
        )
    if elastic and (elastic.schedules or not elastic.weight):
        given = "weight=0" if not elastic.weight else f"schedules={list(elastic.schedules)}"
        raise UserError(
            f"sweep.elastic trains the schedules that influence chooses, and "
            f"distillation.training.elastic.{given} asks for others; leave it out"
        )


def _check_distilled_baselines(settings: Settings) -> None:
    kind, distillation = settings.sweep.kind, settings.distillation
    name = "sweep.distilled_baselines"
    if kind == "iterations":
        raise UserError(
            f"{name} learn from a teacher, and sweep.kind=iterations has none; leave it out, or "
            "set sweep.kind to threshold or search"
        )
    if distillation.control != "distill":
        raise UserError(
            f"{name} are distilled as students are, and distillation.control="
            f"{distillation.control} distills nothing; leave one of the two out"
        )
    if distillation.hidden_weight:
        raise UserError(
            f"{name} have other numbers of layers than the teacher, and distillation.hidden_weight="
            f"{distillation.hidden_weight:g} compares layer with layer; set it to 0, or leave "
            f"{name} out"
        )


def _check_asha(settings: Settings) -> None:
    sweep = settings.sweep
    if sweep.kind != "iterations":
        raise UserError(
            f"sweep.asha compares learning rates, and all trials of a {sweep.kind} sweep have the "
            "same; leave it out"
        )
    if sweep.seeds:
        raise UserError(
            "sweep.asha looks for each model's best learning rate, under one seed; leave "
            "sweep.seeds out, and train the best rates under several seeds afterwards"
        )
    if not any(len(learning_rates(settings, model)) > 1 for model in swept_models(settings)):
        raise UserError(
            "sweep.asha ends the worse of a model's learning rates, and no model has more than "
            "one; name several for each model: --set 'sweep.learning_rates={iiet: [1e-3, 2e-3]}'"
        )


def _refuse_chat_template(settings: Settings) -> None:
    if settings.evaluation.apply_chat_template:
        raise UserError(
            "evaluation.apply_chat_template: models that are trained from scratch have no chat "
            "template; leave it out, or distill an imported model that has one"
        )
