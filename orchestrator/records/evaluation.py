"""What is measured of a model, and the results: each task's metrics, errors and averages.

`Suite` describes a measurement. `evaluate` and the trials of a sweep make it by the same function
(`make_suite` in `evaluation/tasks.py`). Two evaluations are the same if their models and
`Suite.result_key` are equal.

Per-item values are stored for paired comparisons of two models on the same items, in which most of
the noise cancels. Standard errors are analytic, not bootstrapped (0 seconds instead of several per
task): s / sqrt(n) for means, the delta method for functions of means.

    accuracy = mean over the requested tasks of acc_norm if a task reports it, else acc, else
               exact_match under the task's first filter (a group counts as one task)
    error    = sqrt(sum of squared errors) / number of tasks, for independent tasks
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field, SerializerFunctionWrapHandler, model_serializer

from orchestrator.records.metrics import STDERR_SUFFIX, stderr_name
from orchestrator.records.record import Record, WorkspacePath
from orchestrator.settings.evaluation import Prompts
from orchestrator.settings.training import Precision
from orchestrator.workspace.provenance import content_key

ACCURACY_METRICS = ("acc_norm", "acc", "exact_match")
"""A task's accuracy is the first of these that it reports."""

FILTER_MARK = ":"
"""Stands between a metric and the name of a task's filter."""

HASH_LENGTH = 16
"""Digits that are kept of lm-eval's hash of a document."""

NO_FILTER = "none"
"""lm-eval's name of the filter of tasks that name none."""

BITS_METRIC = "bits_per_byte"
MAX_PERPLEXITY = 1e6
"""Largest perplexity in tables and MLflow; a larger one only shows that a model guesses. lm-eval's
stored results have it."""

Values = Sequence[float] | Sequence[tuple[float, float]]


_UNAVERAGED = AliasChoices("unaveraged", "beside")
"""Names of a field in stored files: the second one is in those of earlier versions."""


class Suite(Record):
    """What is measured of a model: tasks, their prompts, and the model's precision and context.

    All fields are part of `key`, except folders, whose names end with `_folder`: they differ
    between machines.
    """

    tokens_folder: WorkspacePath = ""
    """Prepared tokens, for the validation loss and the held-out tasks."""
    tokens: str = ""
    """Fingerprint of these tokens."""
    tasks: tuple[str, ...] = ()
    """Names of tasks, groups or tags; if empty, all tasks of the two folders below."""
    suite: str = ""
    """Key of the held-out tasks; empty if none are measured."""
    suite_folder: WorkspacePath = ""
    """Folder of the held-out tasks, which take precedence over all others; empty without any."""
    include_folder: WorkspacePath = ""
    """The user's folder of task files, which take precedence over lm-eval's own."""
    batch_size: int = 32
    """Sequences in one forward pass."""
    limit: int | None = None
    """Score only this many items of each task."""
    sequence_length: int | None = None
    """Most tokens that a model reads at once; its context length when unset."""
    num_fewshot: int | None = None
    """Solved examples before each item, unless a task fixes 0; if unset, the task's own number."""
    prompts: Prompts | None = None
    """How items become prompts, if not as in the tasks' files."""
    precision: Precision | None = "fp32"
    """Precision of weights and arithmetic; when unset, bf16 on GPUs that have it, else fp32. Trials
    have it set."""
    fingerprints: dict[str, str] | None = None
    """Task -> hash of its items and metrics, as found when a sweep was planned, without held-out
    tasks. All models of the sweep are measured on exactly these tasks."""
    unaveraged: tuple[str, ...] | None = Field(default=None, validation_alias=_UNAVERAGED)
    """Tasks that are measured but are in no average: those of `evaluation.retention` that
    `evaluation.suite` does not name."""
    python_text: str | None = None
    """Hash of the passages of Python's help topics, if they are measured."""
    vocabulary: str | None = None
    """Hash of the tokenizer files of an imported teacher."""
    vocabulary_folder: WorkspacePath | None = None
    """Folder of these files."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # These fields were added later: at None they are absent, so that keys are those of earlier
        # versions. The others are part of the key even if they are None.
        absent_at_none = (
            "sequence_length",
            "prompts",
            "fingerprints",
            "unaveraged",
            "python_text",
            "vocabulary",
            "vocabulary_folder",
        )
        return {
            name: value
            for name, value in dump(self).items()
            if value is not None or name not in absent_at_none
        }

    @property
    def key(self) -> str:
        """Hash of what is measured; a trial's key is that of its weights and this one."""
        values = self.model_dump(mode="json")
        if self.unaveraged is not None:  # Keys were made when the field had this name.
            values["beside"] = values.pop("unaveraged")
        if self.limit is not None:
            # Earlier trials, whose loss had no limit, have other keys.
            values["limits_loss"] = True
        return content_key({k: v for k, v in values.items() if not k.endswith("_folder")})

    @property
    def heldout(self) -> Path | None:
        """Folder of the held-out tasks; None without any."""
        return Path(self.suite_folder) if self.suite_folder else None

    @property
    def task_folders(self) -> tuple[Path, ...]:
        """The user's folder of task files, if there is one."""
        return (Path(self.include_folder),) if self.include_folder else ()

    def task_fingerprint(self, content: str) -> str:
        """Return the hash of a task with the prompts of this suite.

        Args:
            content: Hash of the task's items, metrics and solved examples.
        """
        return content_key(content, self.prompts.key) if self.prompts else content

    def result_key(
        self,
        model_key: Sequence[str],
        fingerprint: str,
        *,
        precision: Precision,
        context_length: int,
        limit: int | None = None,
        opening: Sequence[int] = (),
    ) -> str:
        """Return the key under which the result of one task of one model is stored.

        Args:
            model_key: `OpenedModel.key`.
            fingerprint: Hash of the task.
            precision: Precision of this suite, else of the device.
            context_length: The model's context length.
            limit: Limit of this suite, for tasks whose items it limits.
            opening: Tokens at the beginning of each text, as in the training.
        """
        length = self.sequence_length or context_length
        # Usual values are left out, so that keys of earlier versions stay valid.
        unusual: list[Any] = []
        if length != context_length:
            unusual.append(length)
        if opening:
            unusual.append(list(opening))
        return content_key("evaluation", [*model_key, precision], fingerprint, limit, *unusual)


