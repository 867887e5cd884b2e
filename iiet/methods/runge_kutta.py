"""Explicit Runge-Kutta stages, and the predictor of PCformer that is made of them.

A method of order 2 or 4 evaluates as many stages, each at the start or some way along the stage
before:

    RK2   k1 = K(h); k2 = K(h + k1)
    RK4   k1 = K(h); k2 = K(h + k1/2); k3 = K(h + k2/2); k4 = K(h + k3)

What a stage is made of (K) and how the stages are weighed differs between methods. PCformer's
predictor normalizes each evaluation and weighs with the coefficients of an exponential moving
average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from iiet.mix import EstimateNorm, KeepsFloat32

__all__ = ["MovingAverageRungeKutta", "runge_kutta_stages"]

_STEPS: Final = {2: (1.0,), 4: (0.5, 0.5, 1.0)}
"""By order: how far along the stage before the second and each later stage is made."""

_INITIAL_ALPHA = 0.5


def runge_kutta_stages(
    stage: Callable[[int, Tensor], Tensor], start: Tensor, order: int
) -> list[Tensor]:
    """Make the stages `k_1, ..., k_order`.

    Args:
        stage: makes a stage from its number, the first being 0, and the point where it is
            evaluated.
        start: h, where the first stage is evaluated, (batch, time, dim).
        order: 2 or 4.
    """
    stages = [stage(0, start)]
    for number, step in enumerate(_STEPS[order], start=1):
        stages.append(stage(number, torch.add(start, stages[-1], alpha=step)))
    return stages


class MovingAverageRungeKutta(KeepsFloat32):
    """Predict a layer's output from `order` evaluations.

        k_j = R_j(F(...));   p = h + sum_j a (1-a)^(order-j) k_j

    Later stages weigh most. The norms R_j and the learned a are shared by all layers.

    Args:
        order: 2 or 4.
        dim: width of the hidden state.
        layer_norm_eps: epsilon of the stage norms.
    """

    def __init__(self, order: int, dim: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.order = order
        self.norms = nn.ModuleList(EstimateNorm(dim, eps=layer_norm_eps) for _ in range(order))
        self.alpha = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start a at one half."""
        nn.init.constant_(self.alpha, _INITIAL_ALPHA)

    @staticmethod
    def num_parameters(order: int, dim: int) -> int:
        """Count the stage norms and a."""
        return order * 2 * dim + 1

    def coefficients(self) -> Tensor:
        """Return the weights of the stages, (order,): `a (1-a)^(order-j)` for j = 1..order."""
        powers = torch.arange(self.order - 1, -1, -1, device=self.alpha.device)
        return self.alpha * (1 - self.alpha) ** powers

    def forward(self, evaluate: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        """Return the prediction `p`, (batch, time, dim)."""

        def stage(number: int, point: Tensor) -> Tensor:
            return evaluate(point.to(hidden.dtype), norm=self.norms[number])

        prediction = hidden
        stages = runge_kutta_stages(stage, hidden, self.order)
        for coefficient, value in zip(self.coefficients(), stages, strict=True):
            prediction = torch.addcmul(prediction, value, coefficient)
        return prediction
