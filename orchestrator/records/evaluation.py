"""What an evaluation found: metrics of each task with their standard errors, and the averages that
a front shows.

Every number here follows from per-item values, which are kept: they serve paired comparisons of two
models over the same items, where most of the noise cancels. Standard errors are analytic (no
bootstrap: 0 seconds instead of several per task): s / sqrt(n) for means, by the delta method for
what is a function of means.

    accuracy   = mean over the requested tasks of acc_norm where a task reports it, acc elsewhere; a
    group counts as one its error  = sqrt(sum of squared errors) / number of tasks, tasks taken as
    independent
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.workspace.errors import UserError, shortened

ACCURACY_METRICS = ("acc_norm", "acc", "exact_match")
"""Which of a task's metrics is its accuracy: the first that it reports."""

BITS_METRIC = "bits_per_byte"
STDERR_SUFFIX = "_stderr"

Values = Sequence[float] | Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task under one model."""

    name: str
    """The task's name in lm-eval."""
    version: str
    """The version that the task states; part of what its numbers mean."""
    num_items: int
    """Documents that were scored."""
    num_fewshot: int
    """Solved examples before each item."""
    metrics: dict[str, float]
    """Metric to value, and `METRIC_stderr` to its standard error where one is known."""
    items: list[str]
    """A hash of each document, in order: equal hashes are equal items."""
    values: dict[str, list[Any]]
    """Metric to one value per item; a pair (log-likelihood, weight) for those per byte or word."""
    log_likelihoods: list[list[float]]
    """Per item, the log-likelihood of each of its continuations, in nats."""

    @property
    def accuracy_metric(self) -> str | None:
        """The metric that counts as accuracy; None where the task has none."""
        return next((name for name in ACCURACY_METRICS if name in self.metrics), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskResult:
        """Rebuild a stored result.

        Raises:
            UserError: If it does not have this version's fields.
        """
        try:
            found = cls(**values)
            for number in found.metrics.values():
                float(number)
            dict(found.values)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"no readable evaluation ({shortened(str(error))}); delete it and evaluate again"
            ) from None
        return found


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """All tasks of an evaluation."""

    results: dict[str, TaskResult]
    """By name of the task."""
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What was asked for by the name of a group or tag, and the tasks behind it."""
    skipped: dict[str, str] = field(default_factory=dict)
    """What was asked for and could not be run, with the reason."""

    @property
    def tasks(self) -> dict[str, dict[str, float]]:
        """Metrics by task."""
        return {name: result.metrics for name, result in self.results.items()}

    @property
    def num_items(self) -> int:
        """Items of all tasks together."""
        return sum(result.num_items for result in self.results.values())

    @property
    def num_accuracy_items(self) -> int:
        """Items of the tasks that have an accuracy."""
        return sum(r.num_items for name, r in self.results.items() if self._accuracy_of(name))

    @property
    def accuracies(self) -> dict[str, tuple[float, float]]:
        """What goes into the average: name of a task or group to accuracy and standard error."""
        in_group = {name for names in self.groups.values() for name in names}
        parts = {name: (name,) for name in self.results if name not in in_group} | self.groups
        found = {}
        for name, members in parts.items():
            pairs = [pair for member in members if (pair := self._accuracy_of(member))]
            if pairs:
                found[name] = mean_and_error(pairs)
        return found

    @property
    def accuracy(self) -> float:
        """Mean accuracy; NaN if no task has one."""
        return mean_and_error(list(self.accuracies.values()))[0]

    @property
    def accuracy_stderr(self) -> float:
        """Standard error of the mean accuracy; NaN if no task has one."""
        return mean_and_error(list(self.accuracies.values()))[1]

    @property
    def bits_per_byte(self) -> float:
        """Mean bits per byte of the tasks that measure it; NaN if none does."""
        return self._bits()[0]

    @property
    def bits_per_byte_stderr(self) -> float:
        """Standard error of the mean bits per byte; NaN if no task measures it."""
        return self._bits()[1]

    def quality(self) -> dict[str, float]:
        """Return flat numbers for a trial's result: averages, `TASK/METRIC` of each; no NaN."""
        numbers = {
            name: getattr(self, name)
            for name in ("accuracy", "accuracy_stderr", BITS_METRIC, BITS_METRIC + STDERR_SUFFIX)
        }
        for task, metrics in self.tasks.items():
            numbers |= {f"{task}/{name}": value for name, value in metrics.items()}
        return {name: value for name, value in numbers.items() if not math.isnan(value)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the per-item ones included; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvaluationResult:
        """Rebuild a stored evaluation.

        Raises:
            UserError: If it does not have this version's fields.
        """
        try:
            results = {k: TaskResult.from_dict(v) for k, v in values["results"].items()}
            groups = {name: tuple(members) for name, members in values["groups"].items()}
            return cls(results=results, groups=groups, skipped=dict(values["skipped"]))
        except UserError:
            raise
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"no readable evaluation ({error!r}); evaluate again") from None

    def _accuracy_of(self, task: str) -> tuple[float, float] | None:
        result = self.results.get(task)
        metric = result.accuracy_metric if result else None
        if result is None or metric is None:
            return None
        return result.metrics[metric], result.metrics.get(metric + STDERR_SUFFIX, math.nan)

    def _bits(self) -> tuple[float, float]:
        having = [metrics for metrics in self.tasks.values() if BITS_METRIC in metrics]
        pairs = [(m[BITS_METRIC], m.get(BITS_METRIC + STDERR_SUFFIX, math.nan)) for m in having]
        return mean_and_error(pairs)


def mean_and_error(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Average values with independent standard errors; NaN and NaN if there are none."""
    if not pairs:
        return math.nan, math.nan
    mean = math.fsum(value for value, _ in pairs) / len(pairs)
    return mean, math.sqrt(math.fsum(error**2 for _, error in pairs)) / len(pairs)


def standard_error(aggregation: str, values: Values) -> float | None:
    """Return the standard error of a metric from its per-item values.

    Args:
        aggregation: lm-eval's name of how items become one number: mean, perplexity (`exp(-mean)`),
            weighted_perplexity (`exp(-sum a / sum b)` over pairs (a, b)) or bits_per_byte (the same
            ratio in bits).
        values: One per item.

    Returns:
        The error; None if the aggregation has none here or there are fewer than two items.
    """
    if len(values) < 2:
        return None
    if aggregation in ("mean", "perplexity"):
        numbers = [float(value) for value in values]  # type: ignore[arg-type]
        mean = math.fsum(numbers) / len(numbers)
        error = _error_of_mean([number - mean for number in numbers])
        return error if aggregation == "mean" else math.exp(-mean) * error
    if aggregation in ("weighted_perplexity", BITS_METRIC):
        pairs = [(float(a), float(b)) for a, b in values]  # type: ignore[misc]
        weight = math.fsum(b for _, b in pairs)
        ratio = math.fsum(a for a, _ in pairs) / weight
        # A ratio of sums, linearised: the error of the mean of (a - ratio b) / mean(b).
        error = _error_of_mean([(a - ratio * b) * len(pairs) / weight for a, b in pairs])
        return error / math.log(2) if aggregation == BITS_METRIC else math.exp(-ratio) * error
    return None


def _error_of_mean(deviations: Sequence[float]) -> float:
    n = len(deviations)
    return math.sqrt(math.fsum(d * d for d in deviations) / (n - 1) / n)
