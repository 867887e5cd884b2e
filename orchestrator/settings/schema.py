"""The whole tree of settings, and the rules between them.

The rules of the tree hold for every command, and pydantic checks them once all fields are right.
Those of a sweep hold for sweeps only: other commands read the same file without its sections
`sweep` and `search`. Rules that need a model, the data or the workspace belong to the plans.

A broken rule is a text `setting, setting: what to do`; the values are added when it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import attrgetter
from typing import Self, get_args

from pydantic import model_validator
from pydantic.fields import FieldInfo

from orchestrator.settings.cluster import ClusterSettings
from orchestrator.settings.data import DataSettings
from orchestrator.settings.evaluation import EvaluationSettings, InfluenceSettings
from orchestrator.settings.section import Section
from orchestrator.settings.sweep import SearchSettings, SweepSettings
from orchestrator.settings.training import (
    FIELDS_OF_A_SOURCE,
    DistillationSettings,
    ElasticSettings,
    ModelSettings,
    TrainingSettings,
)
from orchestrator.workspace.errors import quoted

_READ_BY_KINDS = {
    "asha": ("iterations",),
    "teachers, elastic": ("threshold",),
    "seeds": ("threshold", "iterations"),
    "baselines": ("threshold", "search"),
    "baseline_runs": ("threshold", "search", "iterations"),
}
"""Settings of a sweep -> the kinds of sweeps that read them."""


class Settings(Section):
    """The whole tree."""

    data: DataSettings = DataSettings()
    """Corpus and tokenizer."""
    model: ModelSettings = ModelSettings()
    """Shape of the model."""
    source_training: TrainingSettings | None = None
    """Recipe of a plain model (vanilla) of the teacher's sizes, which a sweep trains first and
    takes as the source of its teacher, in place of a `training.source` that exists. Only sweeps
    that train their teacher read it (default: the teacher starts from random weights)."""
    training: TrainingSettings = TrainingSettings()
    """Recipe of the pretraining."""
    distillation: DistillationSettings = DistillationSettings()
    """Recipe of the distillation."""
    influence: InfluenceSettings = InfluenceSettings()
    """Measurement of influence."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Tasks and their size."""
    sweep: SweepSettings = SweepSettings()
    """Trials of a sweep."""
    search: SearchSettings = SearchSettings()
    """Search for free schedules."""
    cluster: ClusterSettings = ClusterSettings()
    """Workers and GPUs."""

    @model_validator(mode="after")
    def _follow_the_rules(self) -> Self:
        if broken := broken_rules(self):
            raise ValueError("\n".join(broken))
        return self

    @property
    def has_source(self) -> bool:
        """Whether the model that is trained starts from the weights of another one."""
        return self.training.source is not None or self.source_training is not None

    @property
    def trials_use_gpus(self) -> bool:
        """Whether a sweep's trials run on GPUs (default: as `cluster.num_gpus` says)."""
        gpus_per_trial = self.sweep.gpus_per_trial
        return (self.cluster.num_gpus if gpus_per_trial is None else gpus_per_trial) > 0


def fields_of(location: list[str]) -> dict[str, FieldInfo]:
    """Return the fields of the section at a location by name; none if it is not a section."""
    section: type[Section] = Settings
    for name in location:
        field = section.model_fields.get(name)
        # A section that may be left out is one of two types.
        types = [] if field is None else [field.annotation, *get_args(field.annotation)]
        sections = [t for t in types if isinstance(t, type) and issubclass(t, Section)]
        if not sections:
            return {}
        section = sections[0]
    return section.model_fields


def find_field(key: str) -> FieldInfo:
    """Return the field of a setting such as `training.num_steps`: type, limits, description.

    Raises:
        KeyError: If there is no such setting.
    """
    *sections, name = key.split(".")
    return fields_of(sections)[name]


