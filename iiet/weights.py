"""What can be said of weights before a model is built from them: are all their values numbers?

A NaN in one matrix makes every output NaN, and nothing in the output tells which matrix it was. So
whoever loads weights asks here first and names the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["non_finite"]


def non_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors that hold NaN or infinite values.

    Args:
        weights: tensors by name, of any shape and dtype.

    Returns:
        One clause for each, with how many values it is; empty if all are finite.
    """
    return [
        f"{name} has {int((~tensor.isfinite()).sum())} values that are NaN or infinite"
        for name, tensor in weights.items()
        if not bool(tensor.isfinite().all())
    ]
