"""Settings of sweeps: which trials run, and how free schedules are searched."""

from __future__ import annotations

import re
from functools import partial
from math import ceil
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    field_validator,
)

from orchestrator.settings.section import Section
from orchestrator.settings.training import (
    BASELINE_METHOD,
    DEFAULT_METHOD,
    MAX_LAYERS,
    MAX_STEPS,
    METHOD,
)
from orchestrator.workspace.errors import quoted

BudgetUnit = Literal["nfe", "evaluations", "flops", "kv", "parameters"]
"""The costs that follow from a model's shape and schedule."""
T = TypeVar("T")
_MODEL_WITH_COUNT = re.compile(
    r"((?P<method>.+), )?(r = (?P<count>[0-9.,*]+)|level (?P<level>[0-9]))"
)
"""How users write a model with its corrections: `r = 3`, `other, r = 3..0`, `pcformer, level 0`."""
_WITH_LAYERS = re.compile(r"(?P<model>.+), [1-9][0-9,]* layers?")
"""A model with its number of layers: `vanilla, 8 layers`, `r = 3, 1 layer`."""
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")
"""A share of the teacher's cost: `80%`."""

MIN_GPU_SHARE = 0.01
"""Smallest share of a GPU that a trial may ask for."""
MAX_SEED = 2**32 - 1
"""Largest seed that every library's generator takes."""


def split_count(name: str) -> tuple[str, str | None]:
    """Return the method of a model's name, and its corrections if it has any: `r = 3` gives both.

    Raises:
        ValueError: If it names no method.
    """
    match = _MODEL_WITH_COUNT.fullmatch(name)
    if not match:
        return METHOD.checked(name), None
    return METHOD.checked(match["method"] or DEFAULT_METHOD), match["count"] or match["level"]


def has_layers(name: str) -> bool:
    """Return whether a model's name contains a number of layers: `vanilla, 8 layers`."""
    return bool(_WITH_LAYERS.fullmatch(name))


def _refuse_unknown_model(name: str, *, may_have_layers: bool = False) -> str:
    of_depth = _WITH_LAYERS.fullmatch(name) if may_have_layers else None
    model = of_depth["model"] if of_depth else name
    try:
        split_count(model)
    except ValueError:
        raise ValueError(
            f"{quoted(name)} is not a model; name a method ({', '.join(METHOD.table)}), or the "
            "corrections of an IIET, such as r = 3"
        ) from None
    return name


