"""The models of a sweep: those that it trains from random weights, and baselines of the user.

A threshold sweep and a search train a teacher, vanilla and the model without corrections. An
iterations sweep trains methods and numbers of corrections, with learning rates and seeds. Text may
take hours to prepare and a teacher days to train, so missing tasks and impossible models are found
here, before anything is read or trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from iiet.cost import inference_cost
from iiet.iiad.pruning import Cost, num_evaluations
from iiet.model.config import PRESETS, ModelConfig
from iiet.model.facts import METHODS, facts_of, metric_facts_of
from iiet.model.schedule import IterationSchedule
from orchestrator.data.preparation import reads_tokens, sequence_length
from orchestrator.evaluation.tasks import check_task_names, lm_eval_task_fingerprints
from orchestrator.models.folder import load_config
from orchestrator.models.labels import model_name, seed_label, trained_label
from orchestrator.models.open import open_model
from orchestrator.planning.machine import Resources, check_available, check_run_resources
from orchestrator.planning.trial_gpus import assign_trial_gpus
from orchestrator.records.metrics import BUDGET_METRICS, METRICS
from orchestrator.settings import (
    BASELINE_METHOD,
    ModelSettings,
    Settings,
    SweepSettings,
)
from orchestrator.settings.evaluation import usual_metric
from orchestrator.settings.resolve import list_of_problems
from orchestrator.settings.schema import broken_rules
from orchestrator.settings.sweep import has_layers, split_count
from orchestrator.sweeping.student_schedules import (
    budget_costs,
    cheapest_schedule,
    most_left_out,
    named_schedules,
)
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.training.distilling import STUDENTS_SECTION, student_schedule
from orchestrator.training.job import sequences_per_step
from orchestrator.training.source import Source
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace

TEACHER = "teacher"
T = TypeVar("T")


def has_counts(method: str) -> bool:
    """Return whether a sweep varies a method's corrections; a method with levels is trained at its
    full level."""
    return facts_of(method).has_corrections and facts_of(method).full_level is None


@dataclass(frozen=True, kw_only=True)
class ModelVariant:
    """What distinguishes a model from the others that a sweep trains from scratch."""

    method: str
    corrections: int | str | tuple[int, ...] | None = None
    """Corrections as in the settings; None for a method without any."""
    num_layers: int | None = None
    """Number of layers, if it differs from the settings."""
    learning_rate: float | None = None
    """One of several rates of the model; None if it has only one."""
    seed: int | None = None
    """One of several seeds of the sweep; None if it has none."""

    @property
    def name(self) -> str:
        """Name of the model: `vanilla`, `r = 3`, `vanilla, 8 layers`."""
        return trained_label(self.method, self.corrections, self.num_layers)

    @property
    def names_in_settings(self) -> tuple[str, ...]:
        """Names by which settings may refer to this model, the most specific one first."""
        return self.name, trained_label(self.method, self.corrections), self.method

    @property
    def group(self) -> str:
        """Name with the learning rate; variants of one group are seeds of one model."""
        return self.name + (f", rate {self.learning_rate:g}" if self.learning_rate else "")

    @property
    def label(self) -> str:
        """Name with learning rate and seed, in tables and figures."""
        return self.group if self.seed is None else seed_label(self.group, self.seed)


def _values_of(
    setting: Mapping[str, T | tuple[T, ...]], names: Iterable[str], default: T
) -> tuple[T, ...]:
    """Return the values of a setting by model, under the first of a model's names that is a key."""
    value = next((setting[name] for name in names if name in setting), default)
    return value if isinstance(value, tuple) else (value,)


def learning_rates(settings: Settings, model: ModelVariant) -> tuple[float, ...]:
    """Return a model's learning rates: its own, else its method's, else those for all models."""
    return _values_of(
        settings.sweep.learning_rates, model.names_in_settings, settings.training.learning_rate
    )


def num_layers_of_settings(settings: Settings) -> int | None:
    """Return the number of layers of the settings' model; None for an unknown preset, which is
    refused when the model is built."""
    shape = settings.model
    return shape.num_layers or PRESETS.get(shape.preset, {}).get("num_layers")


def _at_each_num_layers(settings: Settings, model: ModelVariant) -> Iterator[ModelVariant]:
    default = num_layers_of_settings(settings)
    for number in _values_of(settings.sweep.num_layers, model.names_in_settings, default):
        yield replace(model, num_layers=None if number == default else number)


def swept_variants(settings: Settings) -> Iterator[ModelVariant]:
    """Yield the models of an iterations sweep: all combinations of method, corrections, number of
    layers, learning rate and seed."""
    for method in settings.sweep.methods:
        counts = settings.sweep.iterations if has_counts(method) else (None,)
        for count in counts:
            variant = ModelVariant(method=method, corrections=count)
            for model in _at_each_num_layers(settings, variant):
                rates = learning_rates(settings, model)
                own_rates = rates if len(rates) > 1 else (None,)
                for rate in own_rates:
                    for seed in settings.sweep.seeds or (None,):
                        yield replace(model, learning_rate=rate, seed=seed)


