"""The whole tree of settings, and the rules between them.

The rules of the tree hold for every command, and pydantic checks them once all fields are right.
Those of a sweep hold for sweeps only: other commands read the same file without its sections
`sweep` and `search`. Rules that need a model, the data or the workspace belong to the plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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

_KINDS_THAT_READ = {
    "asha": ("iterations",),
    "teachers": ("threshold",),
    "elastic": ("threshold",),
    "seeds": ("threshold", "iterations"),
    "baselines": ("threshold", "search"),
    "baseline_runs": ("threshold", "search", "iterations"),
}
"""Setting of a sweep -> the kinds of sweeps that read it."""


class Settings(Section):
    """The whole tree."""

    data: DataSettings = DataSettings()
    """Corpus and tokenizer."""
    model: ModelSettings = ModelSettings()
    """Shape of the model."""
    source_training: TrainingSettings | None = None
    """Recipe of a plain model of the teacher's sizes, which a sweep trains first: the source of its
    teacher, in place of `training.source` (default: the teacher starts from random weights)."""
    training: TrainingSettings = TrainingSettings()
    """Recipe of a pretraining."""
    distillation: DistillationSettings = DistillationSettings()
    """Loss and recipe of a distillation."""
    influence: InfluenceSettings = InfluenceSettings()
    """Measurement of influence."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Tasks, their items and prompts."""
    sweep: SweepSettings = SweepSettings()
    """Trials of a sweep."""
    search: SearchSettings = SearchSettings()
    """Search for schedules beside those that influence chooses."""
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


@dataclass(frozen=True)
class BrokenRule:
    """Settings that do not go together."""

    names: tuple[str, ...]
    """Such as `training.num_steps`; a message shows them with their values."""
    advice: str
    """What is wrong with them, and what to do."""

    def message(self, settings: Settings) -> str:
        """Return the names with the values that break the rule, and the advice."""
        parts = []
        for name in self.names:
            value = attrgetter(name)(settings)
            if isinstance(value, Section):
                value = value.model_dump()
            parts.append(f"{name}={quoted(value)}")
        return f"{', '.join(parts)}: {self.advice}"


def broken_rules(settings: Settings, *, of_sweep: bool = False) -> list[str]:
    """Return the messages of all broken rules.

    Args:
        of_sweep: Apply the rules of a sweep, too, which other commands do not run.
    """
    rules = [*_of_data_and_devices(settings), *_of_trainings(settings)]
    if of_sweep:
        rules += [*_of_sweep(settings), *_of_elastic_sweep(settings)]
    return [rule.message(settings) for rule in rules]


def _of_data_and_devices(settings: Settings) -> Iterator[BrokenRule]:
    data = settings.data
    cluster = settings.cluster
    sweep = settings.sweep
    is_mixture = data.source == "mixture"
    sources = data.shares if is_mixture else {data.source}
    if is_mixture != bool(data.shares):
        yield BrokenRule(
            ("data.source", "data.shares"),
            "a mixture, and only a mixture, needs shares, such as "
            "--set 'data.shares={python: 0.8, phop_6: 0.2}'",
        )
    if data.files and "files" not in sources:
        yield BrokenRule(
            ("data.source", "data.files"),
            "only data.source=files, or a mixture with a share of files, reads data.files",
        )
    if data.depth.tasks and data.source != "depth":
        yield BrokenRule(
            ("data.source", "data.depth.tasks"),
            "only data.source=depth reads the tasks; name those of a mixture in data.shares",
        )
    if (cluster.min_gpus or 0) > cluster.num_gpus:
        yield BrokenRule(
            ("cluster.min_gpus", "cluster.num_gpus"), "min_gpus must not be above num_gpus"
        )
    if cluster.min_gpus and cluster.parallel == "fsdp":
        yield BrokenRule(
            ("cluster.min_gpus", "cluster.parallel"),
            "fsdp needs a fixed number of workers; leave min_gpus out, or take ddp",
        )
    if cluster.num_gpus and cluster.num_workers not in (1, cluster.num_gpus):
        yield BrokenRule(
            ("cluster.num_workers", "cluster.num_gpus"),
            "each worker has one GPU; leave num_workers out",
        )
    num_workers = cluster.num_gpus or cluster.num_workers
    if cluster.num_shards and cluster.parallel == "ddp":
        yield BrokenRule(
            ("cluster.num_shards", "cluster.parallel"),
            "only fsdp has shards; set cluster.parallel=fsdp, or leave num_shards out",
        )
    elif cluster.num_shards and num_workers % cluster.num_shards:
        yield BrokenRule(
            ("cluster.num_shards",), f"it must divide the {num_workers} workers of a training job"
        )
    if sweep.thresholds and sweep.budgets:
        yield BrokenRule(
            ("sweep.thresholds", "sweep.budgets"),
            "each of them chooses the schedules; leave one out",
        )


def _of_trainings(settings: Settings) -> Iterator[BrokenRule]:
    if settings.source_training is not None:
        yield from _of_source_training(settings, settings.source_training)
    sections = ["training", "distillation.training"]
    sections += ["source_training"] if settings.source_training else []
    for section in sections:
        recipe = attrgetter(section)(settings)
        if recipe.iterate_from_fraction + recipe.iterate_ramp_fraction > 1.0 + 1e-9:
            yield BrokenRule(
                (f"{section}.iterate_from_fraction", f"{section}.iterate_ramp_fraction"),
                "the ramp must end within the training; lower one, so that their sum is at most 1",
            )
        if recipe.optimizer == "muon" and settings.cluster.parallel == "fsdp":
            yield BrokenRule(
                (f"{section}.optimizer", "cluster.parallel"),
                "Muon needs whole matrices, and a worker of fsdp holds rows of them; take ddp, or "
                "adamw",
            )
    yield from _of_distillation(settings.distillation)


