"""The implicit Euler method, solved by a fixed number of fixed-point corrections. This is IIET.

There is no stopping rule: the number of corrections is the cost, and cost is planned before
anything runs. Only observers (`Decoder.forward(observe=)`) compute residuals, which show how well
an iteration converges. Damping as in Bai et al. 2019 (deep equilibrium models), the truncated
backward pass as in truncated backpropagation through time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from iiet.arithmetic import at_least_float32
from iiet.methods.base import Advance, Evaluate, Layer
from iiet.mix import EstimateNorm, History, Mix, start
from iiet.schedule import IterationSchedule

__all__ = ["ImplicitEuler", "ImplicitEulerOptions", "fixed_point"]


def fixed_point(
    step: Callable[[Tensor], Tensor],
    guess: Callable[[], Tensor],
    num_steps: int,
    *,
    damping: Tensor | float | None = None,
    num_differentiated: int | None = None,
) -> Tensor:
    """Iterate `e <- e + damping * (step(e) - e)`, `num_steps` times.

    Args:
        step: the map g whose fixed point is sought, (batch, time, dim) to the same shape.
        guess: makes the start value, which is the result if there are no steps.
        num_steps: how often to apply the map, at least 0.
        damping: the share of each step that is applied, a number or a tensor of one element; None
            for all of it, `e <- step(e)`.
        num_differentiated: gradients flow only through this many last steps; the guess and the
            earlier steps are constants and keep nothing. None for all.
    """

    def iterate(value: Tensor, times: int) -> Tensor:
        for _ in range(times):
            value = step(value) if damping is None else torch.lerp(value, step(value), damping)
        return value

    num_constant = 0 if num_differentiated is None else max(0, num_steps - num_differentiated)
    if not num_constant or not torch.is_grad_enabled():
        return iterate(guess(), num_steps)
    with torch.no_grad():
        value = iterate(guess(), num_constant)
    # Older versions of PyTorch would reuse weights that autocast cast without gradients here.
    torch.clear_autocast_cache()
    return iterate(value, num_steps - num_constant)


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
    reinject_prediction: bool = False
    """Whether each correction also reads the prediction, with one learned weight per layer that
    starts at 0."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name in ("learn_damping", "reinject_prediction"):
            if type(getattr(self, name)) is not bool:
                problems.append(f"{name} must be true or false, got {getattr(self, name)!r}")
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

    With damping d, a correction applies only that share of its step: `e + d (N_l(...) - e)`. Where
    the prediction e^0 is reinjected, `b_l e^0` is added to the point of each correction; b_l is
    learned and starts at 0.

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
        options = self.options
        self.damping = nn.Parameter(torch.empty(1)) if options.learn_damping else None
        self.reinjection = nn.Parameter(torch.empty(1)) if options.reinject_prediction else None
        self.reset_parameters()

    @classmethod
    def start(cls, embeddings: Tensor, num_layers: int) -> History:
        return start(embeddings, num_layers)

    @classmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer: int) -> int:
        return 1 + schedule[layer]

    def reset_parameters(self) -> None:
        self.mix.reset_parameters()
        if self.damping is not None:
            nn.init.constant_(self.damping, self.options.damping)
        if self.reinjection is not None:
            nn.init.zeros_(self.reinjection)

    def advance(
        self,
        evaluate: Evaluate,
        hidden: Tensor,
        state: History,
        *,
        num_corrections: int,
        **_: Any,
    ) -> Advance:
        mix = self.mix(state, dtype=hidden.dtype, corrects=num_corrections > 0)
        has_gradients = torch.is_grad_enabled()

        def predict() -> Tensor:
            nonlocal mix
            prediction = evaluate(hidden, norm=self.prediction_norm)
            if self.reinjection is not None and num_corrections > 0:
                # The weight is learned even where the prediction is a constant.
                with torch.set_grad_enabled(has_gradients):
                    weight = at_least_float32(self.reinjection).squeeze()
                    mix = mix.with_prediction(prediction, weight)
            return prediction

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
