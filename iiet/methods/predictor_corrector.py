"""Predictor and corrector: a Runge-Kutta prediction, corrected once through the mix. This is
PCformer.
"""

# ruff: noqa: ARG002, ARG003 - all methods share their signatures

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from iiet.history import Mix
from iiet.methods.base import Advance, Evaluate, Method
from iiet.methods.runge_kutta import MovingAverageRungeKutta
from iiet.schedule import IterationSchedule

__all__ = ["PredictorCorrectorRK2", "PredictorCorrectorRK4"]


class PredictorCorrectorRK2(Method):
    """Predict with a Runge-Kutta step of order 2, correct once.

        p   = RK2(F_l, h_{l-1}), see `runge_kutta`
        s_l = N_l(F_l(sum_{k<l} A[l,k] s_k + A[l,l] P_l(p)))
        h_l = sum_{k<=l} C[l,k] s_k

    Cost: 3 evaluations per layer.
    Source: Li et al. 2024 (PCformer), checked against its published code.
    Not to be confused with: IIET with two corrections, the same cost, whose prediction is one plain
    evaluation.
    """

    has_mix: ClassVar[bool] = True
    num_stage_norms: ClassVar[int] = 2

    def __init__(self, num_layers: int, dim: int, layer_norm_eps: float) -> None:
        super().__init__(num_layers, dim, layer_norm_eps)
        self.predictor = MovingAverageRungeKutta(self.num_stage_norms, dim, layer_norm_eps)
        self.mix = Mix(num_layers, dim, layer_norm_eps)

    @classmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer: int) -> int:
        """Return the predictor's stages and the one corrector, whatever the schedule."""
        return cls.num_stage_norms + 1

    @classmethod
    def num_parameters(cls, num_layers: int, dim: int) -> int:
        """Count the mix and the predictor."""
        predictor = MovingAverageRungeKutta.num_parameters(cls.num_stage_norms, dim)
        return Mix.num_parameters(num_layers, dim) + predictor

    def advance(
        self,
        layer: int,
        field: Evaluate,
        hidden: Tensor,
        estimates: Sequence[Tensor],
        num_corrections: int,
    ) -> Advance:
        """Predict, correct once, mix."""
        prediction = self.mix.prediction_norms[layer](self.predictor(field, hidden))
        mix = self.mix.of_layer(layer, estimates, evaluates=True)
        estimate = self.mix.correction_norms[layer](field(mix.evaluation_point(prediction)))
        return Advance(mix.hidden(estimate), estimate)


class PredictorCorrectorRK4(PredictorCorrectorRK2):
    """Predict with a Runge-Kutta step of order 4, correct once.

    Cost: 5 evaluations per layer.
    Source: Li et al. 2024 (PCformer).
    Not to be confused with: `ode_rk4`, which has fixed coefficients and neither corrector nor mix.
    """

    num_stage_norms: ClassVar[int] = 4
