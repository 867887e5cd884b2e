"""Settings of sweeps: which trials run, and how free schedules are searched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import ceil
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from iiet.methods import METHODS
from orchestrator.settings.model import BASELINE_METHOD, DEFAULT_METHOD, MAX_LAYERS
from orchestrator.settings.section import Section
from orchestrator.settings.training import MAX_STEPS
from orchestrator.workspace.errors import quoted, shortened

T = TypeVar("T")
_MODEL_WITH_COUNT = re.compile(r"((?P<method>.+), )?r = [0-9.,*]+")
"""How users write a model with its corrections: `r = 3`, `other, r = 3..0`."""
_WITH_LAYERS = re.compile(r"(?P<model>.+), [1-9][0-9,]* layers?")
"""A model with its number of layers: `vanilla, 8 layers`, `r = 3, 1 layer`."""

MIN_GPU_SHARE = 0.01
"""Smallest share of a GPU that a trial may ask for."""
MAX_SEED = 2**32 - 1
"""Largest seed that every library's generator takes."""


def _refuse_duplicate_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed is given twice")
    return seeds


Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, le=MAX_SEED)], ...], AfterValidator(_refuse_duplicate_seeds)
]


class SweepSettings(Section):
    """Trials of a sweep."""

    kind: Literal["threshold", "iterations", "search"] = "threshold"
    """`threshold`: students of one teacher; `iterations`: models trained from scratch; `search`:
    the students of a threshold sweep, then students with free schedules."""
    num_schedules: int = Field(default=7, ge=2)
    """Schedules of a threshold sweep, evenly spaced in cost, from all corrections to none."""
    thresholds: tuple[float, ...] = ()
    """Thresholds to use instead; those that give the same schedule are one trial."""
    budgets: tuple[float, ...] = ()
    """Budgets to use instead: for each, the schedule with the most influence that costs no more."""
    budget_unit: Literal["evaluations", "flops", "kv"] = "evaluations"
    """Unit of `budgets`, and of the cost that `num_schedules` are spaced in: evaluations, FLOPs or
    KV bytes per token."""
    selection: Literal["threshold", "knapsack"] = "threshold"
    """Schedules to choose from: the threshold's nested family, or the knapsack's optimum at each
    cost."""
    elastic: bool = False
    """Train one set of weights from the teacher for all schedules of a threshold sweep, instead of
    a student for each. `distillation.training.elastic` says how."""
    elastic_steps: int | None = Field(default=None, gt=0, le=MAX_STEPS)
    """Optimizer steps of the elastic training (default: those of `distillation.training`)."""
    compare: bool = False
    """With `elastic`, also train the student of each schedule, and compare."""
    distilled_baselines: tuple[Literal["vanilla", "fewer_layers"], ...] = ()
    """Baselines that are distilled from the teacher, at the FLOPs of students: `vanilla`, of as
    many layers as a student has evaluations, from random weights; `fewer_layers`, the teacher
    without its least important layers."""
    num_distilled_baselines: int = Field(default=3, ge=1)
    """Largest number of distilled baselines of each kind, spread over the students' costs."""
    distilled_vanilla_steps: int | None = Field(default=None, gt=0, le=MAX_STEPS)
    """Optimizer steps of the distilled vanilla models. They train at their method's own rate in
    `learning_rates`, and otherwise as students do (default: the teacher's tokens and the students'
    together, which the students' weights have seen, too)."""
    iterations: tuple[int | str, ...] = Field(default=(0, 1, 2, 3), min_length=1)
    """Corrections of the IIETs that `sweep-iterations` pretrains: a number for all layers, a ramp
    over the depth (`3..0`), or one number per layer (`2,2,1,1,1,1`)."""
    methods: tuple[str, ...] = Field(default=(BASELINE_METHOD, DEFAULT_METHOD), min_length=1)
    """Methods that `sweep-iterations` pretrains."""
    learning_rates: dict[str, float | tuple[float, ...]] = Field(default={BASELINE_METHOD: 4e-3})
    """Peak learning rates that differ from `training.learning_rate`, by method, by the corrections
    of an IIET (`r = 3`), or with a number of layers (`vanilla, 8 layers`). Of several rates, each
    is a trial."""
    num_layers: dict[str, int | tuple[int, ...]] = Field(default={})
    """Numbers of layers that differ from `model.num_layers`, by method, or by the corrections of an
    IIET (`r = 3`). Of several numbers, each is a trial of `sweep-iterations`. In other sweeps they
    are those of the baselines (vanilla and the teacher without corrections)."""
    measure_drafts: bool = True
    """At the end of a sweep over text, measure each schedule as a draft of the full model:
    acceptance, and the time per token of its exact output."""
    seeds: Seeds = ()
    """Train every model with each of these seeds; tables show mean and error (default: the
    recipe's seed alone)."""
    asha: bool = False
    """Asynchronous successive halving in `sweep-iterations`: of one model's learning rates, train
    only the better ones to the end, by validation loss."""
    asha_first_rung: float = Field(default=0.25, gt=0, lt=1)
    """Share of the steps before the first comparison; the next ones follow each time the steps
    have grown by `asha_reduction_factor`."""
    asha_reduction_factor: int = Field(default=2, ge=2)
    """One in this many learning rates continues after a comparison."""
    trials_at_once: int | None = Field(default=None, gt=0)
    """Most trials at the same time (default: as many as CPUs or `cluster.num_gpus` allow)."""
    workers_per_trial: int = Field(default=1, gt=0)
    """Data-parallel workers of each trial; with GPUs, one each. Not part of a trial's key."""
    gpus_per_trial: float | None = Field(default=None, ge=0)
    """GPUs of each trial, or a share of one, such as 0.25; 0 trains on CPUs (default: the fewest of
    `cluster.num_gpus` on which every trial fits)."""
    max_failures_per_trial: int = Field(default=2, ge=0)
    """Retries of a failed trial."""

    @property
    def num_workers_per_trial(self) -> int:
        """Workers of each trial, one for each of its GPUs."""
        return ceil(self.gpus_per_trial or 0) or self.workers_per_trial

    @field_validator("gpus_per_trial")
    @classmethod
    def _refuse_parts_of_several_gpus(cls, gpus: float | None) -> float | None:
        if gpus and (gpus < MIN_GPU_SHARE or (gpus > 1 and gpus % 1)):
            raise ValueError(
                f"{gpus:g} GPUs are neither whole GPUs nor a share of one; give a whole number, or "
                f"a share from {MIN_GPU_SHARE:g} to 1"
            )
        return gpus

    @field_validator("budgets")
    @classmethod
    def _refuse_budgets_with_thresholds(
        cls, budgets: tuple[float, ...], info: ValidationInfo
    ) -> tuple[float, ...]:
        if budgets and info.data.get("thresholds"):
            raise ValueError("sweep.thresholds and sweep.budgets exclude each other; leave one out")
        return budgets

    @field_validator("methods")
    @classmethod
    def _refuse_unknown_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [method for method in methods if method not in METHODS]
        if unknown:
            raise ValueError(
                f"no such method: {shortened(', '.join(unknown))}; known: {', '.join(METHODS)}"
            )
        for method in methods:
            METHODS[method]  # A broken package is found here.
        return methods

    @field_validator("learning_rates")
    @classmethod
    def _refuse_rates_of_unknown_models(
        cls, rates: dict[str, float | tuple[float, ...]]
    ) -> dict[str, float | tuple[float, ...]]:
        for name, of_model in rates.items():
            several = of_model if isinstance(of_model, tuple) else (of_model,)
            if not several or min(several) <= 0:
                raise ValueError(f"a learning rate of {shortened(name)} is not above 0")
            of_depth = _WITH_LAYERS.fullmatch(name)
            _refuse_unknown_model(name, of_depth["model"] if of_depth else name)
        return rates

    @field_validator("num_layers")
    @classmethod
    def _refuse_layers_of_unknown_models(
        cls, numbers: dict[str, int | tuple[int, ...]]
    ) -> dict[str, int | tuple[int, ...]]:
        for name, of_model in numbers.items():
            _refuse_unknown_model(name, name)
            several = of_model if isinstance(of_model, tuple) else (of_model,)
            if not several or min(several) < 1 or max(several) > MAX_LAYERS:
                raise ValueError(
                    f"the number of layers of {shortened(name)} is not from 1 to {MAX_LAYERS}"
                )
            if len(set(several)) < len(several):
                raise ValueError(f"a number of layers of {shortened(name)} is given twice")
        return numbers


