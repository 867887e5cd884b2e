"""The methods that read earlier layers' estimates through the learned mix: IIET and PCformer.

IIET is the implicit Euler method, solved by a fixed number of fixed-point corrections. There is no
stopping rule: the number of corrections is the cost, and cost is planned before anything runs.
Damping as in Bai et al. 2019 (deep equilibrium models), the truncated backward pass as in truncated
backpropagation through time. PCformer corrects a Runge-Kutta prediction once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from iiet.methods.base import Advance, Evaluate, Layer
from iiet.methods.explicit import runge_kutta_stages
from iiet.model.config import ModelConfig
from iiet.model.facts import StartKind, facts_of
from iiet.model.layers import KeepsFloat32, at_least_float32
from iiet.model.mix import BlendedNorm, EstimateNorm, History, Mix

__all__ = [
    "ImplicitEuler", "MixedLayer", "MovingAverageRungeKutta",
    "PredictorCorrectorRK2", "PredictorCorrectorRK4", "damped", "fixed_point",
]  # fmt: skip


class MixedLayer(Layer):
    """Base of the methods that read the earlier layers' estimates."""

    def build(self, config: ModelConfig) -> None:
        self.build_mix(config, "mean")

    def build_mix(self, config: ModelConfig, start: StartKind) -> None:
        """Make the rows of the mix, and the norms of what goes into it."""
        norm = EstimateNorm if start == "mean" else BlendedNorm
        self.prediction_norm = norm(config.dim, eps=config.layer_norm_eps)
        self.correction_norm = norm(config.dim, eps=config.layer_norm_eps)
        self.mix = Mix(self.index, start=start)

    @classmethod
    def start(cls, embeddings: Tensor) -> History:
        return History.started(embeddings)

    def reset_parameters(self) -> None:
        self.mix.reset_parameters()


def damped(before: Tensor, after: Tensor, damping: Tensor | float | None) -> Tensor:
    """Return `before + damping * (after - before)`; None stands for 1. At 0 it is `before` to the
    last bit."""
    return after if damping is None else torch.lerp(before, after, damping)


def fixed_point(
    step: Callable[[Tensor], Tensor],
    guess: Tensor,
    num_steps: int,
    *,
    damping: Tensor | float | None = None,
    num_constant: int = 0,
) -> Tensor:
    """Iterate `e <- e + damping * (step(e) - e)`, `num_steps` times.

    Args:
        step: the map g whose fixed point is sought, (batch, time, dim) to the same shape.
        guess: the start value, which is the result if there are no steps.
        num_steps: how often to apply the map, at least 0.
        damping: the share of each step that is applied, a number or a tensor of one element or of
            one per channel, (dim,); None for all of it, `e <- step(e)`.
        num_constant: the first steps that are constants to gradients, and keep nothing.
    """

    def iterate(value: Tensor, times: int) -> Tensor:
        for _ in range(times):
            value = damped(value, step(value), damping)
        return value

    if num_constant == 0:
        return iterate(guess, num_steps)
    with torch.no_grad():
        value = iterate(guess, num_constant)
    # Older versions of PyTorch would reuse weights that autocast cast without gradients here.
    torch.clear_autocast_cache()
    return iterate(value, num_steps - num_constant)


