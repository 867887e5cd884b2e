"""The Pareto front: which models no other one beats on cost and quality, and how sure that is.

A front is the table of results with columns that place each model on two axes. Beside a teacher,
baselines are placed but do not compete: the front tells which schedule to take, and
`members_beaten_by` whether that was worth it. Without a teacher all models compete. Costs are
exact, so only quality is uncertain: `with_confidence` adds columns that say how sure each place
is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Any

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
    StoredSweep,
    item_notes,
    load_item_values,
    result_table,
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

if TYPE_CHECKING:
    from pandas import DataFrame

MIN_RIGHT_ANSWERS = 30
"""With fewer right answers of the full model, accuracy is not the default quality."""
MAX_TIME_SPREAD = 0.1
"""Share of the time per token above which it decides nothing."""

Row = dict[str, Any]
"""A model: the columns of the table by name."""


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

    They are where every model has them, and the accuracy cannot tell models apart: the full model
    has too few right answers, or the loss of accuracy is less well known than it may be large.

    Args:
        workspace: Holds the values of single items.
        trials: Models with what was measured.
        demanded_share: Share of the full model's quality that a model must keep.
    """
    full = teacher_or_costliest(trials, role=lambda trial: trial.role, cost=_nfe)
    if full is None or any(BITS_PER_BYTE not in trial.numbers for trial in trials):
        return ""
    evaluation = load_item_values(workspace, [full]).get(full.key)
    if evaluation is None or not evaluation.accuracies:
        return ""
    num_right = 0
    for result in evaluation.averaged.values():
        if result.accuracy_metric:
            num_right += round(result.metrics[result.accuracy_metric] * result.num_items)
    if num_right < MIN_RIGHT_ANSWERS:
        return (
            f"Quality is bits per byte, because {full.name} answers {num_right} of "
            f"{evaluation.num_accuracy_items:,} items right, too few to tell models apart by "
            f"their accuracy (fewer than {MIN_RIGHT_ANSWERS}); `--quality accuracy` shows it."
        )

    # The interval of what cheaper models lose: of the median, as some may answer all items alike.
    cheaper = [
        trial for trial in trials if trial.role not in BASELINE_ROLES and _nfe(trial) < _nfe(full)
    ]
    items = load_item_values(workspace, [full, *cheaper])
    paired = pair_scores({key: [evaluation] for key, evaluation in items.items()})
    scores = paired.quality(ACCURACY) if paired and len(items) > 1 else None
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
        f"Quality is bits per byte, because {paired.num_items(ACCURACY):,} items tell the accuracy "
        f"that a cheaper model loses only within {100 * width:.1f} points ({INTERVAL_LEVEL:.0%} "
        f"interval over the items, median of the models), and to keep {100 * demanded_share:.4g}% "
        f"allows to lose {100 * allowed:.1f}; `--quality accuracy` shows it."
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


