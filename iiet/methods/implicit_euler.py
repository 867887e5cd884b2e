"""The implicit Euler method, solved by a fixed number of fixed-point corrections. This is IIET."""

# ruff: noqa: ARG002, ARG003 - all methods share their signatures

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from iiet.methods.base import Advance, Evaluate, Layer
from iiet.mix import EstimateNorm, History, Mix, start
from iiet.precision import at_least_float32
from iiet.schedule import IterationSchedule
from iiet.solvers import fixed_point

__all__ = ["ImplicitEuler", "ImplicitEulerOptions"]


@dataclass(frozen=True, kw_only=True)
class ImplicitEulerOptions:
    """How the corrections are made.

    Raises:
        ValueError: naming every field that is out of range.
    """

    damping: float = 1.0
    """Share of each correction that is applied, in (0, 1]; 1 applies all of it. 0 is allowed if the
    damping is learned: the layer then starts as if it had no corrections."""
    learn_damping: bool = False
    """Whether each layer learns its damping, starting from `damping`."""
    differentiated_corrections: int | None = None
    """Training differentiates only this many last corrections of each layer, at least 1; the
    evaluations before are constants. None: all are differentiated."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        learned: object = self.learn_damping
        if type(learned) is not bool:
            problems.append(f"learn_damping must be true or false, got {learned!r}")
        damping = self.damping
        if type(damping) not in (int, float) or not math.isfinite(damping) or not 0 <= damping <= 1:
            problems.append(f"damping must be a number from 0 to 1, got {damping!r}")
        elif damping == 0 and not self.learn_damping:
            problems.append(
                "damping 0 takes nothing of a correction; set learn_damping=true with it"
            )
        last = self.differentiated_corrections
        if last is not None and (type(last) is not int or last < 1):
            problems.append(f"differentiated_corrections must be at least 1 or None, got {last!r}")
        if problems:
            raise ValueError("; ".join(problems))


class ImplicitEuler(Layer):
    """Predict once, then correct `r_l` times towards the fixed point.

        e   = P_l(F_l(h_{l-1}))                                        prediction
        e   = N_l(F_l(sum_{k<l} A[l,k] s_k + A[l,l] e))                correction, r_l times
        s_l = e;   h_l = sum_{k<=l} C[l,k] s_k

    With damping d, a correction applies only that share of its step: `e + d (N_l(...) - e)`.

    Cost: `1 + r_l` evaluations per layer.
    Source: the IIET paper, checked against its published code; options: this project.
    Not to be confused with: looping a block (`h = F(F(h))`), where each evaluation reads
    only the one before it; here each correction also reads the earlier layers' estimates.
    """

    Options = ImplicitEulerOptions
    has_corrections: ClassVar[bool] = True
    num_left: ClassVar[int] = 1

    def build(self, dim: int, layer_norm_eps: float) -> None:
        self.prediction_norm = EstimateNorm(dim, eps=layer_norm_eps)
        self.correction_norm = EstimateNorm(dim, eps=layer_norm_eps)
        self.mix = Mix(self.index)
        self.damping = nn.Parameter(torch.empty(1)) if self.options.learn_damping else None
        self.reset_parameters()

    @classmethod
    def start(cls, embeddings: Tensor, num_layers: int) -> History:
        return start(embeddings, num_layers)

    @classmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer: int) -> int:
        return 1 + schedule[layer]

    @classmethod
    def num_differentiated(
        cls, schedule: IterationSchedule, layer: int, options: ImplicitEulerOptions
    ) -> int:
        last = options.differentiated_corrections
        return 1 + schedule[layer] if last is None or schedule[layer] <= last else last

    @classmethod
    def flops_beside_fields(
        cls, schedule: IterationSchedule, layer: int, dim: int, options: ImplicitEulerOptions
    ) -> int:
        return Mix.num_flops(layer, dim, num_points=schedule[layer])

    @classmethod
    def num_kept(
        cls, schedule: IterationSchedule, layer: int, options: ImplicitEulerOptions
    ) -> int:
        """Count the input of each norm and the estimate before each correction; with learned
        damping, also each correction without its damping.
        """
        norms = cls.num_differentiated(schedule, layer, options)
        corrections = min(norms, schedule[layer])
        return norms + corrections * (1 + options.learn_damping)

    @classmethod
    def num_parameters(cls, num_layers: int, dim: int, options: ImplicitEulerOptions) -> int:
        rows = sum(map(Mix.num_parameters, range(num_layers)))
        return rows + num_layers * (4 * dim + options.learn_damping)

    def reset_parameters(self) -> None:
        self.mix.reset_parameters()
        if self.damping is not None:
            nn.init.constant_(self.damping, self.options.damping)

    def advance(
        self,
        evaluate: Evaluate,
        hidden: Tensor,
        state: History,
        *,
        num_corrections: int,
        shared: nn.Module | None,
    ) -> Advance:
        mix = self.mix(state, dtype=hidden.dtype, corrects=num_corrections > 0)

        def predict() -> Tensor:
            return evaluate(hidden, norm=self.prediction_norm)

        def correct(estimate: Tensor) -> Tensor:
            return evaluate(mix.point(estimate), norm=self.correction_norm, previous=estimate)

        estimate = fixed_point(
            correct,
            predict,
            num_corrections,
            damping=self._damping(),
            num_differentiated=self.options.differentiated_corrections,
        )
        return Advance(*mix.leave(estimate))

    def _damping(self) -> Tensor | float | None:
        if self.damping is not None:
            return at_least_float32(self.damping)
        damping: float = self.options.damping
        return None if damping == 1.0 else damping