def _of_source_training(settings: Settings, recipe: TrainingSettings) -> Iterator[BrokenRule]:
    if settings.training.source is not None:
        yield BrokenRule(
            ("training.source",),
            "training.source names a source that exists, and section source_training trains one; "
            "leave one of them out",
        )
    for name in (*FIELDS_OF_A_SOURCE, "elastic"):
        if getattr(recipe, name) != TrainingSettings.model_fields[name].default:
            yield BrokenRule(
                (f"source_training.{name}",),
                "the source is a plain model from random weights; leave it out",
            )


def _of_distillation(distillation: DistillationSettings) -> Iterator[BrokenRule]:
    recipe = distillation.training
    if recipe.source is not None:
        yield BrokenRule(
            ("distillation.training.source",), "a student starts from its teacher; leave it out"
        )
    if recipe.source_kl_weight:
        yield BrokenRule(
            ("distillation.training.source_kl_weight",),
            "a student has distillation.kl_weight instead; leave it out",
        )
    if recipe.trained_layers != "all":
        yield BrokenRule(
            ("distillation.training.trained_layers",),
            "a student trains all of its weights; leave it out",
        )
    first = distillation.teacher_from_step
    until = distillation.teacher_until_step
    if until is not None and until <= first:
        yield BrokenRule(
            ("distillation.teacher_from_step", "distillation.teacher_until_step"),
            "the teacher takes part in no step; set teacher_until_step above teacher_from_step",
        )
    if distillation.control != "distill":  # The rest is about a teacher.
        return
    if first >= recipe.num_steps:
        yield BrokenRule(
            ("distillation.teacher_from_step", "distillation.training.num_steps"),
            "the teacher begins after the last step; set teacher_from_step below num_steps, or "
            "distillation.control=cross_entropy to train without a teacher",
        )
    for name in ("kl_weight", "temperature"):
        usual_value = ElasticSettings.model_fields[name].default
        if recipe.elastic and getattr(recipe.elastic, name) != usual_value:
            yield BrokenRule(
                (f"distillation.training.elastic.{name}",),
                "in a distillation, the cheaper schedules learn from the teacher, not from the "
                f"full schedule; set distillation.{name} instead",
            )


def _of_sweep(settings: Settings) -> Iterator[BrokenRule]:
    sweep = settings.sweep
    kind = sweep.kind
    if settings.has_source:
        source = "training.source" if settings.training.source is not None else "source_training"
        if kind == "iterations":
            yield BrokenRule(
                ("sweep.kind",),
                "a sweep of kind iterations trains its models from random weights; leave "
                f"{source} out, or set sweep.kind to threshold or search",
            )
        if sweep.teachers:
            yield BrokenRule(
                ("sweep.teachers",),
                f"{source} is for one teacher alone; leave one of both out",
            )
    if settings.evaluation.retention and kind not in ("threshold", "search"):
        yield BrokenRule(
            ("evaluation.retention", "sweep.kind"),
            f"a sweep of kind {kind} has no teacher to compare with; leave retention out",
        )
    for name, kinds in _KINDS_THAT_READ.items():
        if kind not in kinds and getattr(sweep, name):
            yield BrokenRule(
                (f"sweep.{name}", "sweep.kind"),
                f"only a sweep of kind {' or '.join(kinds)} reads {name}; leave it out",
            )
    num_gpus = settings.cluster.num_gpus
    gpus_per_trial = sweep.gpus_per_trial
    workers_per_trial = sweep.workers_per_trial
    if num_gpus and gpus_per_trial == 0:
        yield BrokenRule(
            ("sweep.gpus_per_trial", "cluster.num_gpus"),
            "gpus_per_trial=0 trains trials on CPUs although there are GPUs; leave it out, or set "
            "cluster.num_gpus=0 to train everything on CPUs",
        )
    if num_gpus and (gpus_per_trial or workers_per_trial) > num_gpus:
        name = "workers_per_trial" if gpus_per_trial is None else "gpus_per_trial"
        yield BrokenRule(
            (f"sweep.{name}", "cluster.num_gpus"),
            f"a trial asks for more GPUs than there are; lower {name}, or raise num_gpus",
        )
    if gpus_per_trial and workers_per_trial not in (1, gpus_per_trial):
        yield BrokenRule(
            ("sweep.workers_per_trial", "sweep.gpus_per_trial"),
            "each worker has one GPU; leave workers_per_trial out",
        )
    if sweep.asha and sweep.seeds:
        yield BrokenRule(
            ("sweep.asha", "sweep.seeds"),
            "asha compares learning rates under one seed; leave seeds out",
        )


def _of_elastic_sweep(settings: Settings) -> Iterator[BrokenRule]:
    sweep = settings.sweep
    elastic = settings.distillation.training.elastic
    if not sweep.elastic:
        if elastic and sweep.kind != "iterations":
            yield BrokenRule(
                ("sweep.elastic", "distillation.training.elastic"),
                "without sweep.elastic, a student has one schedule; set it, or leave the other out",
            )
        return
    if settings.distillation.control != "distill":
        yield BrokenRule(
            ("sweep.elastic", "distillation.control"),
            "a control needs students of one schedule each; leave one of both out",
        )
    if elastic and (elastic.schedules or not elastic.weight):
        name = "schedules" if elastic.schedules else "weight"
        yield BrokenRule(
            ("sweep.elastic", f"distillation.training.elastic.{name}"),
            f"the sweep chooses the schedules by influence, and trains them; leave {name} out",
        )