class TaskResult(Record):
    """Result of one task for one model."""

    name: str
    """The task's name in lm-eval."""
    version: str
    """Version of the task."""
    num_items: int = 0
    """Documents that were scored."""
    num_fewshot: int = 0
    """Solved examples before each item."""
    metrics: dict[str, float]
    """Metric to value, and `METRIC_stderr` to its standard error if known. Where a task filters
    the answers before they are compared, one metric per filter: `exact_match:strict-match`."""
    items: list[str] = Field(default_factory=list)
    """A hash of each document, in order; equal hashes mean equal items."""
    values: dict[str, list[Any]] = Field(default_factory=dict)
    """Metric to one value per item; pairs (log-likelihood, weight) for metrics per byte or word."""

    @property
    def accuracy_metric(self) -> str | None:
        """The metric that counts as accuracy; None if the task has none."""
        return accuracy_among(name for name in self.metrics if not name.endswith(STDERR_SUFFIX))

    def value_and_error(self, metric: str | None) -> tuple[float, float] | None:
        """Return a metric and its standard error (NaN if unknown); None if it is not reported."""
        if metric is None or metric not in self.metrics:
            return None
        return self.metrics[metric], self.metrics.get(stderr_name(metric), math.nan)


class EvaluationKeys(Record):
    """Where the results of an evaluation are stored."""

    tasks: dict[str, str]
    """Task to its key in the store of evaluations."""
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Requested group or tag, and its tasks."""
    skipped: dict[str, str] = Field(default_factory=dict)
    """Requested task that could not run, and the reason."""
    unaveraged: tuple[str, ...] = Field(default=(), validation_alias=_UNAVERAGED)
    """Tasks that are in no average."""


class EvaluationResult(Record):
    """All tasks of an evaluation."""

    results: dict[str, TaskResult]
    """Task name to result."""
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Requested group or tag, and its tasks."""
    skipped: dict[str, str] = Field(default_factory=dict)
    """Requested task that could not run, and the reason."""
    unaveraged: tuple[str, ...] = Field(default=(), validation_alias=_UNAVERAGED)
    """Tasks that are in no average."""

    @property
    def averaged(self) -> dict[str, TaskResult]:
        """The tasks that are in averages, by name."""
        results = self.results.items()
        return {name: result for name, result in results if name not in self.unaveraged}

    @property
    def metrics_by_task(self) -> dict[str, dict[str, float]]:
        """Name of a task -> its metrics."""
        return {name: result.metrics for name, result in self.results.items()}

    @property
    def num_items(self) -> int:
        """Items of all tasks together."""
        return sum(result.num_items for result in self.results.values())

    @property
    def num_accuracy_items(self) -> int:
        """Items of the tasks that have an accuracy in the average."""
        averaged = self.averaged.values()
        return sum(result.num_items for result in averaged if result.accuracy_metric)

    @property
    def accuracies(self) -> dict[str, tuple[float, float]]:
        """Terms of the average: task or group -> its accuracy and standard error."""
        in_group = {name for names in self.groups.values() for name in names}
        tasks = {name: (name,) for name in self.averaged if name not in in_group}
        accuracies = {}
        for name, members in (tasks | self.groups).items():
            results = [self.results[member] for member in members if member in self.results]
            pairs = [result.value_and_error(result.accuracy_metric) for result in results]
            if reported := [pair for pair in pairs if pair]:
                accuracies[name] = mean_and_error(reported)
        return accuracies

    @property
    def accuracy(self) -> float:
        """Mean accuracy; NaN if no task has one."""
        return mean_and_error(list(self.accuracies.values()))[0]

    def quality(self) -> dict[str, float]:
        """Return flat numbers for a trial's result: averages and `TASK/METRIC`, without NaN."""
        bits = [result.value_and_error(BITS_METRIC) for result in self.averaged.values()]
        averages = {
            "accuracy": list(self.accuracies.values()),
            BITS_METRIC: [pair for pair in bits if pair],
        }
        numbers = {}
        for name, pairs in averages.items():
            numbers[name], numbers[stderr_name(name)] = mean_and_error(pairs)
        for task, metrics in self.metrics_by_task.items():
            numbers |= {f"{task}/{name}": value for name, value in metrics.items()}
        return {name: value for name, value in numbers.items() if not math.isnan(value)}


