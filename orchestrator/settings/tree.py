"""The sections that say what is measured, swept and used, and the whole tree."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from iiet.methods import METHODS
from orchestrator.settings.models import (
    BASELINE_METHOD,
    DEFAULT_METHOD,
    DataSettings,
    ModelSettings,
    method_of_label,
)
from orchestrator.settings.recipes import DistillationSettings, TrainingSettings
from orchestrator.settings.section import MAX_COUNT, Section
from orchestrator.workspace.credentials import has_secret
from orchestrator.workspace.errors import quoted, shortened

MAX_SEED = 2**32 - 1
"""What every library's generator takes."""


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise PydanticCustomError("seed_twice", "a seed stands there twice")
    return seeds


Seeds = Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_SEED)], ...], AfterValidator(_each_once)]


class InfluenceSettings(Section):
    """How the influence of each correction is measured."""

    metric: Literal["cosine", "relative", "loss"] = "cosine"
    """`cosine`, `relative` (both from consecutive evaluations) or `loss` (rise of the validation
    loss)."""
    num_tokens: int = Field(default=32768, gt=0)
    """Validation tokens of the calibration set."""


class EvaluationSettings(Section):
    """What accuracy means."""

    suite: str = "heldout"
    """Names with commas between them: `heldout` (tasks made from the held-out documents), `paper`
    (the seven tasks of the papers), and any task of lm-eval or of `include_path`."""
    num_items: int = Field(default=700, gt=0)
    """Items that each held-out task is made with; 700 keep one standard error under 1.9 points."""
    limit: int | None = Field(default=None, gt=0, le=MAX_COUNT)
    """Items of each task that are scored, from its first on; all when unset."""
    num_fewshot: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    """Solved examples before each item, where a task does not fix it at 0; as it says if unset."""
    batch_size: int = Field(default=32, gt=0, le=MAX_COUNT)
    """Sequences in one forward pass of the evaluation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Weights and arithmetic of the evaluated model. `bf16` is faster on GPUs and moves scores a
    little, so its results are stored apart. Models that transformers runs keep their own dtype."""
    include_path: str | None = Field(default=None, min_length=1)
    """Folder with further lm-eval task files."""


class SweepSettings(Section):
    """Which trials a sweep runs."""

    kind: Literal["threshold", "iterations", "search"] = "threshold"
    """`threshold`: students of one teacher; `iterations`: models trained from scratch; `search`:
    the threshold's students and then others under free schedules."""
    num_schedules: int = Field(default=7, ge=2)
    """Schedules of a threshold sweep, spread evenly over cost, full and none included."""
    thresholds: tuple[float, ...] = ()
    """Thresholds to use instead; those that give the same schedule are one trial."""
    budgets: tuple[float, ...] = ()
    """Most that a schedule may cost, to use instead: for each, the member of the family that does
    most for it."""
    budget_unit: Literal["evaluations", "flops", "kv"] = "evaluations"
    """What budgets are counted in, and what `num_schedules` are spread over: evaluations, FLOPs or
    KV bytes of a token."""
    selection: Literal["threshold", "knapsack"] = "threshold"
    """Whose schedules: the threshold's nested family, or the knapsack's best one at each of its
    costs."""
    iterations: tuple[int | str, ...] = Field(default=(0, 1, 2, 3), min_length=1)
    """Corrections that `sweep-iterations` pretrains an IIET with: a number for all layers, a ramp
    over the depth (`3..0`), or one number a layer (`2,2,1,1,1,1`)."""
    methods: tuple[str, ...] = Field(default=(BASELINE_METHOD, DEFAULT_METHOD), min_length=1)
    """Methods that `sweep-iterations` pretrains."""
    learning_rates: dict[str, float | tuple[float, ...]] = Field(default={BASELINE_METHOD: 4e-3})
    """Peak learning rate of a method where it differs from `training.learning_rate`, by name; of an
    IIET also by its corrections (`r = 3`). Of several, each is a trial."""
    seeds: Seeds = ()
    """Seeds that every model is trained with, shown with their mean and its error; the recipe's
    alone when empty."""
    asha: bool = False
    """Of one model's learning rates in `sweep-iterations`, train only the better
    ones to their end, by validation loss: asynchronous successive halving."""
    asha_first_rung: float = Field(default=0.25, gt=0, lt=1)
    """Share of the steps at which they are first compared; then at each `asha_reduction_factor`
    times as many."""
    asha_reduction_factor: int = Field(default=2, ge=2)
    """Of so many rates, one goes on."""
    trials_at_once: int | None = Field(default=None, gt=0)
    """Most trials that run side by side; as many as CPUs (or `cluster.num_gpus`) have room for when
    unset."""
    workers_per_trial: int = Field(default=1, gt=0)
    """Data-parallel workers of each trial; with GPUs, one each. No part of a trial's key."""
    gpus_per_trial: int | None = Field(default=None, ge=0)
    """GPUs of each trial; 0 trains on CPUs. When unset, the fewest of `cluster.num_gpus` on which
    every trial fits."""
    max_failures_per_trial: int = Field(default=2, ge=0)
    """How often a failed trial is tried again."""

    @field_validator("budgets")
    @classmethod
    def _one_way_to_choose(
        cls, budgets: tuple[float, ...], info: ValidationInfo
    ) -> tuple[float, ...]:
        if budgets and info.data.get("thresholds"):
            raise PydanticCustomError(
                "two_ways", "sweep.thresholds and sweep.budgets exclude each other; leave one out"
            )
        return budgets

    @field_validator("methods")
    @classmethod
    def _methods_are_known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [method for method in methods if method not in METHODS]
        if unknown:
            raise PydanticCustomError(
                "no_such_method",
                "no such method: {unknown}; known: {known}",
                {"unknown": shortened(", ".join(unknown)), "known": ", ".join(METHODS)},
            )
        return methods

    @field_validator("learning_rates")
    @classmethod
    def _rates_are_of_models(
        cls, rates: dict[str, float | tuple[float, ...]]
    ) -> dict[str, float | tuple[float, ...]]:
        for name, own in rates.items():
            several = own if isinstance(own, tuple) else (own,)
            if not several or min(several) <= 0:
                raise PydanticCustomError(
                    "no_rate", "a learning rate of {name} is not above 0", {"name": shortened(name)}
                )
            is_label = re.fullmatch(r"(.+, )?r = [0-9.,*]+", name) is not None
            if name not in METHODS and not (is_label and method_of_label(name) in METHODS):
                raise PydanticCustomError(
                    "no_such_model",
                    "{name} is no model; name a method ({methods}), or an IIET by its corrections, "
                    "as in r = 3",
                    {"name": quoted(name), "methods": ", ".join(METHODS)},
                )
        return rates


