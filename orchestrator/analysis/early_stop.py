"""When a trial may end before its training does: it cannot beat a finished one that costs no more.

In: the validation losses of a trial so far, and the final ones of trials that need no more
evaluations, on the same held-out tokens. Out: a verdict, or None to go on. Cost is exact before
training, so only the quality is in question, and for that there is an optimistic bound: the lowest
loss so far, minus the steepest recent fall per step, times a safety factor, kept up to the end. A
loss that falls ever more slowly, as it mostly does once the warm-up is over, ends above the bound;
the safety factor is for noise and for the last falls of the learning rate. The grace period keeps
the rule away from the start, where that is not so.

The rule speaks of the validation loss. A trial that it stops could still have been better on some
task; a sweep without stopping gives the full front.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

SAFETY_FACTOR = 2.0
"""How much faster than lately a loss is allowed to fall: curves are noisy, rates change."""
NUM_RECENT_FALLS = 3
"""The bound takes the steepest of so many last falls."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why a trial was stopped."""

    step: int
    """Steps done."""
    num_steps: int
    """Steps of the whole training."""
    bound: float
    """The lowest validation loss that the trial could have reached."""
    rival: str
    """Label of the finished trial that costs no more."""
    rival_loss: float
    """Its final validation loss."""

    @property
    def share_saved(self) -> float:
        """Share of the trial's steps that were not made."""
        return 1.0 - self.step / self.num_steps

    @property
    def text(self) -> str:
        """The reason in one line."""
        return (
            f"stopped early at step {self.step} of {self.num_steps}: its validation loss could "
            f"reach {self.bound:.3f} at best, and {self.rival}, which costs no more, has "
            f"{self.rival_loss:.3f}"
        )


def optimistic_bound(losses: Mapping[int, float], num_steps: int) -> float | None:
    """Return a lower bound of a trial's final validation loss.

    `min(losses) - SAFETY_FACTOR * max(recent falls per step, 0) * (num_steps - last step)`

    Args:
        losses: Step -> validation loss.
        num_steps: Steps of the whole training.

    Returns:
        None as long as there is no fall to look at, which takes two losses.
    """
    points = sorted(losses.items())
    falls = [
        (before - after) / (end - start)
        for (start, before), (end, after) in itertools.pairwise(points)
    ]
    if not falls:
        return None
    steepest = max(0.0, *falls[-NUM_RECENT_FALLS:])
    last_step = points[-1][0]
    return min(losses.values()) - SAFETY_FACTOR * steepest * (num_steps - last_step)


def judge(
    losses: Mapping[int, float],
    num_steps: int,
    rivals: Mapping[str, float],
    *,
    grace_fraction: float,
) -> Verdict | None:
    """Say whether a trial cannot beat one of its rivals any more.

    Args:
        losses: Step -> validation loss of the trial.
        num_steps: Steps of the whole training.
        rivals: Label -> final validation loss of finished trials that cost no more.
        grace_fraction: Share of the steps before which nothing is stopped.
    """
    bound = optimistic_bound(losses, num_steps)
    step = max(losses, default=0)
    if bound is None or not rivals or step < grace_fraction * num_steps or step >= num_steps:
        return None
    rival = min(rivals, key=lambda label: rivals[label])
    if bound <= rivals[rival]:
        return None
    return Verdict(
        step=step, num_steps=num_steps, bound=bound, rival=rival, rival_loss=rivals[rival]
    )
