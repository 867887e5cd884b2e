"""Does influence name the corrections that matter? Rank correlations with what dropping them costs.

Dropping correction i of layer l means what pruning does: the layer stops after i-1 corrections, so
its later ones are dropped, too; all other layers keep theirs. The cost is the accuracy lost, or for
text the rise of the loss. Pruning acts on suffix maxima of the influence, so they are ranked, too.
What counts in the end is how good the schedules are that a metric chooses: they are measured
without training, and averaged over all budgets of corrections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from statistics import StatisticsError, correlation, fmean
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from iiet.influence import InfluenceTable
from iiet.pruning import schedule_family
from iiet.schedule import IterationSchedule

MIN_CORRECTIONS = 10
"""With fewer, a difference between the correlations of two metrics says little."""


@dataclass(frozen=True)
class InfluenceCheck:
    """The influence of a model's corrections by every metric, and what dropping each one costs."""

    tables: Mapping[str, InfluenceTable]
    """One table per metric, `loss` among them."""
    pruned: Mapping[IterationSchedule, float]
    """Accuracy, or for text loss, of the same weights under each schedule of each metric's
    family."""

    @property
    def names(self) -> list[tuple[int, int]]:
        """Layer and number of each correction, from 1."""
        rows = self.tables["loss"].rows()
        return [(layer, i) for layer, row in enumerate(rows, 1) for i in range(1, len(row) + 1)]

    @property
    def has_accuracy(self) -> bool:
        """Whether costs are accuracies, not losses."""
        return bool(self.tables["loss"].accuracy_lost_rows)

    @property
    def cost_name(self) -> str:
        """What the costs are, with their unit."""
        return "accuracy lost (points)" if self.has_accuracy else "rise of the loss (nats)"

    @property
    def pruned_name(self) -> str:
        """What `pruned_quality` is, with its unit."""
        return "accuracy when pruned (%)" if self.has_accuracy else "loss when pruned (nats)"

    @cached_property
    def costs(self) -> list[float]:
        """What dropping each correction and the later ones of its layer costs."""
        table = self.tables["loss"]
        if self.has_accuracy:
            return [100 * lost for lost in chain(*table.accuracy_lost_rows)]
        return list(chain(*table.rows()))

    def influences(self, metric: str) -> list[float]:
        """Return the influence of each correction."""
        return list(chain(*self.tables[metric].rows()))

    def correlations(self, metric: str) -> tuple[float, float]:
        """Return the rank correlation of influence and cost, and that of the suffix maxima."""
        maxima = list(chain(*self.tables[metric].suffix_maxima()))
        influences = self.influences(metric)
        return rank_correlation(influences, self.costs), rank_correlation(maxima, self.costs)

    def pruned_quality(self, metric: str) -> float:
        """Return the mean over all budgets (0, 1, ... corrections in all): each has the accuracy,
        or for text the loss, of the best schedule of the metric's family within the budget.
        """
        best = max if self.has_accuracy else min
        family = [member.schedule for member in schedule_family(self.tables[metric])]
        budgets = range(len(self.costs) + 1)
        return fmean(
            best(self.pruned[one] for one in family if one.num_corrections <= budget)
            for budget in budgets
        )

    def notes(self) -> list[str]:
        """Return what a reader must know to judge the correlations."""
        count = len(self.costs)
        sentences = [
            "The cost is that of stopping the layer before the correction: its later corrections "
            "are dropped, too, all other layers are full.",
            f"`{self.pruned_name}` is the mean over all budgets (0, 1, ... corrections in all) of "
            "the best schedule that thresholds of the metric give within the budget, without "
            "training.",
        ]
        if self.has_accuracy:
            sentences.append(
                "`loss` is the rise of the loss from the same stop, so it is nearly the cost "
                "itself. It takes a pass for each correction, the other metrics take one in all."
            )
        else:
            sentences.append("Text has no accuracy here: the cost is the metric `loss` itself.")
        if count < MIN_CORRECTIONS:
            sentences.append(
                f"{count} corrections are too few to decide between metrics: unrelated values "
                f"reach a correlation of {chance_correlation(count):.2f} (either sign) in about "
                "one of 20 models."
            )
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a correlation that does not exist is None."""
        return {
            "corrections": self.names,
            "cost": self.cost_name,
            "costs": self.costs,
            "influence": {metric: self.influences(metric) for metric in self.tables},
            "rank_correlation": {
                metric: [None if math.isnan(rho) else rho for rho in self.correlations(metric)]
                for metric in self.tables
            },
            "pruned": {str(schedule): quality for schedule, quality in self.pruned.items()},
            "pruned_quality": {metric: self.pruned_quality(metric) for metric in self.tables},
        }


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Compute Spearman's rank correlation; NaN if all values of one side are equal.

    Equal values share the mean of their ranks.
    """
    try:
        return correlation(_ranks(xs), _ranks(ys))
    except StatisticsError:  # A single pair, or no differences.
        return math.nan


def chance_correlation(count: int) -> float:
    """Return about the size of a rank correlation that unrelated values reach in 1 of 20 cases."""
    # Its standard deviation is 1/sqrt(count - 1).
    return min(1.96 / math.sqrt(count - 1), 1.0) if count > 1 else 1.0


def influence_check_table(check: InfluenceCheck) -> Group:
    """Return the influences and the cost of each correction, and the rank correlations."""
    metrics = list(check.tables)
    rows = Table(
        title=f"Influence and {check.cost_name}", title_justify="left", box=box.SIMPLE_HEAD
    )
    for head in ("layer,correction", *metrics, "cost of dropping"):
        rows.add_column(head, justify="right", no_wrap=True)
    columns = [check.influences(metric) for metric in metrics]
    for (layer, i), *influences, cost in zip(check.names, *columns, check.costs, strict=True):
        rows.add_row(f"{layer},{i}", *(f"{value:.2g}" for value in influences), f"{cost:.3g}")
    title = "Rank correlation (Spearman) with the cost, and what pruning by the metric leaves"
    ranks = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("metric", "influence", "suffix maxima", check.pruned_name):
        ranks.add_column(head, justify="left" if head == "metric" else "right", no_wrap=True)
    for metric in metrics:
        quality = check.pruned_quality(metric)
        text = f"{100 * quality:.1f}" if check.has_accuracy else f"{quality:.4f}"
        ranks.add_row(metric, *map(correlation_text, check.correlations(metric)), text)
    return Group(rows, ranks)


def correlation_text(rho: float) -> str:
    """Return a correlation with its sign; a dash if it does not exist."""
    return "-" if math.isnan(rho) else f"{rho:+.2f}"


def _ranks(values: Sequence[float]) -> list[float]:
    # The mean rank of equal values lies in the middle between the numbers of smaller values and of
    # values that are not larger.
    return [
        (sum(other < value for other in values) + sum(other <= value for other in values) + 1) / 2
        for value in values
    ]