class ImplicitEuler(MixedLayer):
    """Predict once, then correct `r_l` times towards the fixed point.

        e   = P_l(F_l(h_{l-1}))                                        prediction
        e   = N_l(F_l(sum_{k<l} A[l,k] s_k + A[l,l] e))                correction, r_l times
        s_l = e;   h_l = sum_{k<=l} C[l,k] s_k

    With damping d, a correction applies only that share of its step: `e + d (N_l(...) - e)`. Where
    the prediction e^0 is reinjected, `w_l e^0` is added to the point of each correction; w_l is
    learned and starts at 0.

    With an identity start, `x + b (norm(x) - x)` stands for each norm, with a learned b per norm
    and channel; b and the damping start at 0, and the rows of A and C read the newest estimate
    alone. So e and h_l are F_l(h_{l-1}) to the last bit, whatever r_l.

    Cost: `1 + r_l` evaluations per layer.
    Source: the IIET paper, checked against its published code; options: this project.
    Not to be confused with: looping a block (`h = F(F(h))`), where each evaluation reads
    only the one before it; here each correction also reads the earlier layers' estimates.
    """

    facts = facts_of("iiet")

    def build(self, config: ModelConfig) -> None:
        options = self.options
        self.build_mix(config, options.start)
        self.damping: nn.Parameter | None = None
        if options.learn_damping is not False:
            size = config.dim if options.learn_damping == "vector" else 1
            self.damping = nn.Parameter(torch.empty(size))
        self.reinjection = nn.Parameter(torch.empty(1)) if options.reinject_prediction else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.damping is not None:
            nn.init.constant_(self.damping, self.options.first_damping)
        if self.reinjection is not None:
            nn.init.zeros_(self.reinjection)

    def gates(self) -> Iterator[nn.Parameter]:
        if self.damping is not None:
            yield self.damping
        for norm in (self.prediction_norm, self.correction_norm):
            if isinstance(norm, BlendedNorm):
                yield norm.blend

    def advance(
        self, evaluate: Evaluate, hidden: Tensor, state: History, *, num_corrections: int, **_: Any
    ) -> Advance:
        damping = self._damping()
        point_sum, hidden_sum = self.mix.sums(state.estimates, corrects=num_corrections > 0)
        num_constant = self._num_constant(num_corrections)
        # What comes before a constant correction is a constant, too.
        with torch.set_grad_enabled(torch.is_grad_enabled() and num_constant == 0):
            prediction = evaluate(
                hidden,
                norm=self.prediction_norm,
                output_if_last=None if damping is None else lambda prediction: prediction,
            )
        if point_sum is None:
            return Advance(hidden_sum.plus(prediction, hidden.dtype), state.followed_by(prediction))
        points = point_sum
        if self.reinjection is not None:
            points = points.with_term(at_least_float32(self.reinjection), prediction)

        def correct(estimate: Tensor) -> Tensor:
            point = points.plus(estimate, hidden.dtype)
            return evaluate(
                point,
                norm=self.correction_norm,
                previous=estimate,
                output_if_last=(
                    None if damping is None else lambda after: damped(estimate, after, damping)
                ),
            )

        estimate = fixed_point(
            correct,
            prediction,
            num_corrections,
            damping=damping,
            num_constant=num_constant,
        )
        return Advance(hidden_sum.plus(estimate, hidden.dtype), state.followed_by(estimate))

    def _num_constant(self, num_corrections: int) -> int:
        """Count the first corrections that are constants to gradients."""
        num_differentiated: int | None = self.options.differentiated_corrections
        if num_differentiated is None or not torch.is_grad_enabled():
            return 0
        return max(0, num_corrections - num_differentiated)

    def _damping(self) -> Tensor | float | None:
        """Return the share of each correction that is applied; None for all of it."""
        if self.damping is not None:
            return at_least_float32(self.damping)
        return None if self.options.damping == 1.0 else self.options.damping


