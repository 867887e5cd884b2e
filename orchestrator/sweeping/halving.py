"""When one of a model's learning rates ends before its training does.

In: validation losses of a trial and of the same model at other learning rates, on the same held-out
tokens. Out: a verdict, or None to go on. The rule is asynchronous successive halving (ASHA; Li et
al., MLSys 2020). The schedulers of Ray Tune and Optuna keep what they have seen in their own
process or store, and lose it or judge late looks differently when a sweep goes on; here all follows
from the losses that the trainings have written down.

It looks at the validation loss. A trial that it stops could still have been better on some task; a
sweep without ASHA trains all to their end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why a trial was stopped."""

    step: int
    """Steps done."""
    num_steps: int
    """Steps of the whole training."""
    rival: str
    """Label of the trial that it lost to."""
    reason: str
    """What it has and what the rival has."""

    @property
    def share_saved(self) -> float:
        """Share of the trial's steps that were not made."""
        return 1.0 - self.step / self.num_steps

    @property
    def text(self) -> str:
        """All of it in one line."""
        return f"stopped early at step {self.step} of {self.num_steps}: {self.reason}"


def halve(
    losses: Mapping[int, float],
    num_steps: int,
    rivals: Mapping[str, Mapping[int, float]],
    *,
    first_rung: float,
    reduction_factor: int,
) -> Verdict | None:
    """Say whether a trial is not among the best at the rung that it has just reached.

    Rungs are at `first_rung * num_steps` steps and at each `reduction_factor` times as many. Who
    is among the best `1 / reduction_factor` of those that have reached a rung goes on; so does the
    best one, and hence the first. Who is looked at rarely is judged at every rung since its last
    look.

    Args:
        losses: Step -> validation loss of the trial, up to now.
        num_steps: Steps of the whole training.
        rivals: Label -> step -> validation loss of the other trials, however far they are.
        first_rung: Share of the steps of the lowest rung.
        reduction_factor: Of so many trials at a rung, one goes on.
    """
    looks = sorted(losses)
    if not looks or looks[-1] >= num_steps or not math.isfinite(losses[looks[-1]]):
        return None  # A loss that is no number ends the training by itself.
    step, before = looks[-1], looks[-2] if len(looks) > 1 else 0
    rung = max(1, math.ceil(first_rung * num_steps))
    while rung <= step:
        there = _losses_at(rung, rivals) if rung > before else {}
        best = sorted([*there.values(), losses[step]])
        if losses[step] > best[max(0, len(best) // reduction_factor - 1)]:
            rival = min(there, key=lambda label: there[label])
            reason = f"its validation loss is {losses[step]:.3f}, {rival} had {there[rival]:.3f}"
            return Verdict(step=step, num_steps=num_steps, rival=rival, reason=reason)
        rung *= reduction_factor
    return None


def _losses_at(rung: int, curves: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Return label -> loss at the first look from a rung on, of those that have come to it."""
    found = {}
    for label, curve in curves.items():
        steps = [step for step in curve if step >= rung]
        if steps and math.isfinite(curve[min(steps)]):
            found[label] = curve[min(steps)]
    return found
