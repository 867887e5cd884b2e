"""The registry of methods, over which the shared test suite runs.

Other packages add methods through the entry-point group `iiet.methods`: the entry point's name is
the method's, its object the class. An entry point is imported when its method is first used.
"""

from __future__ import annotations

from iiet.extensions import ExtensionTable
from iiet.methods.base import Advance, Evaluate, Evaluation, Layer, Observer
from iiet.methods.explicit import ExplicitEuler, ExplicitRK2, ExplicitRK4, GatedRK2, Looped
from iiet.methods.implicit_euler import ImplicitEuler
from iiet.methods.predictor_corrector import PredictorCorrectorRK2, PredictorCorrectorRK4
from iiet.names import METHOD_NAMES

__all__ = ["METHODS", "Advance", "Evaluate", "Evaluation", "Layer", "Observer"]

METHODS: ExtensionTable[type[Layer]] = ExtensionTable(
    METHOD_NAMES,
    {
        "vanilla": ExplicitEuler,
        "iiet": ImplicitEuler,
        "pcformer": PredictorCorrectorRK2,
        "pcformer_rk4": PredictorCorrectorRK4,
        "ode_rk2": ExplicitRK2,
        "ode_rk4": ExplicitRK4,
        "ode_rk2_gated": GatedRK2,
        "looped": Looped,
    },
    bases=(Layer,),
)
"""Registry keys are the papers' names; class and file names carry the mathematics."""
