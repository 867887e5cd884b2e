"""The learned multistep mix: how a layer reads what all earlier layers left behind.

Each layer leaves an estimate `s_l`; `s_0` are the embeddings. Two lower-triangular matrices weigh them: A for where a
layer evaluates its field, C for the hidden state that it hands on. Both start as the running mean.

While layer l iterates, the sums over k < l do not change, so both are made once per layer (`prefixes`), and each
correction adds one scaled tensor (`add_scaled`). Their backward passes keep references to the estimates, which live
anyway, where stacking them would keep a copy of all of them per correction: memory grows with L instead of L^2 r.

Source: equations of DESIGN (section 3); the formulation is this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Mix", "add_scaled", "running_mean", "weighted_sum"]


def running_mean(size: int) -> Tensor:
    """Return the starting matrix, (size, size): row l has `1 / (l + 1)` in columns 0 to l, so each row sums to one."""
    return torch.ones(size, size).tril() / torch.arange(1, size + 1).unsqueeze(1)


def weighted_sum(weights: Tensor, estimates: Sequence[Tensor]) -> Tensor:
    """Compute `sum_k weights[k] * estimates[k]`.

    Args:
        weights: (count,).
        estimates: `count` tensors of one shape.
    """
    result = estimates[0] * weights[0]
    for weight, estimate in zip(weights[1:], estimates[1:], strict=True):
        result = torch.addcmul(result, estimate, weight)
    return result


def add_scaled(base: Tensor, estimate: Tensor, weight: Tensor) -> Tensor:
    """Compute `base + weight * estimate` for one scalar weight."""
    return torch.addcmul(base, estimate, weight)


class Mix(nn.Module):
    """The two matrices of the mix, and the norms that make estimates comparable.

    Args:
        num_layers: number of layers L.
        dim: width of the hidden state.
        layer_norm_eps: epsilon of the norms.
    """

    def __init__(self, num_layers: int, dim: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.inner = nn.Parameter(running_mean(num_layers + 1))
        """A: row l weighs the estimates 0..l where layer l evaluates its field."""
        self.outer = nn.Parameter(running_mean(num_layers + 1))
        """C: row l weighs the estimates 0..l in the hidden state after layer l."""
        self.prediction_norms = _layer_norms(num_layers, dim, layer_norm_eps)
        self.correction_norms = _layer_norms(num_layers, dim, layer_norm_eps)

    @staticmethod
    def num_parameters(num_layers: int, dim: int) -> int:
        """Count both matrices and both norms of each layer."""
        return 2 * (num_layers + 1) ** 2 + 4 * num_layers * dim

    def of_layer(self, layer: int, estimates: Sequence[Tensor]) -> LayerMix:
        """Make the view of one layer.

        Args:
            layer: the layer, the first being 0.
            estimates: `s_0` to that of the layer before, each (batch, time, dim).
        """
        assert len(estimates) == layer + 1, (len(estimates), layer)
        return LayerMix(self.inner[layer + 1], self.outer[layer + 1], tuple(estimates))


class LayerMix:
    """The mix as one layer sees it: fixed sums over earlier estimates, to which its own is added.

    Args:
        inner: the layer's row of A.
        outer: the layer's row of C.
        estimates: those of the layers before.
    """

    def __init__(self, inner: Tensor, outer: Tensor, estimates: tuple[Tensor, ...]) -> None:
        self._inner = inner
        self._outer = outer
        self._estimates = estimates
        self._prefix: Tensor | None = None

    def evaluation_point(self, estimate: Tensor) -> Tensor:
        """Compute `sum_{k<l} A[l,k] s_k + A[l,l] estimate`; the sum is made on the first call."""
        count = len(self._estimates)
        if self._prefix is None:
            self._prefix = weighted_sum(self._inner[:count], self._estimates)
        return add_scaled(self._prefix, estimate, self._inner[count])

    def hidden(self, estimate: Tensor) -> Tensor:
        """Compute `sum_{k<l} C[l,k] s_k + C[l,l] estimate`."""
        count = len(self._estimates)
        prefix = weighted_sum(self._outer[:count], self._estimates)
        return add_scaled(prefix, estimate, self._outer[count])


def _layer_norms(num_layers: int, dim: int, eps: float) -> nn.ModuleList:
    return nn.ModuleList(nn.LayerNorm(dim, eps=eps) for _ in range(num_layers))