def broken_rules(settings: Settings, *, of_sweep: bool = False) -> list[str]:
    """Return which rules are broken, with the values that break them.

    Args:
        of_sweep: Apply the rules of a sweep, too, which other commands do not run.
    """
    rules = [*_of_data_and_devices(settings), *_of_trainings(settings)]
    if of_sweep:
        rules += [*_of_sweep(settings), *_of_elastic_sweep(settings)]

    def with_value(match: re.Match[str]) -> str:
        return f"{match[0]}={quoted(attrgetter(match[0])(settings))}"

    split = (rule.partition(": ") for rule in rules)
    return [re.sub(r"[\w.]+", with_value, names) + f": {advice}" for names, _, advice in split]


def _of_data_and_devices(settings: Settings) -> Iterator[str]:
    data = settings.data
    cluster = settings.cluster
    sweep = settings.sweep
    is_mixture = data.source == "mixture"
    read = data.shares if is_mixture else {data.source}
    if is_mixture != bool(data.shares):
        yield (
            "data.source, data.shares: a mixture, and nothing else, has shares, such as "
            "--set 'data.shares={python: 0.8, phop_6: 0.2}'"
        )
    if data.files and "files" not in read:
        yield "data.source, data.files: only source files, or a mixture with their share, reads it"
    if data.depth.tasks and data.source != "depth":
        yield "data.source, data.depth.tasks: only source depth reads it; a mixture has shares"
    if (cluster.min_gpus or 0) > cluster.num_gpus:
        yield "cluster.min_gpus, cluster.num_gpus: the first must not be above the second"
    if cluster.min_gpus and cluster.parallel == "fsdp":
        yield "cluster.min_gpus, cluster.parallel: fsdp needs a fixed number of workers; take ddp"
    if cluster.num_gpus and cluster.num_workers not in (1, cluster.num_gpus):
        yield "cluster.num_workers, cluster.num_gpus: each worker has one GPU; leave the first out"
    num_workers = cluster.num_gpus or cluster.num_workers
    if cluster.num_shards and cluster.parallel == "ddp":
        yield "cluster.num_shards, cluster.parallel: shards need cluster.parallel=fsdp"
    elif cluster.num_shards and num_workers % cluster.num_shards:
        yield f"cluster.num_shards: it must divide the {num_workers} workers of a training job"
    if sweep.thresholds and sweep.budgets:
        yield "sweep.thresholds, sweep.budgets: they exclude each other; leave one out"


def _of_trainings(settings: Settings) -> Iterator[str]:
    if settings.source_training is not None:
        yield from _of_source_training(settings, settings.source_training)
    recipes = ["training", "distillation.training"]
    recipes += ["source_training"] if settings.source_training else []
    for name in recipes:
        training = attrgetter(name)(settings)
        if training.iterate_from_fraction + training.iterate_ramp_fraction > 1.0 + 1e-9:
            names = f"{name}.iterate_from_fraction, {name}.iterate_ramp_fraction"
            yield f"{names}: the ramp must end within the training, so both sum to 1 at most"
        if training.optimizer == "muon" and settings.cluster.parallel == "fsdp":
            yield (
                f"{name}.optimizer, cluster.parallel: Muon needs whole matrices, and workers "
                "of fsdp hold rows of them; take ddp, or adamw"
            )
    distillation = settings.distillation
    if distillation.training.source is not None:
        yield "distillation.training.source: a student starts from its teacher; leave it out"
    if distillation.training.source_kl_weight:
        yield "distillation.training.source_kl_weight: a student has distillation.kl_weight"
    if distillation.training.trained_layers != "all":
        yield "distillation.training.trained_layers: all weights of a student are trained"
    first = distillation.teacher_from_step
    until = distillation.teacher_until_step
    if until is not None and until <= first:
        yield (
            "distillation.teacher_from_step, distillation.teacher_until_step: the teacher takes "
            "part in no step; set the second above the first"
        )
    if distillation.control != "distill":  # The rest is about a teacher.
        return
    if first >= distillation.training.num_steps:
        yield (
            "distillation.teacher_from_step, distillation.training.num_steps: the teacher begins "
            "after the last step of the training; set the first below the second, or "
            "distillation.control=cross_entropy"
        )
    for name in ("kl_weight", "temperature"):
        elastic = distillation.training.elastic
        usual = ElasticSettings()
        if elastic and getattr(elastic, name) != getattr(usual, name):
            yield (
                f"distillation.training.elastic.{name}: in a distillation, members learn from the "
                f"teacher and not from the full schedule; set distillation.{name}"
            )


