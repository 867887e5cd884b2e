"""What is known of each method and influence metric beside its formula: one table of each.

A row holds the place of the class with the formula, and facts such as its options and what a layer
adds to the cost of its field. Without torch, so that configurations, records and plans read names
and facts in a moment. Other packages add rows by entry points (`iiet.extensions`); their classes
state the facts in the attribute `facts`, as the classes of this project do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, NamedTuple, get_args

from iiet.checks import check_rules, is_integer_from, is_number_from
from iiet.extensions import ExtensionTable
from iiet.model.schedule import IterationSchedule

__all__ = [
    "INFLUENCE_METRICS", "METHODS", "ImplicitEulerOptions", "LayerCounts", "MethodFacts",
    "MetricFacts", "NoOptions", "facts_of", "metric_facts_of",
]  # fmt: skip


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


class LayerCounts(NamedTuple):
    """What a layer does and keeps beside its field."""

    num_differentiated: int
    """Evaluations that training differentiates."""
    num_terms: int = 0
    """Terms of its weighted sums of hidden states; each takes `2 dim` FLOPs for one token."""
    num_kept: int = 0
    """Tensors of the hidden state's size that it keeps for its backward pass, without what it
    leaves for later layers."""


def _no_gates(_: Any) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class MethodFacts:
    """What is known of a method; the defaults are those of explicit Euler.

    Raises:
        ValueError: naming every value that is out of range.
    """

    Options: type[Any] = NoOptions
    """A frozen dataclass: the options that `ModelConfig.method_options` may set."""
    version: int = 1
    """Increase it if the formula changes: the orchestrator then trains such models anew."""
    modeling_file: str | None = None
    """A file beside the method's module that an export ships as `modeling_iiet.py`, for
    transformers. A method of another package without one cannot be exported."""
    num_evaluations: int = 1
    """Field evaluations of a layer beside the corrections of the schedule."""
    has_corrections: bool = False
    """Whether an iteration schedule sets how often a layer corrects its prediction."""
    full_level: int | None = None
    """Where a schedule gives each layer one of a few levels: the highest, at which the method is
    the published one, and which a model without a schedule gets. None: any number of corrections.
    A level costs as many evaluations as corrections do."""
    repeats_stack: bool = False
    """Whether a correction is another run of all layers, one after the other, so that all layers
    make as many; else each layer makes all of its evaluations before the next one begins."""
    has_gates: Callable[[Any], bool] = _no_gates
    """Whether layers with these options have gates (`Layer.gates`)."""
    is_random: bool = False
    """Whether a layer draws random numbers; a recomputed layer then draws the same ones."""
    num_left: int = 0
    """Tensors of the hidden state's size that a layer leaves for all later ones (estimates)."""
    counts: Callable[[int, int, Any], LayerCounts] | None = None
    """What a layer does and keeps beside its field, in all runs of the stack: a function of the
    layer (the first being 0), its number of corrections, and the options. None: training
    differentiates all evaluations, and there is nothing else."""

    def __post_init__(self) -> None:
        flags = ("has_corrections", "repeats_stack", "is_random")
        rules = {f"{name} must be true or false": _is_flag(self, name) for name in flags}
        rules["Options must be a dataclass"] = is_dataclass(self.Options)
        rules["version must be an integer from 1"] = is_integer_from(1, self.version)
        rules["num_evaluations must be an integer from 1"] = is_integer_from(
            1, self.num_evaluations
        )
        rules["full_level must be an integer from 1, or None"] = (
            self.full_level is None or is_integer_from(1, self.full_level)
        )
        rules["num_left must be an integer from 0"] = is_integer_from(0, self.num_left)
        check_rules("facts of a method", self, rules)

    def evaluations_per_layer(self, schedule: IterationSchedule, layer: int) -> int:
        """Count the field evaluations of a layer, the first being 0."""
        return self.num_evaluations + (schedule[layer] if self.has_corrections else 0)

    def num_runs(self, schedule: IterationSchedule) -> int:
        """Count how often a pass runs the stack of layers."""
        return 1 + schedule.max_corrections if self.repeats_stack else 1

    def layer_counts(self, schedule: IterationSchedule, layer: int, options: Any) -> LayerCounts:
        """Count what a layer does and keeps beside its field."""
        if self.counts is None:
            return LayerCounts(self.evaluations_per_layer(schedule, layer))
        return self.counts(layer, schedule[layer], options)


def _is_flag(facts: object, name: str) -> bool:
    return isinstance(getattr(facts, name), bool)


