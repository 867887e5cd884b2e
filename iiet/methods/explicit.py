"""Explicit methods: evaluations only, without the mix.

A field holds its residual connections, so the right-hand side of the differential equation is
`G(x) = F(x) - x`. Explicit Euler, `h + G(h)`, is the plain Llama decoder; a looped decoder repeats
it with the same weights; the Runge-Kutta methods are its higher orders (the ODE Transformer's
blocks):

    RK2   k1 = K(h); k2 = K(h + k1)
    RK4   k1 = K(h); k2 = K(h + k1/2); k3 = K(h + k2/2); k4 = K(h + k3)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from iiet.methods.base import Advance, Evaluate, Layer
from iiet.model.config import ModelConfig
from iiet.model.facts import facts_of

__all__ = [
    "ExplicitEuler", "ExplicitRK2", "ExplicitRK4", "GatedRK2", "Looped", "runge_kutta_stages",
]  # fmt: skip


class ExplicitEuler(Layer):
    """Advance by one evaluation.

        h_l = F_l(h_{l-1})

    Cost: 1 evaluation per layer; no parameters.
    Source: Touvron et al. 2023 (Llama); as Euler's method, Weinan 2017.
    Not to be confused with: implicit Euler without corrections, which costs the same but has the
    learned mix.
    """

    def advance(self, evaluate: Evaluate, hidden: Tensor, state: Any, **_: Any) -> Advance:
        return Advance(evaluate(hidden), state)


class Looped(ExplicitEuler):
    """Run the stack of layers `1 + r` times.

        h = h_0
        repeat 1 + r times:
          for l = 1..L:   h = F_l(h)

    All layers have the same number r of corrections, here of repetitions of the stack; with r = 0
    this is the plain decoder. The hidden states `h_1..h_L` are those of the last run.

    Cost: `1 + r` evaluations per layer; no parameters.
    Source: Dehghani et al. 2019 (Universal Transformer); Saunshi et al. 2025 (looped transformers).
    Not to be confused with: IIET, whose layers repeat their own evaluation before the next layer
    begins, and read the earlier layers' estimates.
    """

    facts = facts_of("looped")


_STEPS: Final = {1: (), 2: (1.0,), 4: (0.5, 0.5, 1.0)}
"""By order: how far along the previous stage each stage after the first is evaluated."""


def runge_kutta_stages(
    stage: Callable[[int, Tensor], Tensor], start: Tensor, order: int
) -> list[Tensor]:
    """Compute `k_1, ..., k_order` from h, (batch, time, dim); the order is 1, 2 or 4.

    `stage` computes K from a stage's number, the first being 0, and its point.
    """
    stages = [stage(0, start)]
    for number, step in enumerate(_STEPS[order], start=1):
        stages.append(stage(number, torch.add(start, stages[-1], alpha=step)))
    return stages


class ExplicitRK2(Layer):
    """Advance by the Runge-Kutta method of order 2.

        k1 = G(h); k2 = G(h + k1);   h_l = h + (k1 + k2) / 2;   h = h_{l-1}, G(x) = F_l(x) - x

    Cost: 2 evaluations per layer; no parameters.
    Source: Li et al. 2022 (ODE Transformer), RK2-block with fixed coefficients.
    Not to be confused with: PCformer's predictor, which has norms and learned weights.
    """

    facts = facts_of("ode_rk2")
    coefficients: ClassVar[tuple[float, ...]] = (1 / 2, 1 / 2)
    """Weights of the stages; they sum to one."""

    def advance(self, evaluate: Evaluate, hidden: Tensor, state: Any, **_: Any) -> Advance:
        order = self.facts.num_evaluations
        # Of G(x), the same for all stages.
        stages = runge_kutta_stages(lambda _, x: evaluate(x) - x, hidden, order)
        return Advance(self.combine(hidden, stages), state)

    def combine(self, hidden: Tensor, stages: list[Tensor]) -> Tensor:
        """Add the stages to the hidden state, each (batch, time, dim)."""
        for coefficient, stage in zip(self.coefficients, stages, strict=True):
            hidden = torch.add(hidden, stage, alpha=coefficient)
        return hidden


class ExplicitRK4(ExplicitRK2):
    """Advance by the classical Runge-Kutta method of order 4.

        h_l = h + (k1 + 2 k2 + 2 k3 + k4) / 6, stages as in `runge_kutta_stages`

    Cost: 4 evaluations per layer; no parameters.
    Source: Li et al. 2022 (ODE Transformer), RK4-block.
    Not to be confused with: `pcformer_rk4`, a predictor followed by a corrector.
    """

    facts = facts_of("ode_rk4")
    coefficients: ClassVar[tuple[float, ...]] = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class GatedRK2(ExplicitRK2):
    """Advance by two stages that a gate weighs for each token.

        g = sigmoid(W_l [k1, k2] + b_l);   h_l = h + g k1 + (1 - g) k2, stages as in `ExplicitRK2`

    The gate is one number per token and layer; where it is 1/2, this is `ExplicitRK2`.

    Cost: 2 evaluations per layer; `2 dim + 1` parameters per layer.
    Source: Li et al. 2022 (ODE Transformer), RK2-block with learnable coefficients.
    Not to be confused with: PCformer's learned a, one number for the whole model.
    """

    facts = facts_of("ode_rk2_gated")

    def build(self, config: ModelConfig) -> None:
        self.gate = nn.Linear(2 * config.dim, 1)

    def combine(self, hidden: Tensor, stages: list[Tensor]) -> Tensor:
        gate = torch.sigmoid(self.gate(torch.cat(stages, -1)))
        first, second = stages
        return hidden + torch.lerp(second, first, gate.to(first.dtype))