class MovingAverageRungeKutta(KeepsFloat32):
    """Predict a layer's output from the stages of a Runge-Kutta step, the last weighing most.

        p = h + sum_j a (1-a)^(n-j) k_j,   k_j = R_j(F(...)),   n stages

    The norms R_j of at most `order` stages and the learned a are shared by all layers.
    """

    def __init__(self, config: ModelConfig, order: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            EstimateNorm(config.dim, eps=config.layer_norm_eps) for _ in range(order)
        )
        self.alpha = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start a at one half."""
        nn.init.constant_(self.alpha, 0.5)

    def coefficients(self, num_stages: int) -> Tensor:
        """Return the weights of the stages, (num_stages,)."""
        powers = torch.arange(num_stages - 1, -1, -1, device=self.alpha.device)
        return self.alpha * (1 - self.alpha) ** powers

    def forward(self, hidden: Tensor, stages: Sequence[Tensor]) -> Tensor:
        """Return the prediction p from h and the stages, each (batch, time, dim)."""
        prediction = hidden
        for coefficient, value in zip(self.coefficients(len(stages)), stages, strict=True):
            prediction = torch.addcmul(prediction, value, coefficient)
        return prediction


class PredictorCorrectorRK2(MixedLayer):
    """Predict with a Runge-Kutta step of order 2, correct once.

        k1  = R_1(F_l(h_{l-1}));   k2 = R_2(F_l(h_{l-1} + k1))
        p   = h_{l-1} + a (1-a) k1 + a k2                              prediction
        s_l = N_l(F_l(sum_{k<l} A[l,k] s_k + A[l,l] P_l(p)))           correction
        h_l = sum_{k<=l} C[l,k] s_k

    R_1, R_2 and a are shared by all layers. That is level 2, the published method. A schedule may
    give a layer less: level 1 corrects the prediction `p = h + a k1` of order 1, and at level 0
    this is all, `s_l = P_l(h + a k1)`.

    Cost: `1 + level` evaluations per layer.
    Source: Li et al. 2024 (PCformer), checked against its published code; levels: this project.
    Not to be confused with: IIET with two corrections, whose prediction is one plain evaluation.
    """

    facts = facts_of("pcformer")
    order: ClassVar[int] = 2
    """Order of the predictor at the full level, and the number of its evaluations."""

    @classmethod
    def make_shared(cls, config: ModelConfig) -> nn.Module:
        return MovingAverageRungeKutta(config, cls.order)

    def advance(
        self,
        evaluate: Evaluate,
        hidden: Tensor,
        state: History,
        *,
        num_corrections: int,
        shared: Any,
        **_: Any,
    ) -> Advance:
        # A method without levels takes the full step, and corrects it.
        is_full = not self.facts.has_corrections or num_corrections == self.facts.full_level
        corrects = is_full or num_corrections > 0
        point_sum, hidden_sum = self.mix.sums(state.estimates, corrects=corrects)
        stages: list[Tensor] = []

        def predict(stages: list[Tensor]) -> Tensor:
            prediction: Tensor = self.prediction_norm(shared(hidden, stages))
            return prediction

        def output_at(number: int, value: Tensor) -> Tensor:
            """Return what the layer would leave at the level whose last evaluation this is."""
            if number == 0:
                return predict([value])
            assert point_sum is not None
            point = point_sum.plus(predict(stages[:1]), hidden.dtype)
            corrected: Tensor = self.correction_norm(evaluate.uncounted(point))
            return corrected

        def stage(number: int, point: Tensor) -> Tensor:
            value = evaluate(
                point.to(hidden.dtype),
                norm=shared.norms[number],
                output_if_last=partial(output_at, number),
            )
            stages.append(value)
            return value

        runge_kutta_stages(stage, hidden, self.order if is_full else 1)
        estimate = prediction = predict(stages)
        if point_sum is not None:
            estimate = evaluate(
                point_sum.plus(prediction, hidden.dtype),
                norm=self.correction_norm,
                previous=prediction,
                output_if_last=lambda estimate: estimate,
            )
        return Advance(hidden_sum.plus(estimate, hidden.dtype), state.followed_by(estimate))


class PredictorCorrectorRK4(PredictorCorrectorRK2):
    """Predict with a Runge-Kutta step of order 4, correct once.

    Cost: 5 evaluations per layer; there are no levels.
    Source: Li et al. 2024 (PCformer).
    Not to be confused with: `ode_rk4`, which has fixed coefficients and neither corrector nor mix.
    """

    facts = facts_of("pcformer_rk4")
    order: ClassVar[int] = 4