def teachers_by_label(settings: Settings) -> dict[str, ModelVariant]:
    """Return label -> teacher that a sweep trains: the settings' model and those of
    `sweep.teachers`.

    Several teachers have their own names, and are trained under each seed.
    """
    first = ModelVariant(method=settings.model.method, corrections=settings.model.corrections)
    if not settings.sweep.teachers:
        return {TEACHER: first}
    teachers = [first, *_named_models(settings, settings.sweep.teachers)]
    return {teacher.label: teacher for teacher in _under_seeds(settings, teachers)}


def baseline_models(settings: Settings) -> list[ModelVariant]:
    """Return the baselines of the settings' teacher, each at its numbers of layers.

    With several teachers, baselines are trained under each seed, as the teachers are. A teacher
    with a source model, and a plain teacher, have only the baselines that the settings name.
    """
    baselines: list[ModelVariant] = []
    makes_corrections = facts_of(settings.model.method).has_corrections
    if makes_corrections and not settings.has_source:
        baselines.append(ModelVariant(method=BASELINE_METHOD))
        baselines.append(ModelVariant(method=settings.model.method, corrections=0))
    baselines += _named_models(settings, settings.sweep.baselines)
    models = [model for variant in baselines for model in _at_each_num_layers(settings, variant)]
    return _under_seeds(settings, models) if settings.sweep.teachers else models


def _named_models(settings: Settings, names: Iterable[str]) -> Iterator[ModelVariant]:
    for name in names:
        method, count = split_count(name)
        if count is None and has_counts(method):
            yield ModelVariant(method=method, corrections=settings.model.corrections)
        else:
            yield ModelVariant(method=method, corrections=count)


def _under_seeds(settings: Settings, models: Iterable[ModelVariant]) -> list[ModelVariant]:
    seeds = settings.sweep.seeds or (None,)
    return [replace(model, seed=seed) for model in models for seed in seeds]


@dataclass(frozen=True, kw_only=True)
class SweptModels:
    """The models that a sweep trains from random weights or a source, as its settings name them."""

    teachers: Mapping[str, ModelVariant]
    """By label; none of an iterations sweep."""
    baselines: Sequence[ModelVariant]
    """Beside the teachers."""
    variants: Sequence[ModelVariant]
    """Those of an iterations sweep; none of others."""

    @staticmethod
    def of(settings: Settings) -> SweptModels:
        """Return the models that the settings name."""
        if settings.sweep.kind == "iterations":
            return SweptModels(teachers={}, baselines=(), variants=(*swept_variants(settings),))
        teachers = teachers_by_label(settings)
        return SweptModels(teachers=teachers, baselines=baseline_models(settings), variants=())

    @property
    def labels(self) -> set[str]:
        """Labels of all of them."""
        trained = (*self.baselines, *self.variants)
        return {*self.teachers, *(variant.label for variant in trained)}


def settings_of(settings: Settings, variant: ModelVariant) -> Settings:
    """Return the settings of a variant, at its learning rate, else at the first one of its
    model."""
    changes: dict[str, Any] = {"method": variant.method}
    full_level = facts_of(variant.method).full_level
    if variant.corrections is not None:
        changes["corrections"] = variant.corrections
    elif full_level is not None:
        changes["corrections"] = full_level
    if variant.num_layers is not None:
        changes["num_layers"] = variant.num_layers
    if variant.method != settings.model.method:
        changes["method_options"] = {}
    model = ModelSettings.model_validate(
        {**settings.model.model_dump(exclude_unset=True), **changes}
    )
    rate = variant.learning_rate or learning_rates(settings, variant)[0]
    recipe: dict[str, Any] = {"learning_rate": rate}
    if variant.corrections in (None, 0, "0"):  # Without corrections no schedule is cheaper.
        recipe["elastic"] = None
    if variant.seed is not None:
        recipe["seed"] = variant.seed
    training = settings.training.model_copy(update=recipe)
    return settings.model_copy(update={"model": model, "training": training})


def teacher_and_baselines(
    settings: Settings, swept: SweptModels, teacher_settings: Settings | None = None
) -> dict[str, Settings]:
    """Return the settings of the teachers and the baselines that a sweep trains, by label.

    Args:
        teacher_settings: Settings of a teacher with a source model; its baselines have none.
    """
    baseline_settings = settings
    if teacher_settings is not None:
        changes = {"training": settings.training.without_source(), "source_training": None}
        baseline_settings = settings.model_copy(update=changes)
    models: dict[str, Settings] = {}
    for label, variant in swept.teachers.items():
        models[label] = settings_of(teacher_settings or settings, variant)
    for variant in swept.baselines:
        models[variant.label] = settings_of(baseline_settings, variant)
    return models