@dataclass(frozen=True, eq=False)
class Front:
    """The table of results on two axes, the placed models first, the cheapest before all."""

    axes: FrontAxes
    table: DataFrame
    """All models, from `result_table`, with a column `sweep` if there are several sweeps; and
    `cost`, `quality` and `error` on the axes (NaN if not measured), `goodness` (the quality with a
    sign such that higher is better), `is_placed` (has both metrics), `is_candidate` (competes for
    the front), `on_front`."""
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

    @cached_property
    def rows(self) -> list[Row]:
        """The placed models, cheapest first."""
        return _rows_of(self.table[self.table["is_placed"]])

    @cached_property
    def scores(self) -> Scores | None:
        """The scores of the front's quality by item, in the order of `paired`; None if there are
        none."""
        return self.paired.quality(self.axes.quality) if self.paired else None

    @cached_property
    def unmeasured(self) -> list[Row]:
        """The models that lack one of both metrics."""
        return _rows_of(self.table[~self.table["is_placed"]])

    @property
    def trials(self) -> list[Trial]:
        """All models, with means over their seeds, in the table's order."""
        return list(self.table["trial"])

    @cached_property
    def seeds(self) -> list[Trial]:
        """The trials whose means are placed."""
        return [seed for row in self.rows for seed in row["seeds"]]

    @cached_property
    def members(self) -> list[Row]:
        """The models on the front, cheapest first; equal ones are all members."""
        return [row for row in self.rows if row["on_front"]]

    @cached_property
    def full(self) -> Row | None:
        """The model to compare with: the teacher, else the costliest but for baselines."""
        return teacher_or_costliest(
            self.rows, role=lambda row: row["role"], cost=lambda row: row["cost"]
        )

    @cached_property
    def picks(self) -> dict[str, Row]:
        """Knee, best and cheapest by name; without those that do not exist.

        Of equal members, the best is the cheapest, and the cheapest the best. The knee lies
        farthest above the chord from cheapest to best, with both axes scaled to one.
        """
        if not self.members:
            return {}
        best = max(self.members, key=lambda row: (row["goodness"], -row["cost"]))
        cheapest = min(self.members, key=lambda row: (row["cost"], -row["goodness"]))
        picks = {"best": best, "cheapest": cheapest}
        if best["goodness"] <= cheapest["goodness"]:
            return picks  # Otherwise, of members, the best costs more than the cheapest.

        def above_chord(row: Row) -> float:
            gain = row["goodness"] - cheapest["goodness"]
            further_cost = row["cost"] - cheapest["cost"]
            gain_share = gain / (best["goodness"] - cheapest["goodness"])
            cost_share = further_cost / (best["cost"] - cheapest["cost"])
            return float((gain_share - cost_share) / math.sqrt(2))

        knee = max(self.members, key=above_chord)
        return {"knee": knee, **picks} if above_chord(knee) > 1e-12 else picks

    @property
    def named_picks(self) -> dict[str, Row]:
        """The picks that tables and pictures name: without a knee that keeps less than demanded."""
        picks = dict(self.picks)
        share = self.share_of_full(picks["knee"]) if "knee" in picks else None
        if share is not None and share < self.demanded_share:
            del picks["knee"]
        return picks

    @cached_property
    def sweeps(self) -> list[str]:
        """The sweeps of the models; empty if all are from one."""
        return list(dict.fromkeys(self.table["sweep"])) if "sweep" in self.table else []

    def share_of_full(self, row: Row) -> float | None:
        """Return a model's quality as a share of the full model's, 1.0 for all of it.

        For a loss: the full model's loss over this model's. This is over all items of each model;
        `paired/share_of_full` is over those that all models answered, and has an interval.
        """
        if self.full is None:
            return None
        if self.axes.higher_is_better:
            part = row["quality"]
            whole = self.full["quality"]
        else:
            part = self.full["quality"]
            whole = row["quality"]
        return float(part / whole) if whole else None

    def confidence_keeps(self, row: Row) -> float | None:
        """Return the confidence that a model keeps `demanded_share`; None if it is not known."""
        return known(row, confidence_keeps_name(self.demanded_share))

    def cheapest_keeping(self, demanded_share: float) -> Row | None:
        """Return the cheapest member that keeps this share of the full model's quality."""
        members = [
            row for row in self.members if (self.share_of_full(row) or 0.0) >= demanded_share
        ]
        return min(members, key=lambda row: row["cost"], default=None)

    def members_beaten_by(self, baseline: Row) -> list[Row]:
        """Return the members that are no better and no cheaper than a baseline, and worse in one.

        Unlike domination among candidates, this takes no member off the front.
        """
        return [
            row
            for row in self.members
            if baseline["cost"] <= row["cost"]
            and baseline["goodness"] >= row["goodness"]
            and (baseline["cost"], baseline["quality"]) != (row["cost"], row["quality"])
        ]

    def verdict(self, row: Row) -> str:
        """Return a model's place: on the front, with its picks, or what a baseline beats."""
        if not row["is_placed"]:
            return "not measured"
        if not row["is_candidate"]:
            num_beaten = len(self.members_beaten_by(row))
            return f"beats {num_beaten} ●" if num_beaten else ""
        if not row["on_front"]:
            return ""
        return " ".join(["●", *(name for name, pick in self.named_picks.items() if pick is row)])

    def on(self, axes: FrontAxes) -> Front:
        """Return the same models on other axes, with the confidences that hold there, too.

        These are the differences of the same quality. Whether a model is on the front depends on
        the cost as well.
        """
        is_same_quality = axes.quality == self.axes.quality
        of_quality = (PAIRED_SHARE_OF_FULL, confidence_keeps_name(self.demanded_share))
        still_true = of_quality if is_same_quality else ()
        of_old_axes = [
            name for name in self.table if name.startswith(PAIRED) and name not in still_true
        ]
        front = find_front(self.table.drop(columns=of_old_axes), axes)
        front = replace(front, losses=self.losses)
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
        tracked = result_table(trials).loc[self.table.index]
        names = ["trial", "seeds", "run_id"]
        return replace(self, table=self.table.assign(**{name: tracked[name] for name in names}))


