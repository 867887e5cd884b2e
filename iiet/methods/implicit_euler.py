"""The implicit Euler method, solved by a fixed number of fixed-point corrections. This is IIET."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from iiet.history import Mix
from iiet.methods.base import Advance, Evaluate, Method
from iiet.schedule import IterationSchedule
from iiet.solver import iterate

__all__ = ["ImplicitEuler"]


class ImplicitEuler(Method):
    """Predict once, then correct `r_l` times towards the fixed point.

        e   = P_l(F_l(h_{l-1}))                                        prediction
        e   = N_l(F_l(sum_{k<l} A[l,k] s_k + A[l,l] e))                correction, r_l times
        s_l = e;   h_l = sum_{k<=l} C[l,k] s_k

    Cost: `1 + r_l` evaluations per layer.
    Source: the IIET paper, checked against its published code.
    Not to be confused with: looping a block (`h = F(F(h))`), which hands each evaluation the one
    before it alone; here each correction starts from the earlier layers' estimates again.
    """

    has_corrections: ClassVar[bool] = True
    has_mix: ClassVar[bool] = True

    def __init__(self, num_layers: int, dim: int, layer_norm_eps: float) -> None:
        super().__init__(num_layers, dim, layer_norm_eps)
        self.mix = Mix(num_layers, dim, layer_norm_eps)

    @classmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer: int) -> int:
        """Return `1 + r_l`."""
        return 1 + schedule[layer]

    @classmethod
    def num_parameters(cls, num_layers: int, dim: int) -> int:
        """Count the mix."""
        return Mix.num_parameters(num_layers, dim)

    def advance(
        self,
        layer: int,
        field: Evaluate,
        hidden: Tensor,
        estimates: Sequence[Tensor],
        num_corrections: int,
    ) -> Advance:
        """Predict, correct, mix."""
        mix = self.mix.of_layer(layer, estimates, evaluates=num_corrections > 0)
        correction_norm = self.mix.correction_norms[layer]

        def correct(estimate: Tensor) -> Tensor:
            corrected: Tensor = correction_norm(field(mix.evaluation_point(estimate)))
            return corrected

        prediction = self.mix.prediction_norms[layer](field(hidden))
        estimate = iterate(correct, prediction, num_corrections).value
        return Advance(mix.hidden(estimate), estimate)