# Baselines that the user names


def named_baselines(
    settings: Settings, swept: SweptModels, workspace: Workspace, teacher: Path | None
) -> dict[str, Path]:
    """Return label -> checkpoint of the runs in `sweep.baseline_runs`.

    A label has method and corrections, like those of trained models, and the name of the run if
    that label is taken.

    Args:
        teacher: The given teacher; None if the sweep trains its models.

    Raises:
        UserError: If there is no such run, it is damaged, or it is the teacher.
    """
    if teacher:
        usual_layers: int | None = load_config(teacher).num_layers
        taken_labels = {TEACHER}
    else:
        usual_layers = num_layers_of_settings(settings)
        taken_labels = swept.labels
    baselines: dict[str, Path] = {}
    for name in settings.sweep.baseline_runs:
        try:
            checkpoint = open_model(name, workspace, folders="none").path
            config = load_config(checkpoint)
        except UserError as error:
            raise type(error)(f"sweep.baseline_runs: {error}") from None
        if checkpoint == teacher:
            raise UserError(
                f"sweep.baseline_runs: {name} is the teacher of the sweep, which is on its front "
                "anyway; leave it out"
            )
        if checkpoint in baselines.values():  # The user named it twice.
            continue
        counts = tuple(config.corrections)
        is_uniform = len(set(counts)) == 1
        num_layers = None if config.num_layers == usual_layers else config.num_layers
        label = trained_label(config.method, counts[0] if is_uniform else counts, num_layers)
        if label in taken_labels:
            label = f"{label} ({model_name(checkpoint)})"
        taken_labels.add(label)
        baselines[label] = checkpoint
    return baselines


def check_named_baselines(
    baselines: Mapping[str, Path], tokens: Path, models: Iterable[ModelConfig]
) -> None:
    """Check that the user's baselines can be measured like the models of a sweep.

    Args:
        tokens: Prepared tokens of the sweep.
        models: Models of the sweep, or some of them.

    Raises:
        UserError: If one was trained on other tokens, was imported with another tokenizer, or has
            a shorter context.
    """
    length = max((model.context_length for model in models), default=0)
    for checkpoint in baselines.values():
        if not reads_tokens(checkpoint, tokens):
            raise UserError(
                f"sweep.baseline_runs: {checkpoint} was trained on other tokens than this sweep's "
                f"({tokens.name}), or has another tokenizer, so it cannot be compared; "
                "name a run of the same tokens, or leave it out"
            )
        baseline_length = load_config(checkpoint).context_length
        if baseline_length < length:
            raise UserError(
                f"sweep.baseline_runs: {checkpoint} reads {baseline_length} tokens, and the models "
                f"of this sweep read {length}; name a run of their context length, or leave it out"
            )


# What must hold before anything starts


def schedule_cost(unit: str, full: ModelConfig) -> Cost:
    """Return the function that computes the cost per token of a model's schedules.

    The unit is `evaluations`, `flops`, `kv` (bytes) or `parameters`.
    """
    if unit == "evaluations":
        return num_evaluations

    @lru_cache
    def cost_of(schedule: IterationSchedule) -> float:
        cost = inference_cost(full, schedule)
        return float(getattr(cost, METRICS[BUDGET_METRICS[unit]].counted_as))

    return cost_of


def check_sweep(settings: Settings, progress: Progress | None = None) -> None:
    """Check that a sweep's settings fit each other; with a progress display also check its tasks.

    Raises:
        UserError: Names the settings that do not fit each other, and what to change.
    """
    if broken := broken_rules(settings, of_sweep=True):
        raise UserError(list_of_problems("settings", broken))
    if settings.sweep.asha and not any(model.learning_rate for model in swept_variants(settings)):
        raise UserError(
            "sweep.asha ends the worse of a model's learning rates, and no model has more than "
            "one; name several for each model: --set 'sweep.learning_rates={iiet: [1e-3, 2e-3]}'"
        )
    check_task_names(settings.evaluation)
    if progress:
        lm_eval_task_fingerprints(settings.evaluation, progress, needs_accuracy=True)


def check_devices(
    settings: Settings, resources: Resources | None = None, *, pretrains: bool
) -> None:
    """Check that a joined cluster, or this machine, has the CPUs and GPUs of one trial, and of a
    teacher that is trained first.

    Raises:
        UserError: If there are too few.
    """
    sweep = assign_trial_gpus(settings).sweep
    num_gpus = sweep.gpus_per_trial or 0
    address = settings.cluster.ray_address
    check_available(sweep.workers_per_trial, num_gpus, resources, address=address, per_trial=True)
    if pretrains:
        check_run_resources(settings.cluster, resources)


