"""The methods, over which the shared test suite runs.

Other packages add methods through the entry-point group `iiet.methods`: the entry point's name is
the method's, its object the class. An entry point is imported when its method is first used.
"""

from __future__ import annotations

from iiet.extensions import ExtensionTable
from iiet.methods.base import Advance, Evaluate, Evaluation, Layer, Observer
from iiet.methods.explicit import ExplicitEuler, ExplicitRK2, ExplicitRK4, GatedRK2, Looped
from iiet.methods.implicit_euler import (
    ImplicitEuler,
    PredictorCorrectorRK2,
    PredictorCorrectorRK4,
)
from iiet.model import facts

__all__ = [
    "METHODS",
    "Advance",
    "Evaluate",
    "Evaluation",
    "ExplicitEuler",
    "ExplicitRK2",
    "ExplicitRK4",
    "GatedRK2",
    "ImplicitEuler",
    "Layer",
    "Looped",
    "Observer",
    "PredictorCorrectorRK2",
    "PredictorCorrectorRK4",
]

METHODS: ExtensionTable[type[Layer]] = facts.METHODS
"""All methods by name."""
