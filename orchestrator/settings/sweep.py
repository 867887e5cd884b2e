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
    the students of a threshold sweep, then students with free schedules."""
    num_schedules: StrictInt = Field(default=7, ge=0)
    """Schedules of a threshold sweep, evenly spaced in cost, from all corrections to none, or to
    the fewest layers; 0 where `schedules` names all of them."""
    schedules: Annotated[tuple[StrictInt | str, ...], _Different] = ()
    """Iteration schedules of one's own, beside those that influence chooses: `2,2,1,1`, `0*14,x*2`
    (`x` is a layer that is left out). `uniform`, `reversed` and `random*5` are controls of the
    chosen ones at the same NFE: equal corrections in all layers, the layers in reversed order, and
    schedules that are drawn."""
    leave_out_layers: Annotated[
        Annotated[StrictInt, Field(ge=0)] | Literal["all", "none"] | None,
        BeforeValidator(_refuse_other_words),
    ] = None
    """Most layers that a student leaves out: a number, `all` (all but one) or `none` (default: half
    of the layers if the teacher makes no corrections, and none if it makes some)."""
    thresholds: tuple[StrictFloat, ...] = ()
    """Thresholds to use instead; those that give the same schedule are one trial."""
    budgets: tuple[Budget, ...] = ()
    """Budgets to use instead, as numbers or as shares of the teacher's cost (`80%`): for each, the
    schedule with the most influence that costs no more."""
    budget_unit: Annotated[
        BudgetUnit,
        BeforeValidator(_refuse_milliseconds),
        AfterValidator(lambda unit: "evaluations" if unit == "nfe" else unit),
    ] = "evaluations"
    """Unit of `budgets`, and of the cost that `num_schedules` are spaced in: evaluations (NFE),
    FLOPs or KV bytes per token, or parameters, which corrections do not change. Milliseconds are
    measured when the students exist: `iiet-orch pick --budget 5 --cost ms`."""
    selection: Selection = "threshold"
    """Schedules to choose from: the threshold's nested family, or the knapsack's optimum at each
    cost."""
    elastic: StrictBool = False
    """Train one set of weights from the teacher for all schedules of a threshold sweep, instead of
    a student for each. `distillation.training.elastic` says how."""
    elastic_steps: StrictInt | None = Field(default=None, gt=0, le=MAX_STEPS)
    """Optimizer steps of the elastic training (default: those of `distillation.training`)."""
    teachers: Annotated[tuple[ModelName, ...], _Different] = ()
    """Further teachers that a threshold sweep trains, by method (`pcformer`) or by the corrections
    of an IIET (`r = 2`), each with students of its own. Then `seeds` train teachers and baselines,
    too, and the students of a seed learn from that seed's teacher."""
    baselines: Annotated[tuple[ModelName, ...], _Different] = ()
    """Further baselines that are trained with a teacher, beside vanilla and the teacher without
    corrections: `pcformer`, or the corrections of an IIET (`r = 1`). Beside a teacher with a source
    these are the only ones that are trained from random weights; `vanilla` and `r = 0` can be named
    there."""
    source_controls: Annotated[
        tuple[Literal["source", "source_continued", "scratch", "scratch_with_source"], ...],
        _Different,
    ] = ("source", "source_continued")
    """What a teacher with a source is compared with. `source`: that model as it was.
    `source_continued`: that model, trained on as it is until its training FLOPs equal the
    teacher's, on the same data in the same order, in the same layers, with the same
    `source_kl_weight`; its learning rate is the better of two by the validation loss after as many
    tokens as the teacher's: the teacher's rate, and that of the source's own training, or twice the
    teacher's if that is the same or not known. `scratch` and `scratch_with_source`: the
    teacher's model from random weights, at the teacher's training FLOPs, and at those of source and
    teacher together."""
    baseline_runs: tuple[str, ...] = ()
    """Trained models that stand beside the front, too: runs or checkpoints, by name or path. They
    must read the sweep's tokens, and nothing else of them need be alike."""
    iterations: tuple[StrictInt | str, ...] = Field(default=(0, 1, 2, 3), min_length=1)
    """Corrections of the IIETs that `sweep-iterations` pretrains: a number for all layers, a ramp
    over the depth (`3..0`), or one number per layer (`2,2,1,1,1,1`)."""
    methods: tuple[Annotated[str, METHOD], ...] = Field(
        default=(BASELINE_METHOD, DEFAULT_METHOD), min_length=1
    )
    """Methods that `sweep-iterations` pretrains."""
    learning_rates: dict[DeepModelName, _Rate | _Several[_Rate]] = Field(
        default={BASELINE_METHOD: 4e-3}
    )
    """Peak learning rates that differ from `training.learning_rate`, by method, by the corrections
    of an IIET (`r = 3`), or with a number of layers (`vanilla, 8 layers`). Of several rates, each
    is a trial."""
    num_layers: dict[ModelName, _Layers | Annotated[_Several[_Layers], _Different]] = Field(
        default={}
    )
    """Numbers of layers that differ from `model.num_layers`, by method, or by the corrections of an
    IIET (`r = 3`). Of several numbers, each is a trial of `sweep-iterations`. In other sweeps they
    are those of the baselines (vanilla and the teacher without corrections)."""
    seeds: Annotated[tuple[_Seed, ...], _Different] = ()
    """Train every model with each of these seeds; tables show mean and error (default: the
    recipe's seed alone)."""
    asha: StrictBool = False
    """Asynchronous successive halving in `sweep-iterations`: of one model's learning rates, train
    only the better ones to the end, by validation loss."""
    asha_first_rung: StrictFloat = Field(default=0.25, gt=0, lt=1)
    """Share of the steps before the first comparison; the next ones follow each time the steps
    have grown by `asha_reduction_factor`."""
    asha_reduction_factor: StrictInt = Field(default=2, ge=2)
    """One in this many learning rates continues after a comparison."""
    trials_at_once: StrictInt | None = Field(default=None, gt=0)
    """Most trials at the same time (default: as many as CPUs or `cluster.num_gpus` allow)."""
    workers_per_trial: StrictInt = Field(default=1, gt=0)
    """Data-parallel workers of each trial; with GPUs, one each. Not part of a trial's key."""
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
            raise ValueError("a family has two ends; give 2 or more, or 0 beside sweep.schedules")
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
    """Most schedules, with any count in any layer, to try after those of the threshold sweep."""
    objective: Literal["accuracy", "bits_per_byte", "validation_loss"] = "accuracy"
    """Quality to optimize together with the number of evaluations."""
    seed: StrictInt = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of Optuna's sampler."""
