"""The Pareto front: which models no other one beats on cost and quality, and how sure that is.

A front is the models of a sweep, each with its place on two axes. Beside a teacher, baselines are
placed but do not compete: the front tells which schedule to take, and `members_beaten_by` whether
that was worth it. Without a teacher all models compete. Costs are exact, so only quality is
uncertain: `with_confidence` adds numbers that say how sure each place is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from statistics import median
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.metrics import (
    ACCURACY,
    BITS_PER_BYTE,
    CONFIDENCE_ON_FRONT,
    COSTS,
    DECODE_MS,
    DECODE_MS_SPREAD,
    NFE,
    OVERHEAD_NFE,
    PAIRED,
    PAIRED_SHARE_OF_FULL,
    QUALITIES,
    TRAINING_TOKENS,
    Metric,
    confidence_keeps_name,
    difference_names,
    interval_end_names,
    metric_of,
    stderr_name,
)
from orchestrator.records.trial import BASELINE_ROLES, SOURCE, Trial, teacher_or_costliest
from orchestrator.reporting.results import (
    ModelResult,
    StoredSweep,
    item_notes,
    load_item_values,
    model_results,
    shape_of,
    with_overhead,
)
from orchestrator.reporting.retention import Loss, bounds_sentence, find_losses
from orchestrator.reporting.statistics import (
    DEMANDED_SHARE,
    INTERVAL_LEVEL,
    Floats,
    Interval,
    PairedScores,
    Scores,
    corrected,
    pair_scores,
)
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace

M = TypeVar("M", bound=ModelResult)

MAX_TIME_SPREAD = 0.1
"""Share of the time per token above which it decides nothing."""


@dataclass(frozen=True)
class FrontAxes:
    """Two metrics of a trial result: its cost and its quality."""

    cost: str = NFE
    """Tracked name of the cost; lower is better."""
    quality: str = ACCURACY
    """Tracked name of the quality."""
    against_accuracy: str = ""
    """Why the default quality is bits per byte; empty if it is the accuracy."""

    @property
    def cost_metric(self) -> Metric:
        """What the cost is called, and how it is written."""
        return metric_of(self.cost)

    @property
    def quality_metric(self) -> Metric:
        """What the quality is called, and how it is written."""
        return metric_of(self.quality)

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher quality is better."""
        return self.quality_metric.higher_is_better

    @property
    def in_words(self) -> str:
        """Both axes, as `accuracy and NFE per token`."""
        return f"{self.quality_metric.title.lower()} and {self.cost_metric.title}"

    @property
    def slug(self) -> str:
        """Both option values joined by a dash, for folder names; empty for the default axes."""
        default_quality = BITS_PER_BYTE if self.against_accuracy else ACCURACY
        if (self.cost, self.quality) == (FrontAxes().cost, default_quality):
            return ""
        parts: list[str] = []
        for metric in (self.quality_metric, self.cost_metric):
            if metric.options:
                parts.append(metric.options[-1])
            else:
                parts.append(metric.name.partition("/")[2].replace("/", "-"))
        return "-".join(parts)


def parse_axes(
    cost: str | None = None, quality: str | None = None, *, against_accuracy: str = ""
) -> FrontAxes:
    """Return the axes for two option values, such as `ms` and `bits`; the defaults for None.

    Args:
        against_accuracy: As `reason_against_accuracy` says it; empty if accuracy is the default.

    Raises:
        UserError: If a value is unknown.
    """
    for option, value, names in (("--cost", cost, COSTS), ("--quality", quality, QUALITIES)):
        if value and value not in names:
            raise UserError(f"{option} is one of {', '.join(names)}; got {value!r}")
    default_quality = BITS_PER_BYTE if against_accuracy else ACCURACY
    return FrontAxes(
        COSTS[cost] if cost else NFE,
        QUALITIES[quality] if quality else default_quality,
        against_accuracy,
    )


