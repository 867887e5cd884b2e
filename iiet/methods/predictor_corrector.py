"""PCformer: a Runge-Kutta prediction, corrected once through the mix."""

# ruff: noqa: ARG003 - all methods share their signatures

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from iiet.arithmetic import KeepsFloat32
from iiet.methods.base import Advance, Evaluate, Layer
from iiet.methods.explicit import runge_kutta_stages
from iiet.mix import EstimateNorm, History, Mix, start
from iiet.schedule import IterationSchedule

__all__ = ["MovingAverageRungeKutta", "PredictorCorrectorRK2", "PredictorCorrectorRK4"]


class MovingAverageRungeKutta(KeepsFloat32):
    """Predict a layer's output from `order` (2 or 4) evaluations, the later ones weighing most.

        k_j = R_j(F(...));   p = h + sum_j a (1-a)^(order-j) k_j

    The norms R_j and the learned a are shared by all layers.
    """

    def __init__(self, order: int, dim: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.order = order
        self.norms = nn.ModuleList(EstimateNorm(dim, eps=layer_norm_eps) for _ in range(order))
        self.alpha = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start a at one half."""
        nn.init.constant_(self.alpha, 0.5)

    def coefficients(self) -> Tensor:
        """Return the weights of the stages, (order,)."""
        powers = torch.arange(self.order - 1, -1, -1, device=self.alpha.device)
        return self.alpha * (1 - self.alpha) ** powers

    def forward(self, evaluate: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        """Return the prediction p, (batch, time, dim)."""

        def stage(number: int, point: Tensor) -> Tensor:
            return evaluate(point.to(hidden.dtype), norm=self.norms[number])

        prediction = hidden
        stages = runge_kutta_stages(stage, hidden, self.order)
        for coefficient, value in zip(self.coefficients(), stages, strict=True):
            prediction = torch.addcmul(prediction, value, coefficient)
        return prediction


class PredictorCorrectorRK2(Layer):
    """Predict with a Runge-Kutta step of order 2, correct once.

        p   = RK2(F_l, h_{l-1}), see `runge_kutta`
        s_l = N_l(F_l(sum_{k<l} A[l,k] s_k + A[l,l] P_l(p)))
        h_l = sum_{k<=l} C[l,k] s_k

    The predictor's norms and coefficient are shared by all layers.

    Cost: 3 evaluations per layer.
    Source: Li et al. 2024 (PCformer), checked against its published code.
    Not to be confused with: IIET with two corrections, whose prediction is one plain evaluation.
    """

    num_left: ClassVar[int] = 1
    order: ClassVar[int] = 2
    """Order of the predictor, and the number of its evaluations, each with a norm."""

    def build(self, dim: int, layer_norm_eps: float) -> None:
        self.prediction_norm = EstimateNorm(dim, eps=layer_norm_eps)
        self.correction_norm = EstimateNorm(dim, eps=layer_norm_eps)
        self.mix = Mix(self.index)

    @classmethod
    def make_shared(cls, *, dim: int, layer_norm_eps: float, options: Any) -> nn.Module:
        return MovingAverageRungeKutta(cls.order, dim, layer_norm_eps)

    @classmethod
    def start(cls, embeddings: Tensor, num_layers: int) -> History:
        return start(embeddings, num_layers)

    @classmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer: int) -> int:
        return cls.order + 1  # the corrector

    def reset_parameters(self) -> None:
        self.mix.reset_parameters()

    def advance(
        self,
        evaluate: Evaluate,
        hidden: Tensor,
        state: History,
        *,
        shared: nn.Module | None,
        **_: Any,
    ) -> Advance:
        assert shared is not None
        prediction = self.prediction_norm(shared(evaluate, hidden))
        mix = self.mix(state, dtype=hidden.dtype, corrects=True)
        estimate = evaluate(mix.point(prediction), norm=self.correction_norm, previous=prediction)
        return Advance(*mix.leave(estimate))


class PredictorCorrectorRK4(PredictorCorrectorRK2):
    """Predict with a Runge-Kutta step of order 4, correct once.

    Cost: 5 evaluations per layer.
    Source: Li et al. 2024 (PCformer).
    Not to be confused with: `ode_rk4`, which has fixed coefficients and neither corrector nor mix.
    """

    order: ClassVar[int] = 4
