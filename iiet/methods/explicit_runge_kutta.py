"""Explicit Runge-Kutta methods: several evaluations per layer and no mix. These are the ODE
Transformer's blocks.

A field holds its residual connections, so that the right-hand side of the differential equation is
`G(x) = F(x) - x`; explicit Euler, `h + G(h)`, is then the plain decoder exactly, and these are its
higher orders.
"""

# ruff: noqa: ARG002, ARG003 - all methods share their signatures

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from iiet.methods.base import Advance, Evaluate, Layer
from iiet.methods.runge_kutta import runge_kutta_stages
from iiet.schedule import IterationSchedule

__all__ = ["ExplicitRK2", "ExplicitRK4", "GatedRK2"]


class ExplicitRK2(Layer):
    """Advance by the Runge-Kutta method of order 2 with fixed coefficients.

        k1 = G(h); k2 = G(h + k1);   h_l = h + (k1 + k2) / 2;   h = h_{l-1}, G(x) = F_l(x) - x

    Cost: 2 evaluations per layer; no parameters.
    Source: Li et al. 2022 (ODE Transformer), RK2-block with fixed coefficients.
    Not to be confused with: the predictor of PCformer, which normalizes each evaluation and learns
    its coefficients.
    """

    coefficients: ClassVar[tuple[float, ...]] = (1 / 2, 1 / 2)
    """Weights of the stages, as many as the order; they sum to one."""

    @classmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer: int) -> int:
        """Return the number of stages, whatever the schedule."""
        return len(cls.coefficients)

    @classmethod
    def num_parameters(cls, num_layers: int, dim: int, options: Any) -> int:
        """Return 0."""
        return 0

    def advance(
        self,
        evaluate: Evaluate,
        hidden: Tensor,
        state: Any,
        *,
        num_corrections: int,
        shared: nn.Module | None,
    ) -> Advance:
        """Add the weighted stages."""
        stages = runge_kutta_stages(_increments(evaluate), hidden, len(self.coefficients))
        for coefficient, stage in zip(self.coefficients, stages, strict=True):
            hidden = torch.add(hidden, stage, alpha=coefficient)
        return Advance(hidden, state)


class ExplicitRK4(ExplicitRK2):
    """Advance by the classical Runge-Kutta method of order 4 with fixed coefficients.

        h_l = h + (k1 + 2 k2 + 2 k3 + k4) / 6, stages as in `runge_kutta`

    Cost: 4 evaluations per layer; no parameters.
    Source: Li et al. 2022 (ODE Transformer), RK4-block.
    Not to be confused with: `pcformer_rk4`, a predictor with a corrector behind it.
    """

    coefficients: ClassVar[tuple[float, ...]] = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class GatedRK2(Layer):
    """Advance by two stages whose weights each token chooses by a gate.

        g = sigmoid(W_l [k1, k2] + b_l);   h_l = h + g k1 + (1 - g) k2, stages as in `ExplicitRK2`

    The gate is one number per token and layer. With W = 0 and b = 0 it is 1/2, and this is
    `ExplicitRK2`.

    Cost: 2 evaluations per layer; `2 dim + 1` parameters per layer.
    Source: Li et al. 2022 (ODE Transformer), RK2-block with learnable coefficients.
    Not to be confused with: PCformer's learned a, one number for the whole model.
    """

    def build(self, dim: int, layer_norm_eps: float) -> None:
        """Make the gate."""
        self.gate = nn.Linear(2 * dim, 1)

    @classmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer: int) -> int:
        """Return 2, whatever the schedule."""
        return 2

    @classmethod
    def flops_beside_fields(
        cls, schedule: IterationSchedule, layer: int, dim: int, options: Any
    ) -> int:
        """Count the gate."""
        return 2 * 2 * dim

    @classmethod
    def num_kept(cls, schedule: IterationSchedule, layer: int, options: Any) -> int:
        """Count both stages, as the sum and as the gate keep them."""
        return 4

    @classmethod
    def num_parameters(cls, num_layers: int, dim: int, options: Any) -> int:
        """Count the gates."""
        return num_layers * (2 * dim + 1)

    def advance(
        self,
        evaluate: Evaluate,
        hidden: Tensor,
        state: Any,
        *,
        num_corrections: int,
        shared: nn.Module | None,
    ) -> Advance:
        """Add the stages as the gate weighs them."""
        first, second = runge_kutta_stages(_increments(evaluate), hidden, 2)
        gate = torch.sigmoid(self.gate(torch.cat([first, second], -1)))
        return Advance(hidden + torch.lerp(second, first, gate.to(first.dtype)), state)


def _increments(evaluate: Evaluate) -> Callable[[int, Tensor], Tensor]:
    """Return the stages' right-hand side `G(x) = F(x) - x`, which is the same for all of them."""
    return lambda _, point: evaluate(point) - point