StartKind = Literal["mean", "identity"]
LearnedDamping = Literal[False, "scalar", "vector"]


@dataclass(frozen=True, kw_only=True)
class ImplicitEulerOptions:
    """How the corrections are made.

    Raises:
        ValueError: naming every field that is out of range.
    """

    start: StartKind = "mean"
    """What the method's weights make of a plain model's before any training. `mean`: the rows of
    the mix are means, as published. `identity`: the plain model itself, under every schedule; rows
    of the mix read the newest estimate alone, and gates that start at 0 let norms and corrections
    in."""
    damping: float = 1.0
    """Share of each correction that is applied, in (0, 1]; 1 applies all of it. 0 is allowed if the
    damping is learned: the layer then starts as if it had no corrections. An identity start has its
    own, 0, and takes no other."""
    learn_damping: LearnedDamping = False
    """Whether each layer learns its damping, starting from `damping`: one number (`scalar`) or one
    per channel (`vector`). An identity start always learns it, by default a vector."""
    differentiated_corrections: int | None = None
    """Training differentiates only this many last corrections of each layer, at least 1; the
    evaluations before are constants. None: all are differentiated."""
    reinject_prediction: bool = False
    """Whether each correction also reads the prediction, with one learned weight per layer that
    starts at 0."""

    @property
    def starts_as_identity(self) -> bool:
        """Whether the model starts as the plain model of the same weights."""
        return self.start == "identity"

    @property
    def first_damping(self) -> float:
        """The damping before any training."""
        return 0.0 if self.starts_as_identity else self.damping

    def __post_init__(self) -> None:
        if self.starts_as_identity and self.learn_damping is False:
            # Stated, so that options with the same effect are equal.
            object.__setattr__(self, "learn_damping", "vector")
        last = self.differentiated_corrections
        check_rules(
            "options of iiet",
            self,
            {
                "start must be mean or identity": self.start in get_args(StartKind),
                "learn_damping must be false, scalar or vector": (
                    self.learn_damping is False or self.learn_damping in ("scalar", "vector")
                ),
                "reinject_prediction must be true or false": isinstance(
                    self.reinject_prediction, bool
                ),
                "damping must be a number from 0 to 1 (0: with learn_damping)": (
                    is_number_from(0, self.damping, 1)
                    and (self.damping > 0 or self.learn_damping is not False)
                ),
                "damping must be left out with start=identity, whose dampings start at 0": (
                    self.damping == 1 or not self.starts_as_identity
                ),
                "differentiated_corrections must be at least 1 or None": (
                    last is None or is_integer_from(1, last)
                ),
            },
        )


def _counts_of_iiet(layer: int, r: int, options: ImplicitEulerOptions) -> LayerCounts:
    """Count a layer of IIET, with r corrections.

    The sum of the hidden state has `layer + 1` earlier estimates and the layer's own. That of the
    points has the same earlier ones, once, and the current estimate for each correction.
    """
    last = options.differentiated_corrections
    num_differentiated = r if last is None else min(r, last)
    num_terms = (layer + 1) + 1
    if r > 0:
        num_terms += (layer + 1) + r + options.reinject_prediction
    # A correction keeps what it starts from, for the weight of its term, and its field's output,
    # for the norm; with a learned damping, also by how much it moves the estimate. A norm that is
    # blended in keeps its result beside its input.
    is_learned = options.learn_damping is not False
    num_kept = (2 + is_learned + options.starts_as_identity) * num_differentiated
    if num_differentiated == r:
        # The prediction's norm keeps the field's output, too.
        return LayerCounts(r + 1, num_terms, num_kept + 1 + options.starts_as_identity)
    # The prediction is a constant, which nothing but its own weight keeps.
    return LayerCounts(num_differentiated, num_terms, num_kept + options.reinject_prediction)


def _counts_of_pcformer(layer: int, num_stages: int, num_corrections: int) -> LayerCounts:
    """Count a layer of PCformer: a prediction of some stages, and perhaps its correction."""
    num_terms = num_stages + (layer + 1) + 1
    if num_corrections > 0:
        num_terms += (layer + 1) + 1
    # A stage keeps its field's output for its norm, and itself for its weight; the prediction what
    # its norm reads; a correction what it starts from and its field's output.
    num_kept = 2 * num_stages + 1 + 2 * num_corrections
    return LayerCounts(num_stages + num_corrections, num_terms, num_kept)


def _counts_at_level(layer: int, level: int, _: Any) -> LayerCounts:
    return _counts_of_pcformer(layer, num_stages=max(1, level), num_corrections=min(1, level))


