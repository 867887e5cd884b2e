"""Explicit Runge-Kutta stages, and PCformer's predictor, which is made of them.

    RK2   k1 = K(h); k2 = K(h + k1)
    RK4   k1 = K(h); k2 = K(h + k1/2); k3 = K(h + k2/2); k4 = K(h + k3)

Methods differ in what a stage computes (K) and in how they weigh the stages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from iiet.mix import EstimateNorm
from iiet.precision import KeepsFloat32

__all__ = ["MovingAverageRungeKutta", "runge_kutta_stages"]

_STEPS: Final = {2: (1.0,), 4: (0.5, 0.5, 1.0)}
"""By order: how far along the previous stage each stage after the first is evaluated."""


def runge_kutta_stages(
    stage: Callable[[int, Tensor], Tensor], start: Tensor, order: int
) -> list[Tensor]:
    """Compute `k_1, ..., k_order` from h, (batch, time, dim); the order is 2 or 4.

    `stage` computes K from a stage's number, the first being 0, and its point.
    """
    stages = [stage(0, start)]
    for number, step in enumerate(_STEPS[order], start=1):
        stages.append(stage(number, torch.add(start, stages[-1], alpha=step)))
    return stages


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

    @staticmethod
    def num_parameters(order: int, dim: int) -> int:
        return order * 2 * dim + 1  # stage norms and a

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