def plain_value(value: Any) -> Any:
    """Return an item's value under a metric as numbers; None if it is none, such as a text."""
    try:
        return [float(part) for part in value] if isinstance(value, tuple | list) else float(value)
    except (TypeError, ValueError):
        return None


def metric_label(metric: str, filter_name: str) -> str:
    """Return a metric's name in a result: with the filter, if the task names one."""
    return metric if filter_name == NO_FILTER else f"{metric}{FILTER_MARK}{filter_name}"


def accuracy_among(metrics: Iterable[str]) -> str | None:
    """Return the metric that counts as accuracy: the first of the best kind; None without one."""
    names = list(metrics)
    for metric in ACCURACY_METRICS:
        for name in names:
            if name.partition(FILTER_MARK)[0] == metric:
                return name
    return None


def mean_and_error(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Average (value, standard error) pairs with independent errors; NaN if there are none."""
    if not pairs:
        return math.nan, math.nan
    mean = math.fsum(value for value, _ in pairs) / len(pairs)
    return mean, math.sqrt(math.fsum(error**2 for _, error in pairs)) / len(pairs)


def standard_error(aggregation: str, values: Values) -> float | None:
    """Return the standard error of a metric from its per-item values.

    Args:
        aggregation: lm-eval's name: mean, perplexity (`exp(-mean)`), weighted_perplexity
            (`exp(-sum a / sum b)` over pairs (a, b)) or bits_per_byte (the same ratio in bits).
        values: One per item.

    Returns:
        The error; None for another aggregation, or for fewer than two items.
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
        # A ratio of sums, linearized: the error of the mean of (a - ratio b) / mean(b).
        error = _error_of_mean([(a - ratio * b) * len(pairs) / weight for a, b in pairs])
        return error / math.log(2) if aggregation == BITS_METRIC else math.exp(-ratio) * error
    return None


def _error_of_mean(deviations: Sequence[float]) -> float:
    """Return the standard error of a mean from the values' deviations from it."""
    count = len(deviations)
    variance = math.fsum(deviation * deviation for deviation in deviations) / (count - 1)
    return math.sqrt(variance / count)
