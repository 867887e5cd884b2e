"""What a model has lost against the source of its sweep's teacher, and whether that is too much.

A model that was trained on one thing may forget another. `evaluation.retention` bounds the loss by
task. It is judged by the point estimate, over the items that all models of the sweep answered; its
interval says how sure that is. The reference is always the source, as it was before the teacher was
trained: a teacher that has forgotten much would excuse its students.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.records.evaluation import BITS_METRIC
from orchestrator.reporting.statistics import Interval, PairedScores
from orchestrator.settings.evaluation import PYTHON_BITS_TASK, retention_task

ROUNDING = 1e-9
"""A loss that is above its bound by less is the bound itself."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a model has lost of one task."""

    task: str
    lost: Interval
    """The source's score minus the model's, in points of accuracy; in bits per byte, the model's
    minus the source's. Below 0 the model has gained."""
    bound: float
    """The most that it may be."""
    is_bits: bool
    """Whether these are bits per byte, and not points of accuracy."""

    @property
    def is_within_bound(self) -> bool:
        """Whether the loss is within its bound."""
        return self.lost.value <= self.bound + ROUNDING

    @property
    def in_words(self) -> str:
        """The loss with its interval: `0.031 (0.027 to 0.036) bits per byte of Python's text`."""
        digits = 3 if self.is_bits else 1
        low = f"{self.lost.low:.{digits}f}"
        high = f"{self.lost.high:.{digits}f}"
        return f"{self.lost.value:.{digits}f} ({low} to {high}) {_unit(self.task, self.is_bits)}"

    @property
    def share_of_bound(self) -> float:
        """The loss as a share of its bound; where nothing may be lost, the loss itself."""
        return self.lost.value / self.bound if self.bound else self.lost.value

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "task": self.task,
            "unit": "bits per byte" if self.is_bits else "points",
            "lost": self.lost.value,
            "low": self.lost.low,
            "high": self.lost.high,
            "bound": self.bound,
            "kept": self.is_within_bound,
        }


def find_losses(
    paired: PairedScores, source: str, bounds: Mapping[str, float]
) -> dict[str, tuple[Loss, ...]]:
    """Return key of a model -> what it has lost of each task; empty without a task that is known.

    Args:
        paired: Scores of all models, the source among them.
        source: Key of the source.
        bounds: Name in `evaluation.retention` -> how much a model may lose.
    """
    losses: dict[str, list[Loss]] = {key: [] for key in paired.number_of if key != source}
    source_number = paired.number_of[source]
    for name, bound in bounds.items():
        task = retention_task(name)
        scores = paired.scores.get(task)
        if scores is None:
            continue
        is_bits = paired.metrics[task] == BITS_METRIC
        scale = 1.0 if is_bits else -100.0
        for key, losses_of_model in losses.items():
            change = scores.difference(paired.number_of[key], source_number).interval()
            low, high = sorted((scale * change.low, scale * change.high))
            lost = Interval(scale * change.value, low, high, change.over)
            losses_of_model.append(Loss(task=task, lost=lost, bound=bound, is_bits=is_bits))
    return {key: tuple(of_model) for key, of_model in losses.items() if of_model}


def retention_verdict(losses: Sequence[Loss]) -> str:
    """Return what a table says of a model: `kept`, `loses`, or nothing if that is not known."""
    if not losses:
        return ""
    return "kept" if all(loss.is_within_bound for loss in losses) else "loses"


def lost_words(losses: Sequence[Loss]) -> str:
    """Return what a model loses, with the intervals.

    Of several tasks, those that are lost stand there; if all are kept, the one that is nearest to
    its bound.
    """
    ordered = sorted(losses, key=lambda loss: loss.share_of_bound, reverse=True)
    broken = [loss for loss in ordered if not loss.is_within_bound]
    return " and ".join(loss.in_words for loss in broken or ordered[:1])


def loss_text(losses: Sequence[Loss]) -> str:
    """Return both as one text, for files."""
    verdict = retention_verdict(losses)
    mark = ":" if verdict == "kept" else ""
    return f"{verdict}{mark} {lost_words(losses)}" if verdict else ""


def bounds_sentence(
    bounds: Mapping[str, float], losses: Iterable[tuple[Loss, ...]], reference: str = "source"
) -> str:
    """Return the sentence on how much a model may lose, and on tasks of which that is not known.

    Args:
        reference: What models are compared with: the `source`, or a plain `teacher`.
    """
    are_bits = {loss.task: loss.is_bits for of_model in losses for loss in of_model}
    parts = []
    missing = []
    for name, bound in bounds.items():
        task = retention_task(name)
        if task in are_bits:
            parts.append(f"{bound:g} {_unit(task, are_bits[task])}")
        else:
            missing.append(name)
    sentences = []
    if parts:
        sentences.append(
            f"Retention: against the {reference}, a model may lose {' and '.join(parts)} "
            "(evaluation.retention)."
        )
    if missing:
        sentences.append(
            f"Losses of {', '.join(missing)} are not known: a model, or the {reference}, has no "
            "values of the items."
        )
    return " ".join(sentences)


def _unit(task: str, is_bits: bool) -> str:
    unit = "bits per byte of" if is_bits else "points of"
    return f"{unit} Python's text" if task == PYTHON_BITS_TASK else f"{unit} {task}"