def _refuse_unknown_model(name: str, model: str) -> None:
    of_count = _MODEL_WITH_COUNT.fullmatch(model)
    method = (of_count["method"] or DEFAULT_METHOD) if of_count else model
    if method not in METHODS:
        raise ValueError(
            f"{quoted(name)} is not a model; name a method ({', '.join(METHODS)}), or the "
            "corrections of an IIET, such as r = 3"
        )


def has_layers(name: str) -> bool:
    """Whether a model's name contains a number of layers: `vanilla, 8 layers`."""
    return bool(_WITH_LAYERS.fullmatch(name))


def values_of_model(
    setting: Mapping[str, T | tuple[T, ...]], names: Iterable[str], *, default: T
) -> tuple[T, ...]:
    """Return what a setting by model holds for one: under the first of its names that is a key.

    Args:
        names: The model's label first, its method last.
    """
    found = next((setting[name] for name in names if name in setting), default)
    return found if isinstance(found, tuple) else (found,)


class SearchSettings(Section):
    """Search for schedules outside the threshold's family."""

    num_trials: int = Field(default=24, ge=0)
    """Most schedules to try after those of the threshold sweep."""
    objective: Literal["accuracy", "bits_per_byte", "validation_loss"] = "accuracy"
    """Quality to optimize together with the number of evaluations."""
    sampler: Literal["nsga2", "tpe", "gp"] = "nsga2"
    """Optuna's sampler: the genetic one, the tree-structured Parzen estimator, or Gaussian
    processes, which take seconds per suggestion."""
    population_size: int = Field(default=8, ge=2)
    """Schedules of one generation of `nsga2`."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of the sampler."""
