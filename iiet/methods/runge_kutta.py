"""Explicit Runge-Kutta stages with learned step coefficients: the predictors of PCformer.

    RK2   k1 = R_1(F(h)); k2 = R_2(F(h + k1))
          p  = h + a(1-a) k1 + a k2
    RK4   k1 = R_1(F(h)); k2 = R_2(F(h + k1/2)); k3 = R_3(F(h + k2/2)); k4 = R_4(F(h + k3))
          p  = h + a(1-a)^3 k1 + a(1-a)^2 k2 + a(1-a) k3 + a k4

The coefficients are those of an exponential moving average with one learned a; later stages weigh most. The norms R_j
and a are shared by all layers.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from iiet.methods.base import Evaluate

__all__ = ["STAGE_STEPS", "MovingAverageRungeKutta"]

STAGE_STEPS: Final = {2: (0.0, 1.0), 4: (0.0, 0.5, 0.5, 1.0)}
"""By order: how far along the stage before each stage is evaluated. The first stage is evaluated at h itself."""

_INITIAL_ALPHA = 0.5


class MovingAverageRungeKutta(nn.Module):
    """Predict a layer's output from `order` evaluations.

    Args:
        order: 2 or 4, which is also the number of stages.
        dim: width of the hidden state.
        layer_norm_eps: epsilon of the stage norms.
    """

    def __init__(self, order: int, dim: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.steps = STAGE_STEPS[order]
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=layer_norm_eps) for _ in self.steps)
        self.alpha = nn.Parameter(torch.tensor([_INITIAL_ALPHA]))

    @staticmethod
    def num_parameters(order: int, dim: int) -> int:
        """Count the stage norms and a."""
        return order * 2 * dim + 1

    def coefficients(self) -> Tensor:
        """Return the weights of the stages, (order,): `a (1-a)^(order-j)` for stage j = 1..order."""
        powers = torch.arange(len(self.steps) - 1, -1, -1, device=self.alpha.device)
        return self.alpha * (1 - self.alpha) ** powers

    def forward(self, field: Evaluate, hidden: Tensor) -> Tensor:
        """Return the prediction `p`, (batch, time, dim)."""
        prediction = hidden
        stage = hidden
        coefficients = self.coefficients()
        for step, norm, coefficient in zip(self.steps, self.norms, coefficients, strict=True):
            point = hidden if step == 0.0 else torch.add(hidden, stage, alpha=step)
            stage = norm(field(point))
            prediction = torch.addcmul(prediction, stage, coefficient)
        return prediction