def _rows_of(table: DataFrame) -> list[Row]:
    """Return the rows with the columns' own values."""
    # `DataFrame.to_dict` takes several times as long, and a page has a front for each two axes.
    if table.empty:
        return []
    columns = {str(name): column.tolist() for name, column in table.items()}
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def busy_machine(rows: Iterable[Row]) -> str | None:
    """Return that times per token decide nothing, because a model's vary too much; None if not."""
    relative_spreads = {row["label"]: relative_time_spread(row) or 0.0 for row in rows}
    # Sorted: a teacher and its unpruned student are timed as one model, in any order of the rows.
    labels = sorted(relative_spreads)
    label = max(labels, key=lambda name: relative_spreads[name], default="")
    if not label or relative_spreads[label] <= MAX_TIME_SPREAD:
        return None
    return (
        f"the machine was busy: the time per token of {label} varies by "
        f"{relative_spreads[label]:.0%}; "
        "`iiet-orch report --time-again` measures once more"
    )


def relative_time_spread(row: Row) -> float | None:
    """Return how much a model's time per token varied, as a share of it; None if it is unknown."""
    time = known(row, DECODE_MS)
    spread = known(row, DECODE_MS_SPREAD)
    return spread / time if time and spread is not None else None


def known(row: Row, name: str) -> float | None:
    """Return a number of a model by its tracked name; None if it is not known."""
    value = row.get(name)
    return None if value is None or math.isnan(value) else float(value)


def plain_rivals(rows: Iterable[Row], teacher: Row) -> list[Row]:
    """Return the baselines that a teacher's corrections must beat: of its shape, without
    corrections, and trained on no more tokens than it, if that is known. None of a plain teacher,
    which has no corrections that could gain anything."""
    if not teacher["trial"].model.corrections.num_corrections:
        return []
    teacher_tokens = known(teacher, TRAINING_TOKENS)
    rivals = []
    for row in rows:
        if row["role"] != "baseline" or known(row, OVERHEAD_NFE) != 0:
            continue
        if shape_of(row["trial"].model) != shape_of(teacher["trial"].model):
            continue
        tokens = known(row, TRAINING_TOKENS)
        if teacher_tokens is None or tokens is None or tokens <= teacher_tokens:
            rivals.append(row)
    return rivals


def find_front(table: DataFrame, axes: FrontAxes | None = None) -> Front:
    """Place models on two axes, NFE and accuracy by default, and find those that none beats.

    Args:
        table: Trials, teacher and baselines, from `result_table`.
        axes: Cost and quality.
    """
    import pandas

    axes = axes or FrontAxes()
    names = {"cost": axes.cost, "quality": axes.quality, "error": stderr_name(axes.quality)}
    numbers = {n: table[m].astype(float) if m in table else math.nan for n, m in names.items()}
    table = table.assign(**numbers)
    has_teacher = (table["role"] == "teacher").any()
    is_placed = table["cost"].notna() & table["quality"].notna()
    is_candidate = is_placed & (~table["role"].isin(BASELINE_ROLES) | (not has_teacher))
    table = table.assign(
        goodness=table["quality"] if axes.higher_is_better else -table["quality"],
        is_placed=is_placed,
        is_candidate=is_candidate,
        on_front=False,
    )
    if is_candidate.any():
        candidates = table[is_candidate]
        is_member = on_front(candidates["cost"].to_numpy(), candidates["goodness"].to_numpy())
        table.loc[is_candidate, "on_front"] = is_member
    placed = table[is_placed].sort_values(["cost", "goodness", "key"])
    return Front(axes, pandas.concat([placed, table[~is_placed]]))


