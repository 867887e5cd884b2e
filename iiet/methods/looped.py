"""The looped decoder: the whole stack of layers runs several times with the same weights."""

from __future__ import annotations

from typing import ClassVar

from iiet.methods.explicit_euler import ExplicitEuler
from iiet.schedule import IterationSchedule

__all__ = ["Looped"]


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

    has_corrections: ClassVar[bool] = True
    repeats_stack: ClassVar[bool] = True

    @classmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer: int) -> int:
        return 1 + schedule[layer]