def reason_against_accuracy(
    workspace: Workspace, trials: Sequence[Trial], *, demanded_share: float = DEMANDED_SHARE
) -> str:
    """Return why bits per byte are the default quality of these models; empty if accuracy is.

    They are where every model has them, and the loss of accuracy is less well known than it may be
    large: the accuracy then cannot tell models apart.

    Args:
        workspace: Holds the values of single items.
        trials: Models with what was measured.
        demanded_share: Share of the full model's quality that a model must keep.
    """
    full = teacher_or_costliest(trials, role=lambda trial: trial.role, cost=_nfe)
    if full is None or any(BITS_PER_BYTE not in trial.numbers for trial in trials):
        return ""
    # The interval of what cheaper models lose: of the median, as some may answer all items alike.
    cheaper = [
        trial for trial in trials if trial.role not in BASELINE_ROLES and _nfe(trial) < _nfe(full)
    ]
    items = load_item_values(workspace, [full, *cheaper])
    paired = None
    if full.key in items and len(items) > 1:
        paired = pair_scores({key: [evaluation] for key, evaluation in items.items()})
    scores = paired.quality(ACCURACY) if paired else None
    if paired is None or scores is None:
        return ""
    number_of = paired.number_of
    number_of_full = number_of.pop(full.key)
    losses = [scores.difference(number_of_full, number) for number in number_of.values()]
    width = median(2 * loss.half_width() for loss in losses)
    allowed = (1 - demanded_share) * scores.observed[number_of_full]
    if width <= allowed:
        return ""
    return (
        f"Quality is bits per byte: {paired.num_items(ACCURACY):,} items are too few for the "
        "accuracy. The loss of a cheaper model has an interval of "
        f"{100 * width:.1f} points ({INTERVAL_LEVEL:.0%}, median of the models); to keep "
        f"{100 * demanded_share:.4g}%, it may lose {100 * allowed:.1f} points. "
        "`--quality accuracy` shows it."
    )


def _nfe(trial: Trial) -> float:
    return float(trial.numbers.get(NFE, 0.0))