def _refuse_duplicates(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a value is given twice")
    return values


def _refuse_no_share(text: str) -> str:
    share = _SHARE.fullmatch(text)
    if not share or not 0 < float(share[1]) <= 100:
        raise ValueError(f"{quoted(text)} is no share of the teacher's cost; write 80%")
    return text


def _refuse_other_words(number_or_word: object) -> object:
    if isinstance(number_or_word, str) and number_or_word not in ("all", "none"):
        raise ValueError("write a number of layers, all or none")
    return number_or_word


def _refuse_milliseconds(unit: object) -> object:
    if unit == "ms":
        raise ValueError(
            "milliseconds are measured when the students exist and differ from run to run, so the "
            "same command would train other students again; take nfe or flops, and "
            "`iiet-orch pick --budget 5 --cost ms` takes the best student within 5 ms"
        )
    return unit


Budget = StrictFloat | Annotated[str, AfterValidator(_refuse_no_share)]
ModelName = Annotated[str, AfterValidator(_refuse_unknown_model)]
DeepModelName = Annotated[str, AfterValidator(partial(_refuse_unknown_model, may_have_layers=True))]
_Rate = Annotated[StrictFloat, Field(gt=0)]
_Layers = Annotated[StrictInt, Field(ge=1, le=MAX_LAYERS)]
_Seed = Annotated[StrictInt, Field(ge=0, le=MAX_SEED)]
_Several = Annotated[tuple[T, ...], Field(min_length=1)]
Selection = Literal["threshold", "knapsack"]
_Different = AfterValidator(_refuse_duplicates)


class SweepSettings(Section):
    """Trials of a sweep."""

    kind: Literal["threshold", "iterations", "search"] = "threshold"
    """`threshold`: students of one teacher; `iterations`: models trained from scratch; `search`:
    the students of a threshold sweep, then others that a sampler suggests."""
    num_schedules: StrictInt = Field(default=7, ge=0)
    """Schedules of a threshold sweep, evenly spaced in cost from the teacher's to the cheapest; 0
    if `schedules` names all of them."""
    schedules: Annotated[tuple[StrictInt | str, ...], _Different] = ()
    """Schedules beside those that influence chooses: your own, such as `2,2,1,1` or `0*14,x*2` (`x`
    leaves a layer out), or controls of each chosen one at the same NFE: `uniform` (equal layers),
    `reversed` (its layers in reverse) and `random*5` (five random ones)."""
    leave_out_layers: Annotated[
        Annotated[StrictInt, Field(ge=0)] | Literal["all", "none"] | None,
        BeforeValidator(_refuse_other_words),
    ] = None
    """Most layers that a student leaves out: a number, `all` (all but one) or `none` (default: half
    of the layers if the teacher makes no corrections, and none if it makes some)."""
    thresholds: tuple[StrictFloat, ...] = ()
    """Thresholds of influence, in place of `num_schedules`; those that give the same schedule are
    one trial."""
    budgets: tuple[Budget, ...] = ()
    """Budgets, in place of `num_schedules`: numbers, or shares of the teacher's cost (`80%`). Each
    gives the schedule with the most influence that costs no more."""
    budget_unit: Annotated[
        BudgetUnit,
        BeforeValidator(_refuse_milliseconds),
        AfterValidator(lambda unit: "evaluations" if unit == "nfe" else unit),
    ] = "evaluations"
    """Unit of `budgets`, and of the cost by which `num_schedules` are spaced: `evaluations` (NFE),
    `flops` or `kv` (bytes) per token, or `parameters`. For milliseconds, see `iiet-orch pick`."""
    selection: Selection = "threshold"
    """How schedules are chosen: by a `threshold` of influence, which gives a nested family, or as
    the `knapsack` with the most influence at each cost."""
    elastic: StrictBool = False
    """Train one set of elastic weights for all schedules of a threshold sweep, not a student for
    each. `distillation.training.elastic` says how."""
    elastic_steps: StrictInt | None = Field(default=None, gt=0, le=MAX_STEPS)
    """Optimizer steps of the elastic training (default: those of `distillation.training`)."""
    teachers: Annotated[tuple[ModelName, ...], _Different] = ()
    """Further teachers of a threshold sweep, each with its own students: a method (`pcformer`), or
    an IIET's corrections (`r = 2`). `seeds` then train teachers and baselines, too."""
    baselines: Annotated[tuple[ModelName, ...], _Different] = ()
    """Further baselines that are trained from random weights: a method (`pcformer`), or an IIET's
    corrections (`r = 1`). `vanilla` and `r = 0` need no mention, unless the teacher has a source
    model or makes no corrections."""
    source_controls: Annotated[
        tuple[Literal["source", "source_continued", "scratch", "scratch_with_source"], ...],
        _Different,
    ] = ("source", "source_continued")
    """What a teacher with a source model is compared with. `source`: the source model as it is;
    `source_continued`: fine-tuned without corrections, with the teacher's training FLOPs;
    `scratch`, `scratch_with_source`: the teacher's model from random weights, with the teacher's
    training FLOPs, or with those of both trainings."""
    baseline_runs: tuple[str, ...] = ()
    """Trained models as further baselines: runs or checkpoints, by name or path. They must read the
    sweep's tokens."""
    iterations: tuple[StrictInt | str, ...] = Field(default=(0, 1, 2, 3), min_length=1)
    """Schedules that `sweep-iterations` pretrains: a number for all layers, a ramp over the depth
    (`3..0`), or one number per layer (`2,2,1,1,1,1`)."""
    methods: tuple[Annotated[str, METHOD], ...] = Field(
        default=(BASELINE_METHOD, DEFAULT_METHOD), min_length=1
    )
    """Methods that `sweep-iterations` pretrains."""
    learning_rates: dict[DeepModelName, _Rate | _Several[_Rate]] = Field(
        default={BASELINE_METHOD: 4e-3}
    )
    """Peak learning rates that differ from `training.learning_rate`, by model: `vanilla`, `r = 3`
    or `vanilla, 8 layers`. Each of several rates is a trial."""
    num_layers: dict[ModelName, _Layers | Annotated[_Several[_Layers], _Different]] = Field(
        default={}
    )
    """Numbers of layers that differ from `model.num_layers`, by model: `vanilla` or `r = 3`. Each
    of several numbers is a trial of `sweep-iterations`; other sweeps read those of baselines."""
    seeds: Annotated[tuple[_Seed, ...], _Different] = ()
    """Train every model with each of these seeds; tables show mean and standard error (default:
    `training.seed` alone)."""
    asha: StrictBool = False
    """Asynchronous successive halving (ASHA) in `sweep-iterations`: end the worse learning rates of
    a model early, by validation loss."""
    asha_first_rung: StrictFloat = Field(default=0.25, gt=0, lt=1)
    """Share of the steps before the first rung; each further rung comes after
    `asha_reduction_factor` times as many steps."""
    asha_reduction_factor: StrictInt = Field(default=2, ge=2)
    """One in this many learning rates continues after a rung."""
    trials_at_once: StrictInt | None = Field(default=None, gt=0)
    """Most trials at the same time (default: as many as CPUs or `cluster.num_gpus` allow)."""
    workers_per_trial: StrictInt = Field(default=1, gt=0)
    """Data-parallel workers of each trial; with GPUs, one for each GPU."""
    gpus_per_trial: StrictFloat | None = Field(default=None, ge=0)
    """GPUs of each trial, or a share of one, such as 0.25; 0 trains on CPUs (default: the fewest of
    `cluster.num_gpus` on which every trial fits)."""
    max_failures_per_trial: StrictInt = Field(default=2, ge=0)
    """Retries of a failed trial."""

    @property
    def schedule_choice(self) -> Literal["thresholds", "budgets", "num_schedules"]:
        """The setting that chooses the schedules of the students: the first one that is set."""
        if self.thresholds:
            return "thresholds"
        return "budgets" if self.budgets else "num_schedules"

    @property
    def num_requested(self) -> int:
        """Schedules that are asked for; several may turn out to be the same."""
        return len(self.thresholds) or len(self.budgets) or self.num_schedules

    @property
    def num_workers_per_trial(self) -> int:
        """Workers of each trial, one for each of its GPUs."""
        return ceil(self.gpus_per_trial or 0) or self.workers_per_trial

    @field_validator("num_schedules")
    @classmethod
    def _refuse_a_single_schedule(cls, number: int) -> int:
        if number == 1:
            raise ValueError("one schedule is no front; give 2 or more, or 0 with sweep.schedules")
        return number

    @field_validator("gpus_per_trial")
    @classmethod
    def _refuse_parts_of_several_gpus(cls, gpus: float | None) -> float | None:
        if gpus and (gpus < MIN_GPU_SHARE or (gpus > 1 and gpus % 1)):
            raise ValueError(
                f"{gpus:g} GPUs are neither whole GPUs nor a share of one; give a whole number, or "
                f"a share from {MIN_GPU_SHARE:g} to 1"
            )
        return gpus


class SearchSettings(Section):
    """Search for schedules outside the threshold's family."""

    num_trials: StrictInt = Field(default=24, ge=0)
    """Most schedules to try after those of the threshold sweep, with any corrections in any
    layer."""
    objective: Literal["accuracy", "bits_per_byte", "validation_loss"] = "accuracy"
    """Quality to optimize together with the number of evaluations."""
    seed: StrictInt = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of Optuna's sampler."""
