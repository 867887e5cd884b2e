"""The learning rate as a pure function of the step: a resumed run needs no state for it.

A linear warm-up, then one of three shapes: cosine to the final rate; "wsd" (warm-up, stable,
decay): constant, then linear to the final rate, so that a run can be extended before its decay; or
constant.
"""

from __future__ import annotations

import math

from orchestrator.settings import TrainingSettings


def learning_rate_at(step: int, recipe: TrainingSettings) -> float:
    """Return the learning rate of an optimizer step, from 0 to `recipe.num_steps - 1`."""
    peak = recipe.learning_rate
    if step < recipe.warmup_steps:
        return peak * (step + 1) / recipe.warmup_steps
    return peak * (1.0 - (1.0 - recipe.final_learning_rate_fraction) * _decay(step, recipe))


def stable_steps(recipe: TrainingSettings) -> int:
    """Return the steps of a `wsd` training before its decay; 0 for another shape.

    A run keeps the checkpoint after these steps: a longer training can start from it.
    """
    if recipe.decay != "wsd":
        return 0
    return max(recipe.warmup_steps, round(recipe.num_steps * (1.0 - recipe.decay_fraction)))


def _decay(step: int, recipe: TrainingSettings) -> float:
    # From 0 at the peak to 1 at the final rate.
    first = stable_steps(recipe) or recipe.warmup_steps
    if recipe.decay == "constant" or step < first:
        return 0.0
    progress = (step - first) / max(1, recipe.num_steps - 1 - first)
    return progress if recipe.decay == "wsd" else 0.5 * (1.0 - math.cos(math.pi * progress))
