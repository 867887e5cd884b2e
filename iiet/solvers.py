"""Fixed-point iteration, written once: a callable and a guess in, the value out.

The implicit step `e = g(e)` is solved by applying g a fixed number of times. There is no stopping
rule: the number of applications is the cost, and cost is planned before anything runs. Only
observers (`Decoder.forward(observe=)`) compute residuals, which show how well an iteration
converges; an ordinary step computes none.

Source: this project; damping as in Bai et al. 2019 (deep equilibrium models), the truncated
backward pass as in truncated backpropagation through time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["fixed_point"]


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
