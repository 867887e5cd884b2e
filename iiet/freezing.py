"""Which weights a training changes: all of them, or those around the corrections.

A plain model that becomes iterative may keep what it is: with `corrected`, the layers that make
corrections are trained, and what the method adds from the first of them on; with `added`, only the
latter. Numbers of layers say which are trained in place of those with corrections; so a plain model
trains the same layers. All else is frozen: it has no gradients and no optimizer state, and the
layers before the first trained one keep nothing for the backward pass, so the model stays the
source up to there.
Source: this project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from iiet.model.schedule import IterationSchedule

if TYPE_CHECKING:
    from torch import nn

    from iiet.backbone import Backbone
    from iiet.methods import Layer

__all__ = ["TrainedLayers", "TrainedPart", "freeze", "trained_part"]

TrainedLayers = Literal["all", "corrected", "added"] | tuple[int, ...]
"""`all` weights; the `corrected` layers, and what the method adds from the first of them on; only
what is `added` there; or the layers with these numbers, the first being 1, as if these were
corrected."""


class TrainedPart(NamedTuple):
    """The weights that a training changes."""

    first_layer: int
    """The first layer of which something is trained, counted from 0."""
    has_field: tuple[bool, ...]
    """For each layer whether its field is trained."""
    has_ends: bool
    """Whether embeddings, last norm and head are trained."""


def trained_part(schedule: IterationSchedule, trained: TrainedLayers) -> TrainedPart:
    """Return what is trained of a model whose full schedule this is.

    Raises:
        ValueError: no layer makes corrections, so nothing would be trained; or there is no layer
            with one of these numbers.
    """
    if trained == "all":
        return TrainedPart(0, (True,) * len(schedule), has_ends=True)
    if isinstance(trained, tuple):
        numbers = range(1, len(schedule) + 1)
        if not trained or not set(trained) <= set(numbers):
            raise ValueError(f"the model has layers 1 to {len(schedule)}; name one or more of them")
        has_field = tuple(number in trained for number in numbers)
        return TrainedPart(has_field.index(True), has_field, has_ends=False)
    corrected = tuple(count > 0 for count in schedule)
    if not any(corrected):
        raise ValueError(f"no layer makes corrections under the schedule {schedule}")
    has_field = corrected if trained == "corrected" else (False,) * len(schedule)
    return TrainedPart(corrected.index(True), has_field, has_ends=False)


def freeze(backbone: Backbone, part: TrainedPart, head: nn.Module | None = None) -> None:
    """Turn off the gradients of all weights that are not trained, and on those of the others."""
    backbone.requires_grad_(part.has_ends)
    if head is not None:
        head.requires_grad_(part.has_ends)
    for number, module in enumerate(backbone.layers):
        layer = cast("Layer", module)
        field = set(layer.field_parameters())
        for parameter in layer.parameters():
            is_trained = number >= part.first_layer
            if parameter in field:
                is_trained = part.has_field[number]
            parameter.requires_grad_(is_trained)