class SearchSettings(Section):
    """How free schedules are searched, beside the threshold's."""

    num_trials: int = Field(default=24, ge=0)
    """Most schedules that are tried beside those of the threshold sweep, which come first."""
    objective: Literal["accuracy", "bits_per_byte", "validation_loss"] = "accuracy"
    """The quality that is weighed against evaluations."""
    sampler: Literal["nsga2", "tpe"] = "nsga2"
    """Optuna's sampler: the genetic one, or the tree-structured Parzen estimator."""
    trials_per_round: int = Field(default=8, ge=2)
    """Schedules that the sampler suggests before it hears of their results; a generation."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of the suggestions."""


def storage_problem(uri: str) -> str | None:
    """Return why an address of storage is refused: settings are stored with every run, in its
    folder and in MLflow. None if it holds no secret."""
    if not has_secret(uri):
        return None
    return (
        "the address holds a password or a key, and settings are stored with every run; leave it "
        "out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment (for GCS "
        "GOOGLE_APPLICATION_CREDENTIALS)"
    )


class ClusterSettings(Section):
    """Where the work runs."""

    num_workers: int = Field(default=1, gt=0)
    """Data-parallel workers of a training job; with GPUs, one each."""
    num_gpus: int = Field(default=0, ge=0)
    """GPUs of a training job; 0 trains on CPUs."""
    storage: str | None = None
    """URI of a second place for checkpoints of pretraining, such as `s3://bucket/runs`: copied
    there beside training, and fetched from there where the workspace has none."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several workers share a model: each has all of it (ddp), or a part of its weights,
    gradients and moments (fsdp), which needs less memory and more traffic."""
    max_failures: int = Field(default=2, ge=0)
    """How often a training job whose worker died is started again from its newest checkpoint."""

    @field_validator("storage")
    @classmethod
    def _storage_holds_no_secret(cls, storage: str | None) -> str | None:
        if problem := storage_problem(storage or ""):
            raise PydanticCustomError("secret", problem)
        return storage


class Settings(Section):
    """The whole tree."""

    data: DataSettings = DataSettings()
    """Corpus and tokenizer."""
    model: ModelSettings = ModelSettings()
    """Shape of the model."""
    training: TrainingSettings = TrainingSettings()
    """Recipe of the pretraining."""
    distillation: DistillationSettings = DistillationSettings()
    """Recipe of the distillation."""
    influence: InfluenceSettings = InfluenceSettings()
    """Measure of influence."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Tasks and their size."""
    sweep: SweepSettings = SweepSettings()
    """Trials of a sweep."""
    search: SearchSettings = SearchSettings()
    """Free schedules beside the threshold's."""
    cluster: ClusterSettings = ClusterSettings()
    """Workers and GPUs."""

    @property
    def trials_use_gpus(self) -> bool:
        """Whether the trials of a sweep run on GPUs: as asked for, or as the run itself does."""
        own = self.sweep.gpus_per_trial
        return (self.cluster.num_gpus if own is None else own) > 0
