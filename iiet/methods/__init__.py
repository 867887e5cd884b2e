"""The registry of methods, over which the shared test suite runs.

Other packages add methods through the entry-point group `iiet.methods`: the entry point's name is
the method's, its object the class. An entry point is imported when its method is first used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points

from iiet.methods.base import Advance, Evaluate, Evaluation, Layer, Observer
from iiet.methods.explicit_euler import ExplicitEuler
from iiet.methods.explicit_runge_kutta import ExplicitRK2, ExplicitRK4, GatedRK2
from iiet.methods.implicit_euler import ImplicitEuler
from iiet.methods.looped import Looped
from iiet.methods.predictor_corrector import PredictorCorrectorRK2, PredictorCorrectorRK4

__all__ = ["METHODS", "Advance", "Evaluate", "Evaluation", "Layer", "Methods", "Observer"]

ENTRY_POINT_GROUP = "iiet.methods"


class Methods(Mapping[str, type[Layer]]):
    """Methods by name: this package's, then those of entry points, in alphabetical order.

    Looking up an entry point whose object is no subclass of `Layer` is a ValueError.
    """

    def __init__(self, own: Mapping[str, type[Layer]]) -> None:
        self._classes = dict(own)

    def register(self, name: str, method: type[Layer]) -> None:
        """Add a method to this process; a taken name, or a class that is no method, is refused."""
        if name in self._classes and self._classes[name] is not method:
            raise ValueError(f"there is a method {name!r} already: {self._classes[name]}")
        if not (isinstance(method, type) and issubclass(method, Layer)):
            raise ValueError(f"method {name!r} must be a subclass of Layer, got {method!r}")
        self._classes[name] = method

    def __getitem__(self, name: str) -> type[Layer]:
        if name not in self._classes:
            for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
                self.register(name, entry.load())
                break  # The first of that name wins.
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        others = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
        return iter([*self._classes, *sorted(others - set(self._classes))])

    def __len__(self) -> int:
        return sum(1 for _ in self)


METHODS = Methods(
    {
        "vanilla": ExplicitEuler,
        "iiet": ImplicitEuler,
        "pcformer": PredictorCorrectorRK2,
        "pcformer_rk4": PredictorCorrectorRK4,
        "ode_rk2": ExplicitRK2,
        "ode_rk4": ExplicitRK4,
        "ode_rk2_gated": GatedRK2,
        "looped": Looped,
    }
)
"""Registry keys are the papers' names; class and file names carry the mathematics."""
