"""What ending trials early would have saved: a rule of `early_stop` on finished runs.

In: the validation losses of trials that were all trained to their end, who is whose rival, in which
order they started and how many ran at once. Out: which of them the rule would have ended, and when.
A stopped trial never becomes a rival, and what waits starts earlier for it, as it would have been.
Nothing is trained for this; the clock is that of the recorded trainings.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.analysis.early_stop import Verdict, halve, judge

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A training that was not stopped."""

    label: str
    num_steps: int
    seconds: float
    """Of the whole training."""
    losses: Mapping[int, float]
    """Step -> validation loss."""
    final_loss: float
    """What rivals are judged by."""
    rivals: frozenset[str] = frozenset()
    """Labels of the trials that can end it."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What the rule would have done."""

    verdicts: Mapping[str, Verdict]
    """Label -> why and when, of the trials that it would have ended."""
    share_of_seconds: float
    """Share of all training seconds that would have been saved."""


Losses = Mapping[int, float]
Rule = Callable[[Curve, Losses, Mapping[str, float], Mapping[str, Losses]], Verdict | None]
"""(a curve, its losses so far, label -> final loss of its finished rivals, label -> losses so far
of all its rivals) -> why it ends, or None."""


def dominated(grace_fraction: float) -> Rule:
    """Return the rule of `judge`."""
    return lambda curve, seen, finished, _: judge(
        seen, curve.num_steps, finished, grace_fraction=grace_fraction
    )


def asha(first_rung: float, reduction_factor: int) -> Rule:
    """Return the rule of `halve`."""
    return lambda curve, seen, _, so_far: halve(
        seen, curve.num_steps, so_far, first_rung=first_rung, reduction_factor=reduction_factor
    )


def replay_stops(curves: Sequence[Curve], rule: Rule, *, at_once: int = 1) -> Replay:
    """Replay a sweep with the rule.

    Args:
        curves: The trials, in the order in which they start.
        rule: When a trial ends.
        at_once: How many run side by side.
    """
    waiting = deque(curves)
    running: list[tuple[float, int, int, Curve, float]] = []  # time, tie, look, curve, start
    finished: dict[str, float] = {}
    so_far: dict[str, Losses] = {}
    verdicts: dict[str, Verdict] = {}
    ties = iter(range(sum(len(curve.losses) + 2 for curve in curves) + len(curves)))

    def look_at(curve: Curve, look: int, start: float) -> None:
        steps = [*sorted(curve.losses), curve.num_steps]
        time = start + curve.seconds * steps[look] / curve.num_steps
        heapq.heappush(running, (time, next(ties), look, curve, start))

    def start_next(now: float) -> None:
        if waiting:
            look_at(waiting.popleft(), 0, now)

    for _ in range(at_once):
        start_next(0.0)
    while running:
        now, _, look, curve, start = heapq.heappop(running)
        if look == len(curve.losses):
            finished[curve.label] = curve.final_loss
            start_next(now)
            continue
        seen = so_far[curve.label] = dict(sorted(curve.losses.items())[: look + 1])
        verdict = rule(curve, seen, _of(curve.rivals, finished), _of(curve.rivals, so_far))
        if verdict:
            verdicts[curve.label] = verdict
            start_next(now)
        else:
            look_at(curve, look + 1, start)
    total = sum(curve.seconds for curve in curves)
    saved = sum(c.seconds * verdicts[c.label].share_saved for c in curves if c.label in verdicts)
    return Replay(verdicts=verdicts, share_of_seconds=saved / total if total else 0.0)


def _of(labels: frozenset[str], values: Mapping[str, T]) -> dict[str, T]:
    return {label: value for label, value in values.items() if label in labels}
