"""The explicit Euler method: one evaluation per layer. This is the plain Llama decoder."""

# ruff: noqa: ARG002, ARG003 - all methods share their signatures

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from iiet.methods.base import Advance, Evaluate, Layer
from iiet.schedule import IterationSchedule

__all__ = ["ExplicitEuler"]


class ExplicitEuler(Layer):
    """Advance by one evaluation.

        h_l = F_l(h_{l-1})

    Cost: 1 evaluation per layer; no parameters.
    Source: Touvron et al. 2023 (Llama); as Euler's method, Weinan 2017.
    Not to be confused with: implicit Euler without corrections, which costs the same but has the
    learned mix.
    """

    @classmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer: int) -> int:
        return 1

    @classmethod
    def num_parameters(cls, num_layers: int, dim: int, options: Any) -> int:
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
        return Advance(evaluate(hidden), state)
