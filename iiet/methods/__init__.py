"""The methods by name: one line each. The shared test suite runs over this registry."""

from __future__ import annotations

from typing import Final

from iiet.methods.base import Advance, Evaluate, Method
from iiet.methods.explicit_euler import ExplicitEuler
from iiet.methods.explicit_runge_kutta import ExplicitRK2, ExplicitRK4, GatedRK2
from iiet.methods.implicit_euler import ImplicitEuler
from iiet.methods.predictor_corrector import PredictorCorrectorRK2, PredictorCorrectorRK4

__all__ = ["METHODS", "Advance", "Evaluate", "Method"]

METHODS: Final[dict[str, type[Method]]] = {
    "vanilla": ExplicitEuler,
    "iiet": ImplicitEuler,
    "pcformer": PredictorCorrectorRK2,
    "pcformer_rk4": PredictorCorrectorRK4,
    "ode_rk2": ExplicitRK2,
    "ode_rk4": ExplicitRK4,
    "ode_rk2_gated": GatedRK2,
}
"""Registry keys are the papers' names; class and file names carry the mathematics."""