def check_teacher(sweep: SweepSettings, full: ModelConfig, metric: str | None) -> None:
    """Check that a teacher has what its sweep asks for.

    Args:
        metric: Of its influence; None for the usual one.

    Raises:
        UserError: If it makes no corrections that could be pruned, a threshold is below every
            influence, a schedule of the user does not fit it, or a budget is less than the
            cheapest schedule costs.
    """
    method = facts_of(full.method)
    max_left_out = most_left_out(sweep, full)
    if method.repeats_stack:
        raise UserError(
            f"a {sweep.kind} sweep prunes the layers of its teacher, and one of "
            f"model.method={full.method} repeats the whole stack; take method iiet, pcformer or "
            "vanilla, or sweep.kind=iterations"
        )
    if not full.corrections.num_corrections and not max_left_out:
        raise UserError(
            f"a {sweep.kind} sweep leaves out corrections or layers, the teacher makes no "
            f"corrections, and sweep.leave_out_layers={sweep.leave_out_layers} keeps its "
            f"{format_count(full.num_layers, 'layer')}; leave the setting out, or take a teacher "
            "with corrections or of more layers"
        )
    if sweep.teachers and not full.corrections.num_corrections:
        raise UserError(
            f"sweep.teachers: one of model.method={full.method} makes no corrections, and is a "
            "baseline of this sweep already; sweep a plain teacher by itself"
        )
    if max_left_out and sweep.elastic:
        raise UserError(
            "sweep.elastic: elastic weights serve schedules of one set of layers; set "
            "sweep.leave_out_layers=none, or leave sweep.elastic out"
        )
    metric = metric or usual_metric(of_whole_layers=max_left_out > 0)
    if min(sweep.thresholds, default=0) < 0 and not metric_facts_of(metric).may_be_negative:
        raise UserError(
            f"sweep.thresholds: no influence by influence.metric={metric} is below 0; leave "
            "negative thresholds out"
        )
    for text in named_schedules(sweep):
        student_schedule(text, full.corrections, "sweep.schedules")
    cost = schedule_cost(sweep.budget_unit, full)
    least = cost(cheapest_schedule(full, max_left_out))
    allowed_costs = budget_costs(sweep, cost(full.corrections))
    short = [
        f"{budget:g}" if isinstance(budget, float) else budget
        for budget, allowed in zip(sweep.budgets, allowed_costs, strict=True)
        if allowed < least
    ]
    if short:
        raise UserError(
            f"sweep.budgets: no schedule costs at most {' or '.join(short)} {sweep.budget_unit}; "
            f"the cheapest costs {least:,.10g}"
        )


def check_models(settings: Settings, swept: SweptModels, source: Source | None = None) -> None:
    """Check that the models of a sweep can be built, without any data.

    Args:
        source: The teacher's source model, if it exists already.

    Raises:
        UserError: Lists everything that is wrong with the models.
    """
    if settings.evaluation.apply_chat_template:
        raise UserError(
            "evaluation.apply_chat_template: models that are trained from random weights have no "
            "chat template; leave it out, or distill an imported model that has one"
        )
    sweep = settings.sweep
    data = settings.data
    is_scratch = sweep.kind == "iterations"
    models = swept.variants if is_scratch else swept.baselines

    # Every model is built once; with a baseline, its teacher is checked, too.
    problems = []
    configs = []
    for variant in swept.variants if is_scratch else swept.teachers.values():
        model = settings_of(settings, variant).model
        try:
            length = sequence_length(data)
            if source is not None:
                config = source.model(model)
            else:
                config = model.build(vocab_size=data.vocab_size, context_length=length)
            settings.evaluation.tokens_at_once(config.context_length)
            configs.append(config)
        except UserError as error:
            problems.append(str(error))

    # Names in settings must be those of models.
    known_names = {name for model in models for name in model.names_in_settings}
    # Rates may also be those of the teacher, or of an iterations sweep of the same file.
    rates = {name for name in sweep.learning_rates if is_scratch or has_layers(name)}
    unknown_rates = sorted(rates - known_names - {*METHODS})
    unknown = [f"sweep.learning_rates: {name}" for name in unknown_rates]
    unknown += [f"sweep.num_layers: {name}" for name in sweep.num_layers if name not in known_names]
    role = "swept" if is_scratch else "a baseline of this sweep"
    names = ", ".join(dict.fromkeys(model.name for model in models))
    problems += [f"{setting} is not {role}; such models are {names}" for setting in unknown]
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    if is_scratch:
        return
    if settings.distillation.control != "pruned":
        sequences_per_step(settings.distillation.training, configs[0], section=STUDENTS_SECTION)
    for config in configs:
        check_teacher(sweep, config, settings.influence.metric)
