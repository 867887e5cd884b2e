"""What stopping dominated trials would have saved: the rule of `early_stop` on finished runs.

In: the validation losses of trials that were all trained to their end, who is whose rival, in which
order they started and how many ran at once. Out: which of them the rule would have ended, and when.
A stopped trial never becomes a rival, and what waits starts earlier for it, as it would have been.
Nothing is trained for this; the clock is that of the recorded trainings.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.analysis.early_stop import Verdict, judge


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
    """Labels of the trials that cost no more."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What the rule would have done."""

    verdicts: Mapping[str, Verdict]
    """Label -> why and when, of the trials that it would have ended."""
    share_of_seconds: float
    """Share of all training seconds that would have been saved."""


def replay_stops(
    curves: Sequence[Curve], *, at_once: int = 1, grace_fraction: float = 0.5
) -> Replay:
    """Replay a sweep with the rule.

    Args:
        curves: The trials, in the order in which they start.
        at_once: How many run side by side.
        grace_fraction: Share of a trial's steps before which it is not ended.
    """
    waiting = deque(curves)
    running: list[tuple[float, int, int, Curve, float]] = []  # time, tie, look, curve, start
    finished: dict[str, float] = {}
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
        seen = dict(sorted(curve.losses.items())[: look + 1])
        known = {label: loss for label, loss in finished.items() if label in curve.rivals}
        verdict = judge(seen, curve.num_steps, known, grace_fraction=grace_fraction)
        if verdict:
            verdicts[curve.label] = verdict
            start_next(now)
        else:
            look_at(curve, look + 1, start)
    total = sum(curve.seconds for curve in curves)
    saved = sum(c.seconds * verdicts[c.label].share_saved for c in curves if c.label in verdicts)
    return Replay(verdicts=verdicts, share_of_seconds=saved / total if total else 0.0)
