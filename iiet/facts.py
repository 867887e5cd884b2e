"""What is known of a method, or of an influence metric, beside its formula, such as its options.

Without torch, so that configurations, records and plans are read in a moment. The classes with the
formulas inherit these attributes; those of other packages state them in their own class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from iiet.checks import check_rules, is_integer_from, is_number_from
from iiet.extensions import INFLUENCE_METRICS, METHODS
from iiet.schedule import IterationSchedule

__all__ = [
    "ImplicitEulerOptions", "MethodFacts", "MetricFacts", "NoOptions", "facts_of",
    "metric_facts_of",
]  # fmt: skip


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


class MethodFacts:
    """The attributes that every method has; these are those of explicit Euler."""

    Options: ClassVar[type[Any]] = NoOptions
    """A frozen dataclass: the options that `ModelConfig.method_options` may set."""
    version: ClassVar[int] = 1
    """Increase it if the formula changes: the orchestrator then trains such models anew."""
    modeling_file: ClassVar[str | None] = None
    """Of a method of another package: a file beside its module that an export ships as
    `modeling_iiet.py`, for transformers. Without one the method cannot be exported."""
    num_evaluations: ClassVar[int] = 1
    """Field evaluations of a layer beside the corrections of the schedule."""
    has_corrections: ClassVar[bool] = False
    """Whether an iteration schedule sets how often a layer corrects its prediction."""
    full_level: ClassVar[int | None] = None
    """Where a schedule gives each layer one of a few levels: the highest, at which the method is
    the published one, and which a model without a schedule gets. None: any number of corrections.
    A level costs as many evaluations as corrections do."""
    repeats_stack: ClassVar[bool] = False
    """Whether a correction is another run of all layers, one after the other, so that all layers
    make as many; else each layer makes all of its evaluations before the next one begins."""
    is_random: ClassVar[bool] = False
    """Whether a layer draws random numbers; a recomputed layer then draws the same ones."""
    num_left: ClassVar[int] = 0
    """Tensors of the hidden state's size that a layer leaves for all later ones (estimates)."""

    @classmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer: int) -> int:
        """Count the field evaluations of a layer, the first layer being 0."""
        return cls.num_evaluations + (schedule[layer] if cls.has_corrections else 0)

    @classmethod
    def num_runs(cls, schedule: IterationSchedule) -> int:
        """Count how often a pass runs the stack of layers."""
        return 1 + schedule.max_corrections if cls.repeats_stack else 1


class LoopedFacts(MethodFacts):
    """A schedule says how often the stack is repeated."""

    has_corrections: ClassVar[bool] = True
    repeats_stack: ClassVar[bool] = True


class ExplicitRK2Facts(MethodFacts):
    """Two stages."""

    num_evaluations: ClassVar[int] = 2


class ExplicitRK4Facts(ExplicitRK2Facts):
    """Four stages."""

    num_evaluations: ClassVar[int] = 4


@dataclass(frozen=True, kw_only=True)
class ImplicitEulerOptions:
    """How the corrections are made.

    Raises:
        ValueError: naming every field that is out of range.
    """

    damping: float = 1.0
    """Share of each correction that is applied, in (0, 1]; 1 applies all of it. 0 is allowed if the
    damping is learned: the layer then starts as if it had no corrections."""
    learn_damping: bool = False
    """Whether each layer learns its damping, starting from `damping`."""
    differentiated_corrections: int | None = None
    """Training differentiates only this many last corrections of each layer, at least 1; the
    evaluations before are constants. None: all are differentiated."""
    reinject_prediction: bool = False
    """Whether each correction also reads the prediction, with one learned weight per layer that
    starts at 0."""

    def __post_init__(self) -> None:
        last = self.differentiated_corrections
        check_rules(
            "options of iiet",
            self,
            {
                "learn_damping must be true or false": isinstance(self.learn_damping, bool),
                "reinject_prediction must be true or false": isinstance(
                    self.reinject_prediction, bool
                ),
                "damping must be a number from 0 to 1 (0: with learn_damping=true)": (
                    is_number_from(0, self.damping, 1)
                    and (self.damping > 0 or self.learn_damping is True)
                ),
                "differentiated_corrections must be at least 1 or None": (
                    last is None or is_integer_from(1, last)
                ),
            },
        )


class ImplicitEulerFacts(MethodFacts):
    """Any number of corrections, and an estimate for later layers."""

    Options = ImplicitEulerOptions
    has_corrections: ClassVar[bool] = True
    num_left: ClassVar[int] = 1


class PredictorCorrectorRK2Facts(MethodFacts):
    """Levels 0 to 2, and an estimate for later layers."""

    has_corrections: ClassVar[bool] = True
    full_level: ClassVar[int | None] = 2
    num_left: ClassVar[int] = 1


class PredictorCorrectorRK4Facts(PredictorCorrectorRK2Facts):
    """Four stages and a correction, without levels."""

    num_evaluations: ClassVar[int] = 5
    has_corrections: ClassVar[bool] = False
    full_level: ClassVar[int | None] = None


_OWN_METHODS = {
    "vanilla": MethodFacts,
    "iiet": ImplicitEulerFacts,
    "pcformer": PredictorCorrectorRK2Facts,
    "pcformer_rk4": PredictorCorrectorRK4Facts,
    "ode_rk2": ExplicitRK2Facts,
    "ode_rk4": ExplicitRK4Facts,
    "ode_rk2_gated": ExplicitRK2Facts,
    "looped": LoopedFacts,
}


def facts_of(method: str) -> type[MethodFacts]:
    """Return what is known of a method; the class of another package's method is imported.

    Raises:
        ExtensionError: as `METHODS[method]`.
    """
    found: type[MethodFacts] = _OWN_METHODS.get(method) or METHODS[method]
    return found


class MetricFacts:
    """The attributes that every influence metric has; these are those of `cosine`."""

    version: ClassVar[int] = 1
    """Increase it if the metric gives other values: stored tables are then measured again."""
    needs_targets: ClassVar[bool] = False
    """Whether only positions with a target count; else all that the model is taught."""
    may_be_negative: ClassVar[bool] = False
    """Whether a correction may have a negative influence, and thresholds may be below 0."""
    is_of_stopping: ClassVar[bool] = False
    """Whether a value compares stopping before the correction with the full layer. A correction is
    then worth the difference to stopping after it; else its value is its worth."""


class LossRiseFacts(MetricFacts):
    """A layer stops before the correction."""

    needs_targets: ClassVar[bool] = True
    may_be_negative: ClassVar[bool] = True
    is_of_stopping: ClassVar[bool] = True


_OWN_METRICS = {"cosine": MetricFacts, "relative": MetricFacts, "loss": LossRiseFacts}


def metric_facts_of(metric: str) -> type[MetricFacts]:
    """Return what is known of an influence metric, as `facts_of` does of a method."""
    found: type[MetricFacts] = _OWN_METRICS.get(metric) or INFLUENCE_METRICS[metric]
    return found