def _of_source_training(settings: Settings, recipe: TrainingSettings) -> Iterator[str]:
    if settings.training.source is not None:
        yield (
            "training.source: the source exists, or is trained first as the section "
            "source_training says; leave one out"
        )
    for name in (*FIELDS_OF_A_SOURCE, "elastic"):
        if getattr(recipe, name) != TrainingSettings.model_fields[name].default:
            yield (
                f"source_training.{name}: the source is a plain model from random weights; leave "
                "it out"
            )


def _of_sweep(settings: Settings) -> Iterator[str]:
    sweep = settings.sweep
    kind = sweep.kind
    if settings.has_source:
        name = "training.source" if settings.training.source is not None else "source_training"
        if kind == "iterations":
            yield (
                "sweep.kind: a sweep of kind iterations trains its models from random weights; "
                f"leave {name} out, or set the kind to threshold or search"
            )
        if sweep.teachers:
            yield f"sweep.teachers: {name} gives one teacher its weights; leave one of both out"
    if settings.evaluation.retention and kind not in ("threshold", "search"):
        yield (
            f"evaluation.retention, sweep.kind: a sweep of kind {kind} has no teacher whose source "
            "models could be compared with; leave the first out"
        )
    for names, kinds in _READ_BY_KINDS.items():
        if kind in kinds:
            continue
        advice = f"only a sweep of kind {' or '.join(kinds)} reads the first; leave it out"
        for name in names.split(", "):
            if getattr(sweep, name):
                yield f"sweep.{name}, sweep.kind: {advice}"
    num_gpus = settings.cluster.num_gpus
    gpus_per_trial = sweep.gpus_per_trial
    workers_per_trial = sweep.workers_per_trial
    if num_gpus and gpus_per_trial == 0:
        yield (
            "sweep.gpus_per_trial, cluster.num_gpus: the first trains trials on CPUs, and the "
            "second names GPUs; leave the first out, or set the second to 0 to train everything "
            "on CPUs"
        )
    if num_gpus and (gpus_per_trial or workers_per_trial) > num_gpus:
        name = "workers_per_trial" if gpus_per_trial is None else "gpus_per_trial"
        yield f"sweep.{name}, cluster.num_gpus: a trial asks for more GPUs than the run has"
    if gpus_per_trial and workers_per_trial not in (1, gpus_per_trial):
        yield (
            "sweep.workers_per_trial, sweep.gpus_per_trial: each worker has one GPU; leave the "
            "first out"
        )
    if sweep.asha and sweep.seeds:
        yield "sweep.asha, sweep.seeds: it compares learning rates under one seed; leave seeds out"


def _of_elastic_sweep(settings: Settings) -> Iterator[str]:
    sweep = settings.sweep
    elastic = settings.distillation.training.elastic
    if not sweep.elastic:
        if elastic and sweep.kind != "iterations":
            names = "sweep.elastic, distillation.training.elastic"
            yield f"{names}: a student has one schedule; leave the second out, or set the first"
        return
    if settings.distillation.control != "distill":
        yield "sweep.elastic, distillation.control: a control is about students of one schedule"
    if elastic and (elastic.schedules or not elastic.weight):
        setting = "schedules" if elastic.schedules else "weight"
        names = f"sweep.elastic, distillation.training.elastic.{setting}"
        yield f"{names}: influence chooses the schedules, which have a weight; leave the second out"