def on_front(costs: Floats, goodness: Floats) -> NDArray[np.bool_]:
    """Return which models are on the front.

    A model is on the front if it is better than all cheaper ones, and as good as any that costs as
    much; equal models all are.
    """
    is_member = np.zeros(len(costs), dtype=bool)
    best_of_cheaper = -np.inf
    for cost in np.unique(costs):
        models = np.flatnonzero(costs == cost)
        best = goodness[models].max()
        is_member[models] = (goodness[models] == best) & (best > best_of_cheaper)
        best_of_cheaper = max(best, best_of_cheaper)
    return is_member


def with_confidence(
    front: Front,
    items: Mapping[str, EvaluationResult],
    *,
    demanded_share: float = DEMANDED_SHARE,
) -> Front:
    """Return the front with the confidence of each place.

    It has `paired`, `intervals`, and columns `paired/...`: the share of the full model's quality,
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
    from pandas import DataFrame

    rows = front.rows
    full = front.full
    axes = front.axes
    runs = {
        row["key"]: [items[seed.key] for seed in row["seeds"]]
        for row in rows
        if all(seed.key in items for seed in row["seeds"])
    }
    paired = pair_scores(runs) if full and len(runs) > 1 else None
    if full is None or paired is None:
        return replace(front, demanded_share=demanded_share)
    scores = paired.quality(axes.quality)
    number_of = paired.number_of
    # Label -> number of the models that all are compared with, the full model first.
    beside_full = [row for row in rows if row["role"] in BASELINE_ROLES and row is not full]
    compared_with: dict[str, int] = {}
    for row in (full, *beside_full):
        if row["key"] in number_of:
            compared_with[row["label"]] = number_of[row["key"]]

    last_parts = difference_names(compared_with)

    # Columns of a model, and intervals, on the front's quality and on each task.
    intervals: dict[tuple[str, str, str], Interval] = {}
    columns: dict[str, dict[str, float]] = {key: {} for key in number_of}

    def add_columns(key: str, name: str, interval: Interval) -> None:
        low_name, high_name = interval_end_names(name)
        columns[key][name] = interval.value
        columns[key][low_name] = interval.low
        columns[key][high_name] = interval.high

    measured = {**({} if scores is None else {axes.quality: scores}), **paired.scores}
    for (key, number), (name, scores_of_name) in product(number_of.items(), measured.items()):
        intervals[key, name, ""] = scores_of_name.score(number).interval()
        of_task = PAIRED if name == axes.quality else f"{PAIRED}{name}/"
        for label, number_of_label in compared_with.items():
            if number_of_label != number:
                difference = scores_of_name.difference(number, number_of_label).interval()
                intervals[key, name, label] = difference
                add_columns(key, of_task + last_parts[label], difference)

    basis = ConfidenceBasis(
        full["label"],
        paired.metrics,
        num_items=paired.num_items(axes.quality),
        num_left_out=sum(paired.left_out.values()),
        num_seeds=max(len(row["seeds"]) for row in rows),
        num_models=len(number_of) - (full["key"] in number_of),
    )
    if scores is not None and full["key"] in number_of:
        number_of_full = number_of[full["key"]]
        others = {key: number for key, number in number_of.items() if number != number_of_full}

        # The share of the full model's quality, and how sure a model keeps the demanded share.
        confidences = {}
        for key, number in number_of.items():
            # For a loss, the full model's over this one's, as in `Front.share_of_full`.
            part, whole = number, number_of_full
            if not axes.higher_is_better:
                part, whole = whole, part
            if (share := scores.share(part, whole)) is not None:
                add_columns(key, PAIRED_SHARE_OF_FULL, share)
                confidences[key] = scores.confidence_keeps(part, whole, demanded_share)
        confidence_of_full = confidences.pop(full["key"], None)
        name = confidence_keeps_name(demanded_share)
        for key, confidence in corrected(confidences).items():
            columns[key][name] = confidence
        if confidence_of_full is not None:
            columns[full["key"]][name] = confidence_of_full

        differences = [scores.difference(n, number_of_full).resolvable for n in others.values()]
        shares = [paired.share_differing(axes.quality, key, full["key"]) for key in others]
        basis = replace(basis, resolvable=median(differences), share_differing=median(shares))

    # Without scores of all candidates none is sure to be on the front: the others could beat it.
    candidates = [row for row in rows if row["is_candidate"]]
    if scores is not None and all(row["key"] in runs for row in candidates):
        confidences = _confidences_on_front(candidates, scores, number_of, axes)
        confidences = corrected(confidences)
        for row in candidates:
            columns[row["key"]][CONFIDENCE_ON_FRONT] = confidences.get(row["key"], 1.0)
    table = front.table.join(DataFrame.from_dict(columns, orient="index").sort_index(axis=1))
    if scores is not None:
        # Trials say only how large the error over the items is in each seed.
        errors = {key: scores.score(number).error for key, number in number_of.items()}
        error = table["key"].map(errors).fillna(table["error"]).astype(float)
        table = table.assign(**{"error": error, stderr_name(axes.quality): error})
    return replace(
        front,
        table=table,
        intervals=intervals,
        basis=basis,
        paired=paired,
        demanded_share=demanded_share,
    )


def _confidences_on_front(
    candidates: Sequence[Row], scores: Scores, number_of: Mapping[str, int], axes: FrontAxes
) -> dict[str, float]:
    """Return key of a model -> how sure it is on the front; without those that none could beat.

    A model is on the front if it is better than each that costs no more. That all of this is true
    is as sure as the least sure part of it (Berger, Technometrics 24, 1982).
    """
    confidences = {}
    for row in candidates:
        leads = []
        for rival in candidates:
            if rival is not row and rival["cost"] <= row["cost"]:
                lead = scores.difference(number_of[row["key"]], number_of[rival["key"]])
                sure_above = lead.confidence_above()
                leads.append(sure_above if axes.higher_is_better else 1 - sure_above)
        if leads:
            confidences[row["key"]] = min(leads)
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
    import pandas

    table = pandas.concat(
        [result_table(sweep.results).assign(sweep=sweep.name) for sweep in sweeps]
    )
    table = table[~table.index.duplicated()]
    if len(sweeps) == 1:
        table = table.drop(columns="sweep")
    else:
        table = with_overhead(table)
        is_shared = table["label"].duplicated(keep=False)
        table.loc[is_shared, "label"] += " (" + table["sweep"] + ")"
    front = find_front(table, axes)
    items = load_item_values(workspace, front.seeds)
    notes = item_notes(front.seeds, items)
    if axes.against_accuracy and axes.quality == BITS_PER_BYTE:
        notes.insert(0, axes.against_accuracy)
    front = with_confidence(front, items, demanded_share=demanded_share)
    if len(sweeps) == 1 and (bounds := sweeps[0].retention):
        front = _with_losses(front, bounds)
        reference = retention_reference(front)
        role = reference["role"] if reference else SOURCE
        notes.append(bounds_sentence(bounds, front.losses.values(), role))
    return front, notes


def _with_losses(front: Front, bounds: Mapping[str, float]) -> Front:
    """Return the front with what its models have lost, as far as it is known."""
    reference = retention_reference(front)
    if reference is None or front.paired is None:
        return front
    key = reference["key"]
    if key not in front.paired.number_of:
        return front
    return replace(front, losses=find_losses(front.paired, key, bounds))


def retention_reference(front: Front) -> Row | None:
    """Return the model that others must not lose much against: the source of the teacher, or a
    plain teacher; None if there is neither."""
    for row in front.rows:
        if row["role"] == SOURCE:
            return row
    for row in front.rows:
        if row["role"] == "teacher" and not row["trial"].model.corrections.num_corrections:
            return row
    return None
