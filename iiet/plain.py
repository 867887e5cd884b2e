"""Chooses between plain formulas and faster ones written by hand.

Both compute the same. (The two forms of attention are PyTorch's own.) The plain form runs under
`torch.compile` (which fuses attention itself), in the transforms of `torch.func`, in forward-mode
differentiation, and within `plain_formulas()`, which second derivatives need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

__all__ = ["fast_forms_allowed", "needs_all_derivatives", "plain_formulas"]

_plain_contexts = 0


@contextmanager
def plain_formulas() -> Iterator[None]:
    """Run plain formulas only.

    Fast ones are differentiable once, so a gradient of a gradient needs this context around both
    passes:

        with plain_formulas():
            (slope,) = torch.autograd.grad(loss(decoder), weights, create_graph=True)
    """
    global _plain_contexts
    _plain_contexts += 1
    try:
        yield
    finally:
        _plain_contexts -= 1


def fast_forms_allowed() -> bool:
    return not torch.compiler.is_compiling() and not needs_all_derivatives()


def needs_all_derivatives() -> bool:
    """Tell whether other derivatives than a first backward pass may be needed."""
    return not torch.compiler.is_compiling() and (
        _plain_contexts > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