def _counts_of_pcformer_rk4(layer: int, _: int, __: Any) -> LayerCounts:
    return _counts_of_pcformer(layer, num_stages=4, num_corrections=1)


def _counts_of_gate(_: int, __: int, ___: Any) -> LayerCounts:
    # The gate is a product with both stages. It keeps them joined, the interpolation each of them.
    return LayerCounts(2, num_terms=2, num_kept=4)


_OWN_METHODS: dict[str, tuple[str, MethodFacts]] = {
    "vanilla": ("iiet.methods:ExplicitEuler", MethodFacts()),
    "iiet": (
        "iiet.methods:ImplicitEuler",
        MethodFacts(
            Options=ImplicitEulerOptions,
            has_corrections=True,
            has_gates=lambda options: options.learn_damping is not False,
            num_left=1,
            counts=_counts_of_iiet,
        ),
    ),
    "pcformer": (
        "iiet.methods:PredictorCorrectorRK2",
        MethodFacts(has_corrections=True, full_level=2, num_left=1, counts=_counts_at_level),
    ),
    "pcformer_rk4": (
        "iiet.methods:PredictorCorrectorRK4",
        MethodFacts(num_evaluations=5, num_left=1, counts=_counts_of_pcformer_rk4),
    ),
    "ode_rk2": ("iiet.methods:ExplicitRK2", MethodFacts(num_evaluations=2)),
    "ode_rk4": ("iiet.methods:ExplicitRK4", MethodFacts(num_evaluations=4)),
    "ode_rk2_gated": (
        "iiet.methods:GatedRK2",
        MethodFacts(num_evaluations=2, counts=_counts_of_gate),
    ),
    "looped": ("iiet.methods:Looped", MethodFacts(has_corrections=True, repeats_stack=True)),
}
METHODS: ExtensionTable[Any] = ExtensionTable(
    "iiet.methods",
    "method",
    {name: place for name, (place, _) in _OWN_METHODS.items()},
    "iiet.methods:Layer",
)
"""Methods, by the papers' names; class and file names carry the mathematics."""


def facts_of(method: str) -> MethodFacts:
    """Return what is known of a method; the class of another package's method is imported.

    Raises:
        ExtensionError: as `METHODS[method]`.
    """
    if method in _OWN_METHODS:
        return _OWN_METHODS[method][1]
    facts: MethodFacts = METHODS[method].facts
    return facts


@dataclass(frozen=True, kw_only=True)
class MetricFacts:
    """What is known of an influence metric; the defaults are those of `cosine`.

    Raises:
        ValueError: naming every value that is out of range.
    """

    version: int = 1
    """Increase it if the metric gives other values: stored tables are then measured again."""
    needs_targets: bool = False
    """Whether only positions with a target count; else all that the model is taught."""
    may_be_negative: bool = False
    """Whether a correction may have a negative influence, and thresholds may be below 0."""
    is_of_stopping: bool = False
    """Whether a value compares stopping before the correction with the full layer. A correction is
    then worth the difference to stopping after it; else its value is its worth."""

    def __post_init__(self) -> None:
        flags = ("needs_targets", "may_be_negative", "is_of_stopping")
        rules = {f"{name} must be true or false": _is_flag(self, name) for name in flags}
        rules["version must be an integer from 1"] = is_integer_from(1, self.version)
        check_rules("facts of a metric", self, rules)


_OWN_METRICS: dict[str, tuple[str, MetricFacts]] = {
    # Version 2 compares what damped corrections leave, and no longer what their fields return.
    "cosine": ("iiet.iiad.influence:Cosine", MetricFacts(version=2)),
    "relative": ("iiet.iiad.influence:Relative", MetricFacts(version=2)),
    "loss": (
        "iiet.iiad.influence:LossRise",
        MetricFacts(needs_targets=True, may_be_negative=True, is_of_stopping=True),
    ),
}
INFLUENCE_METRICS: ExtensionTable[Any] = ExtensionTable(
    "iiet.influence_metrics",
    "influence metric",
    {name: place for name, (place, _) in _OWN_METRICS.items()},
    "iiet.iiad.influence:InfluenceMetric",
)
"""Influence metrics; the names are the values of the setting `influence.metric`."""


def metric_facts_of(metric: str) -> MetricFacts:
    """Return what is known of an influence metric, as `facts_of` does of a method."""
    if metric in _OWN_METRICS:
        return _OWN_METRICS[metric][1]
    facts: MetricFacts = INFLUENCE_METRICS[metric].facts
    return facts
