"""What a correction is worth in layers: phi, from losses, accuracies and numbers of layers alone.

A model of L layers with e evaluations per layer is as good as vanilla of L' layers, trained on the
same tokens, if both have the same validation loss. Then phi = log(L'/L) / log(e): 1 if e
evaluations of a layer are worth e layers, 0 if they are worth one. An IIET has e = 1 + r.
L' is the smallest depth at which vanilla reaches the loss; between trained depths its loss is taken
to be linear in the logarithm of the depth. A depth that is no better than a shallower one is never
the first to reach a loss, so a curve that is not monotone needs no rule of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.reporting.statistics import Interval, sum_of_means
from orchestrator.terminal.render import format_count

SATURATED_ACCURACY = 0.98
"""From this accuracy on, the loss says how sure a model is rather than how much it can compute: any
deeper model reaches nearly the same."""


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """A trained model: its depth and what was measured, over its seeds."""

    num_layers: int
    evaluations_per_layer: float = 1.0
    losses: tuple[float, ...]
    """Validation loss of each seed, nats per token."""
    accuracy: float | None = None
    """Mean over the seeds, from 0 to 1; None if it was not measured."""

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return math.fsum(self.losses) / len(self.losses)

    @property
    def is_saturated(self) -> bool:
        """Whether the accuracy is too high for the loss to measure depth."""
        return self.accuracy is not None and self.accuracy >= SATURATED_ACCURACY


@dataclass(frozen=True, kw_only=True)
class CorrectionWorth:
    """How many layers a model's evaluations are worth, or why that cannot be said."""

    equivalent_layers: float | None = None
    """L': the depth of a vanilla model with the same loss."""
    phi: float | None = None
    interval: Interval | None = None
    """Of phi, over the seeds; None if every model has one seed."""
    is_open: tuple[bool, bool] = (False, False)
    """Whether the interval's lower and upper end lie beyond the vanilla depths; such an end is phi
    of the shallowest or of the deepest one."""
    refusal: str = ""
    """Why there is no phi."""


def correction_worth(model: MeasuredModel, vanilla: Sequence[MeasuredModel]) -> CorrectionWorth:
    """Return what a model's evaluations are worth, measured by vanilla models of several depths.

    It is refused where fewer than two depths are trained; where their losses do not bracket the
    model's; where the accuracy of the model, or of the deeper of the two vanilla models whose
    losses bracket it, is saturated; and where the losses of these two do not differ significantly:
    the interval of their difference over the seeds contains zero.

    Args:
        model: Any model; with one evaluation per layer it has an equivalent depth, but no phi.
        vanilla: One for each depth, trained on the model's tokens.
    """
    curve = sorted(vanilla, key=lambda one: one.num_layers)
    refusal = _refusal(model, curve)
    if refusal:
        return CorrectionWorth(refusal=refusal)
    # The first depth that reaches the loss; the shallowest one can only equal it.
    deeper = max(next(n for n, one in enumerate(curve) if one.loss <= model.loss), 1)
    shallow, deep = curve[deeper - 1 : deeper + 1]
    if _are_alike(shallow, deep):
        return CorrectionWorth(
            refusal=f"its loss lies between those of vanilla with {shallow.num_layers} and with "
            f"{deep.num_layers} layers, which differ by less than their seeds do"
        )
    log_depths = np.log([one.num_layers for one in curve])
    step = log_depths[deeper] - log_depths[deeper - 1]
    drop = shallow.loss - deep.loss
    share = (shallow.loss - model.loss) / drop
    log_depth = float(log_depths[deeper - 1] + share * step)
    equivalent_layers = math.exp(log_depth)
    if model.evaluations_per_layer == 1:
        refusal = "it evaluates each layer once, so it has no corrections to divide by"
        return CorrectionWorth(equivalent_layers=equivalent_layers, refusal=refusal)

    log_evaluations = math.log(model.evaluations_per_layer)
    phi = (log_depth - math.log(model.num_layers)) / log_evaluations
    if max(len(one.losses) for one in (model, shallow, deep)) == 1:
        return CorrectionWorth(equivalent_layers=equivalent_layers, phi=phi)
    # By the delta method: how much phi changes with each of the three losses.
    slope = step / drop / log_evaluations
    slopes = ((model, -slope), (shallow, slope * (1 - share)), (deep, slope * share))
    changes = sum_of_means([of_loss * np.array(one.losses) for one, of_loss in slopes])
    interval = replace(changes, value=phi).interval()
    lowest, highest = (log_depths[[0, -1]] - math.log(model.num_layers)) / log_evaluations
    is_open = (bool(interval.low <= lowest), bool(interval.high >= highest))
    low = max(interval.low, float(lowest))
    high = min(interval.high, float(highest))
    return CorrectionWorth(
        equivalent_layers=equivalent_layers,
        phi=phi,
        interval=replace(interval, low=low, high=high),
        is_open=is_open,
    )


def _refusal(model: MeasuredModel, curve: Sequence[MeasuredModel]) -> str:
    """Return why a model cannot be placed among vanilla models, shallowest first; empty if it can.

    The seeds are not looked at here.
    """
    if len({one.num_layers for one in curve}) < 2:
        return "it needs vanilla models of at least two depths, trained on the same tokens"
    if model.is_saturated:
        return f"its accuracy of {model.accuracy:.2%} is saturated: its loss no longer tells depth"
    shallowest = curve[0]
    best = min(curve, key=lambda one: one.loss)
    if model.loss > shallowest.loss:
        return (
            "its loss is higher than that of the shallowest vanilla model "
            f"({format_count(shallowest.num_layers, 'layer')})"
        )
    if model.loss < best.loss:
        return (
            "its loss is lower than that of every vanilla model "
            f"(the best has {best.num_layers} layers)"
        )
    deeper = next(number for number, one in enumerate(curve) if one.loss <= model.loss)
    if curve[deeper].is_saturated and deeper:
        shallow = curve[deeper - 1]
        deep = curve[deeper]
        return (
            f"vanilla with {deep.num_layers} layers is saturated (accuracy {deep.accuracy:.2%}), "
            f"so it is worth between {shallow.num_layers} and {deep.num_layers} layers"
        )
    return ""


def _are_alike(one: MeasuredModel, other: MeasuredModel) -> bool:
    """Return whether two models' losses do not differ significantly; False if that is unknown."""
    if min(len(one.losses), len(other.losses)) < 2:
        return False
    difference = sum_of_means([one.losses, [-loss for loss in other.losses]])
    return not difference.interval().excludes_zero


def worth_cells(name: str, model: MeasuredModel, worth: CorrectionWorth) -> list[str]:
    """Return a row of a table: name, layers, NFE per layer, loss, equivalent layers, phi."""
    layers = worth.equivalent_layers
    phi = "none"
    if worth.phi is not None:
        phi = f"{worth.phi:.2f}"
    if worth.interval is not None:
        low = worth.interval.low
        high = worth.interval.high
        is_low_open, is_high_open = worth.is_open
        phi += f" ({'<' * is_low_open}{low:.2f} to {'>' * is_high_open}{high:.2f})"
    return [
        name,
        str(model.num_layers),
        f"{model.evaluations_per_layer:.3g}",
        f"{model.loss:.4g}",
        "" if layers is None else f"{layers:.2f}",
        phi,
    ]