@dataclass(frozen=True)
class ConfidenceBasis:
    """The items and seeds that confidences are computed from."""

    full: str
    """Name of the model that shares relate to."""
    metrics: Mapping[str, str]
    """Task -> the metric that is compared."""
    num_items: int
    """Items of the front's quality that all models answered."""
    num_left_out: int
    """Items that only some of them answered."""
    num_seeds: int
    """The most seeds of a model."""
    num_models: int
    """Models that are compared with the full one."""
    resolvable: float | None = None
    """Difference from the full model that 80% of such sweeps would show for a model, the median
    over the models; None where the front's quality has no values of single items."""
    share_differing: float | None = None
    """Share of the items on which the full model and another one differ, likewise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedModel(ModelResult):
    """A model with its place on two axes."""

    cost: float
    quality: float
    error: float | None
    """Standard error of the quality; None if it is not known."""
    signed_quality: float
    """The quality with the sign that makes a higher one better."""
    is_candidate: bool
    """Whether it competes for the front."""
    on_front: bool


@dataclass(frozen=True, eq=False)
class Front:
    """The models of a sweep, or of several, on two axes."""

    axes: FrontAxes
    placed: tuple[PlacedModel, ...]
    """The models with both metrics, cheapest first."""
    unmeasured: tuple[ModelResult, ...] = ()
    """The models that lack one of both metrics."""
    intervals: Mapping[tuple[str, str, str], Interval] = field(default_factory=dict)
    """(key, task or the front's quality, other model) -> the model's quality minus the other's;
    with an empty name of the other, the quality itself."""
    basis: ConfidenceBasis | None = None
    """What the confidences are computed from; None if there are none."""
    paired: PairedScores | None = None
    """The scores by item, of the placed models with values of single items; None if there are not
    two."""
    demanded_share: float = DEMANDED_SHARE
    """Share of the full model's quality that `confidence_keeps` is about."""
    losses: Mapping[str, tuple[Loss, ...]] = field(default_factory=dict)
    """Key -> what the model has lost against the teacher's source, of the tasks that the settings
    bound."""

    @property
    def models(self) -> tuple[ModelResult, ...]:
        """All models, the placed ones first."""
        return (*self.placed, *self.unmeasured)

    @cached_property
    def scores(self) -> Scores | None:
        """The scores of the front's quality by item, in the order of `paired`; None if there are
        none."""
        return self.paired.quality(self.axes.quality) if self.paired else None

    @cached_property
    def seeds(self) -> list[Trial]:
        """The trials whose means are placed."""
        return [seed for model in self.placed for seed in model.seeds]

    @cached_property
    def members(self) -> list[PlacedModel]:
        """The models on the front, cheapest first; equal ones are all members."""
        return [model for model in self.placed if model.on_front]

    @cached_property
    def full(self) -> PlacedModel | None:
        """The model to compare with: the teacher, else the costliest but for baselines."""
        return teacher_or_costliest(
            self.placed, role=lambda model: model.role, cost=lambda model: model.cost
        )

    @cached_property
    def picks(self) -> dict[str, PlacedModel]:
        """Knee, best and cheapest by name; without those that do not exist.

        Of equal members, the best is the cheapest, and the cheapest the best. The knee lies
        farthest above the chord from cheapest to best, with both axes scaled to one.
        """
        if not self.members:
            return {}
        best = max(self.members, key=lambda model: (model.signed_quality, -model.cost))
        cheapest = min(self.members, key=lambda model: (model.cost, -model.signed_quality))
        picks = {"best": best, "cheapest": cheapest}
        if best.signed_quality <= cheapest.signed_quality:
            return picks  # Otherwise, of members, the best costs more than the cheapest.

        def above_chord(model: PlacedModel) -> float:
            gain = model.signed_quality - cheapest.signed_quality
            further_cost = model.cost - cheapest.cost
            gain_share = gain / (best.signed_quality - cheapest.signed_quality)
            cost_share = further_cost / (best.cost - cheapest.cost)
            return (gain_share - cost_share) / math.sqrt(2)

        knee = max(self.members, key=above_chord)
        return {"knee": knee, **picks} if above_chord(knee) > 1e-12 else picks

    @property
    def named_picks(self) -> dict[str, PlacedModel]:
        """The picks that tables and pictures name: without a knee that keeps less than demanded."""
        picks = dict(self.picks)
        share = self.share_of_full(picks["knee"]) if "knee" in picks else None
        if share is not None and share < self.demanded_share:
            del picks["knee"]
        return picks

    @cached_property
    def sweeps(self) -> list[str]:
        """The sweeps of the models; empty if all are from one."""
        return [sweep for sweep in dict.fromkeys(model.sweep for model in self.models) if sweep]

    def share_of_full(self, model: PlacedModel) -> float | None:
        """Return a model's quality as a share of the full model's, 1.0 for all of it.

        For a loss: the full model's loss over this model's. This is over all items of each model;
        `paired/share_of_full` is over those that all models answered, and has an interval.
        """
        if self.full is None:
            return None
        if self.axes.higher_is_better:
            part = model.quality
            whole = self.full.quality
        else:
            part = self.full.quality
            whole = model.quality
        return part / whole if whole else None

    def confidence_keeps(self, model: ModelResult) -> float | None:
        """Return the confidence that a model keeps `demanded_share`; None if it is not known."""
        return model.number(confidence_keeps_name(self.demanded_share))

    def cheapest_keeping(self, demanded_share: float) -> PlacedModel | None:
        """Return the cheapest member that keeps this share of the full model's quality."""
        keeping = [
            member
            for member in self.members
            if (self.share_of_full(member) or 0.0) >= demanded_share
        ]
        return min(keeping, key=lambda member: member.cost, default=None)

    def members_beaten_by(self, baseline: PlacedModel) -> list[PlacedModel]:
        """Return the members that are no better and no cheaper than a baseline, and worse in one.

        Unlike domination among candidates, this takes no member off the front.
        """
        return [
            member
            for member in self.members
            if baseline.cost <= member.cost
            and baseline.signed_quality >= member.signed_quality
            and (baseline.cost, baseline.quality) != (member.cost, member.quality)
        ]

    def verdict(self, model: ModelResult) -> str:
        """Return a model's place: on the front, with its picks, or what a baseline beats."""
        if not isinstance(model, PlacedModel):
            return "not measured"
        if not model.is_candidate:
            num_beaten = len(self.members_beaten_by(model))
            return f"beats {num_beaten} ●" if num_beaten else ""
        if not model.on_front:
            return ""
        return " ".join(["●", *(name for name, pick in self.named_picks.items() if pick is model)])

    def on(self, axes: FrontAxes) -> Front:
        """Return the same models on other axes, with the confidences that hold there, too.

        These are the differences of the same quality. Whether a model is on the front depends on
        the cost as well.
        """
        is_same_quality = axes.quality == self.axes.quality
        of_quality = (PAIRED_SHARE_OF_FULL, confidence_keeps_name(self.demanded_share))
        still_true = of_quality if is_same_quality else ()
        models = [
            replace(
                model,
                numbers={
                    name: number
                    for name, number in model.numbers.items()
                    if not name.startswith(PAIRED) or name in still_true
                },
            )
            for model in self.models
        ]
        front = replace(find_front(models, axes), losses=self.losses)
        if not is_same_quality:
            return front
        return replace(
            front,
            intervals=self.intervals,
            basis=self.basis,
            paired=self.paired,
            demanded_share=self.demanded_share,
        )

    def with_runs(self, trials: Sequence[Trial]) -> Front:
        """Return the same front with the MLflow runs of these trials, which are its models."""
        tracked = {model.key: model for model in model_results(trials)}

        def with_run(model: M) -> M:
            trial = tracked[model.key].trial
            return replace(model, trial=trial, seeds=tracked[model.key].seeds)

        return replace(
            self,
            placed=tuple(map(with_run, self.placed)),
            unmeasured=tuple(map(with_run, self.unmeasured)),
        )


def busy_machine(models: Iterable[ModelResult]) -> str | None:
    """Return that times per token decide nothing, because a model's vary too much; None if not."""
    relative_spreads = {model.label: relative_time_spread(model) or 0.0 for model in models}
    # Sorted: a teacher and its unpruned student are timed as one model, in any order of the models.
    labels = sorted(relative_spreads)
    label = max(labels, key=lambda name: relative_spreads[name], default="")
    if not label or relative_spreads[label] <= MAX_TIME_SPREAD:
        return None
    return (
        f"the machine was busy: the time per token of {label} varies by "
        f"{relative_spreads[label]:.0%}; "
        "`iiet-orch report --time-again` measures once more"
    )


def relative_time_spread(model: ModelResult) -> float | None:
    """Return how much a model's time per token varied, as a share of it; None if it is unknown."""
    time = model.number(DECODE_MS)
    spread = model.number(DECODE_MS_SPREAD)
    return spread / time if time and spread is not None else None


def plain_rivals(models: Iterable[M], teacher: ModelResult) -> list[M]:
    """Return the baselines that a teacher's corrections must beat: of its shape, without
    corrections, and trained on no more tokens than it, if that is known. None of a plain teacher,
    which has no corrections that could gain anything."""
    if not teacher.config.corrections.num_corrections:
        return []
    teacher_tokens = teacher.number(TRAINING_TOKENS)
    rivals = []
    for model in models:
        if model.role != "baseline" or model.number(OVERHEAD_NFE) != 0:
            continue
        if shape_of(model.config) != shape_of(teacher.config):
            continue
        tokens = model.number(TRAINING_TOKENS)
        if teacher_tokens is None or tokens is None or tokens <= teacher_tokens:
            rivals.append(model)
    return rivals


def find_front(models: Sequence[ModelResult], axes: FrontAxes | None = None) -> Front:
    """Place models on two axes, NFE and accuracy by default, and find those that none beats.

    Args:
        models: Trials, teacher and baselines, from `model_results`.
        axes: Cost and quality.
    """
    axes = axes or FrontAxes()
    has_teacher = any(model.role == "teacher" for model in models)
    sign = 1 if axes.higher_is_better else -1
    placed = []
    unmeasured = []
    for model in models:
        cost = model.number(axes.cost)
        quality = model.number(axes.quality)
        if cost is None or quality is None:
            unmeasured.append(model)
            continue
        placed.append(
            PlacedModel(
                trial=model.trial,
                seeds=model.seeds,
                label=model.label,
                numbers=model.numbers,
                sweep=model.sweep,
                cost=cost,
                quality=quality,
                error=model.number(stderr_name(axes.quality)),
                signed_quality=sign * quality,
                is_candidate=not has_teacher or model.role not in BASELINE_ROLES,
                on_front=False,
            )
        )
    placed.sort(key=lambda model: (model.cost, model.signed_quality, model.key))
    candidates = [model for model in placed if model.is_candidate]
    is_member = on_front(
        np.array([model.cost for model in candidates]),
        np.array([model.signed_quality for model in candidates]),
    )
    members = {model.key for model, is_on in zip(candidates, is_member, strict=True) if is_on}
    with_members = [replace(model, on_front=model.key in members) for model in placed]
    return Front(axes, tuple(with_members), tuple(unmeasured))


def on_front(costs: Floats, qualities: Floats) -> NDArray[np.bool_]:
    """Return which models are on the front.

    A model is on the front if it is better than all cheaper ones, and as good as any that costs as
    much; equal models all are. A higher quality is better.
    """
    is_member = np.zeros(len(costs), dtype=bool)
    best_of_cheaper = -np.inf
    for cost in np.unique(costs):
        models = np.flatnonzero(costs == cost)
        best = qualities[models].max()
        is_member[models] = (qualities[models] == best) & (best > best_of_cheaper)
        best_of_cheaper = max(best, best_of_cheaper)
    return is_member


def with_confidence(
    front: Front,
    items: Mapping[str, EvaluationResult],
    *,
    demanded_share: float = DEMANDED_SHARE,
) -> Front:
    """Return the front with the confidence of each place.

    It has `paired`, `intervals`, and numbers `paired/...`: the share of the full model's quality,
    and the differences to the full model and to each baseline, on the front's quality and on each
    task, each with the ends of its interval; and the confidences that the model keeps
    `demanded_share`, and that it is on the front, each corrected for the number of models. Without
    two models that answered the same items, the front stays as it is.

    Args:
        front: Placed results.
        items: Key of a trial -> its values of single items. Models that lack those of a seed get no
            confidence.
        demanded_share: Share of the full model's quality.
    """
    full = front.full
    axes = front.axes
    runs = {
        model.key: [items[seed.key] for seed in model.seeds]
        for model in front.placed
        if all(seed.key in items for seed in model.seeds)
    }
    paired = pair_scores(runs) if full and len(runs) > 1 else None
    if full is None or paired is None:
        return replace(front, demanded_share=demanded_share)
    scores = paired.quality(axes.quality)
    number_of = paired.number_of
    # Label -> number of the models that all are compared with, the full model first.
    baselines = [
        model for model in front.placed if model.role in BASELINE_ROLES and model is not full
    ]
    compared_with: dict[str, int] = {}
    for model in (full, *baselines):
        if model.key in number_of:
            compared_with[model.label] = number_of[model.key]

    last_parts = difference_names(compared_with)

    # Numbers of a model, and intervals, on the front's quality and on each task.
    intervals: dict[tuple[str, str, str], Interval] = {}
    numbers: dict[str, dict[str, float]] = {model.key: {} for model in front.placed}

    def add_numbers(key: str, name: str, interval: Interval) -> None:
        low_name, high_name = interval_end_names(name)
        numbers[key][name] = interval.value
        numbers[key][low_name] = interval.low
        numbers[key][high_name] = interval.high

    measured = {**({} if scores is None else {axes.quality: scores}), **paired.scores}
    for (key, number), (name, scores_of_name) in product(number_of.items(), measured.items()):
        intervals[key, name, ""] = scores_of_name.score(number).interval()
        of_task = PAIRED if name == axes.quality else f"{PAIRED}{name}/"
        for label, number_of_label in compared_with.items():
            if number_of_label != number:
                difference = scores_of_name.difference(number, number_of_label).interval()
                intervals[key, name, label] = difference
                add_numbers(key, of_task + last_parts[label], difference)

    basis = ConfidenceBasis(
        full.label,
        paired.metrics,
        num_items=paired.num_items(axes.quality),
        num_left_out=sum(paired.left_out.values()),
        num_seeds=max(len(model.seeds) for model in front.placed),
        num_models=len(number_of) - (full.key in number_of),
    )
    if scores is not None and full.key in number_of:
        number_of_full = number_of[full.key]
        others = {key: number for key, number in number_of.items() if number != number_of_full}

        # The share of the full model's quality, and how sure a model keeps the demanded share.
        confidences = {}
        for key, number in number_of.items():
            # For a loss, the full model's over this one's, as in `Front.share_of_full`.
            part, whole = number, number_of_full
            if not axes.higher_is_better:
                part, whole = whole, part
            if (share := scores.share(part, whole)) is not None:
                add_numbers(key, PAIRED_SHARE_OF_FULL, share)
                confidences[key] = scores.confidence_keeps(part, whole, demanded_share)
        confidence_of_full = confidences.pop(full.key, None)
        name = confidence_keeps_name(demanded_share)
        for key, confidence in corrected(confidences).items():
            numbers[key][name] = confidence
        if confidence_of_full is not None:
            numbers[full.key][name] = confidence_of_full

        differences = [scores.difference(n, number_of_full).resolvable for n in others.values()]
        shares = [paired.share_differing(axes.quality, key, full.key) for key in others]
        basis = replace(basis, resolvable=median(differences), share_differing=median(shares))

    # Without scores of all candidates none is sure to be on the front: the others could beat it.
    candidates = [model for model in front.placed if model.is_candidate]
    if scores is not None and all(model.key in runs for model in candidates):
        confidences = _confidences_on_front(candidates, scores, number_of, axes)
        confidences = corrected(confidences)
        for model in candidates:
            numbers[model.key][CONFIDENCE_ON_FRONT] = confidences.get(model.key, 1.0)

    # Trials say only how large the error over the items is in each seed.
    errors = {model.key: model.error for model in front.placed}
    if scores is not None:
        for key, number in number_of.items():
            errors[key] = scores.score(number).error
            numbers[key][stderr_name(axes.quality)] = scores.score(number).error
    placed = [
        replace(model.with_numbers(numbers[model.key]), error=errors[model.key])
        for model in front.placed
    ]
    return replace(
        front,
        placed=tuple(placed),
        intervals=intervals,
        basis=basis,
        paired=paired,
        demanded_share=demanded_share,
    )


def _confidences_on_front(
    candidates: Sequence[PlacedModel], scores: Scores, number_of: Mapping[str, int], axes: FrontAxes
) -> dict[str, float]:
    """Return key of a model -> how sure it is on the front; without those that none could beat.

    A model is on the front if it is better than each that costs no more. That all of this is true
    is as sure as the least sure part of it (Berger, Technometrics 24, 1982).
    """
    confidences = {}
    for model in candidates:
        leads = []
        for rival in candidates:
            if rival is not model and rival.cost <= model.cost:
                lead = scores.difference(number_of[model.key], number_of[rival.key])
                sure_above = lead.confidence_above()
                leads.append(sure_above if axes.higher_is_better else 1 - sure_above)
        if leads:
            confidences[model.key] = min(leads)
    return confidences


def sweep_front(
    workspace: Workspace,
    sweeps: Sequence[StoredSweep],
    axes: FrontAxes,
    *,
    demanded_share: float = DEMANDED_SHARE,
) -> tuple[Front, list[str]]:
    """Return the front of the results with the confidence of each place, and its notes.

    The notes are sentences on the default quality, if it is not the accuracy, and on models that
    are not shown or have no confidence. `demanded_share` is that of `with_confidence`. Models of
    several sweeps that share a name are named with their sweep.
    """
    front = find_front(_models_of(sweeps), axes)
    items = load_item_values(workspace, front.seeds)
    notes = item_notes(front.seeds, items)
    if axes.against_accuracy and axes.quality == BITS_PER_BYTE:
        notes.insert(0, axes.against_accuracy)
    front = with_confidence(front, items, demanded_share=demanded_share)
    if len(sweeps) == 1 and (bounds := sweeps[0].retention):
        front = _with_losses(front, bounds)
        reference = retention_reference(front)
        role = reference.role if reference else SOURCE
        notes.append(bounds_sentence(bounds, front.losses.values(), role))
    return front, notes


def _models_of(sweeps: Sequence[StoredSweep]) -> list[ModelResult]:
    """Return the models of sweeps, each once, for the first sweep that has it."""
    if len(sweeps) == 1:
        return model_results(sweeps[0].results)
    model_of: dict[str, ModelResult] = {}
    for sweep in sweeps:
        for model in model_results(sweep.results):
            model_of.setdefault(model.key, replace(model, sweep=sweep.name))
    models = with_overhead([*model_of.values()])
    count_of_label = Counter(model.label for model in models)
    return [
        replace(model, label=f"{model.label} ({model.sweep})")
        if count_of_label[model.label] > 1
        else model
        for model in models
    ]


def _with_losses(front: Front, bounds: Mapping[str, float]) -> Front:
    """Return the front with what its models have lost, as far as it is known."""
    reference = retention_reference(front)
    if reference is None or front.paired is None:
        return front
    if reference.key not in front.paired.number_of:
        return front
    return replace(front, losses=find_losses(front.paired, reference.key, bounds))


def retention_reference(front: Front) -> PlacedModel | None:
    """Return the model that others must not lose much against: the source of the teacher, or a
    plain teacher; None if there is neither."""
    for model in front.placed:
        if model.role == SOURCE:
            return model
    for model in front.placed:
        if model.role == "teacher" and not model.config.corrections.num_corrections:
            return model
    return None
