"""The learned multistep mix: how a layer reads what all earlier layers left behind.

Each layer leaves an estimate `s_l`; `s_0` are the embeddings. Two lower-triangular matrices weigh
them: A for where a layer evaluates its field, C for the hidden state that it hands on. Both start
as the running mean.

While layer l iterates, the sums over k < l do not change, so both are made once per layer
(`weighted_sums`), and each correction adds one scaled tensor (`add_scaled`). Their backward passes
keep references to the estimates, which live anyway, where stacking them would keep a copy of all of
them per correction: memory grows with L instead of L^2 r.

Source: the PCformer and IIET papers; the formulation is this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Mix", "add_scaled", "running_mean", "weighted_sums"]


def running_mean(size: int) -> Tensor:
    """Return the starting matrix, (size, size): row l has `1 / (l + 1)` in columns 0 to l, so each
    row sums to one.
    """
    return torch.ones(size, size).tril() / torch.arange(1, size + 1).unsqueeze(1)


def weighted_sums(weights: Tensor, estimates: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Compute `sum_k weights[row, k] * estimates[k]` for each row.

    Args:
        weights: (rows, count).
        estimates: `count` tensors of one shape.
    """
    if not torch.is_grad_enabled():
        return tuple(_weighted_sum(_scalars(row), estimates) for row in weights)
    sums: tuple[Tensor, ...] = _WeightedSums.apply(weights, *estimates)  # type: ignore[no-untyped-call]
    return sums


def add_scaled(base: Tensor, estimate: Tensor, weight: Tensor) -> Tensor:
    """Compute `base + weight * estimate` for one scalar weight."""
    if not torch.is_grad_enabled():
        return torch.addcmul(base, estimate, weight.to(estimate.dtype))
    result: Tensor = _AddScaled.apply(base, estimate, weight)  # type: ignore[no-untyped-call]
    return result


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, *estimates: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weights, *estimates)
        return tuple(_weighted_sum(_scalars(row), estimates) for row in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        weights, *estimates = ctx.saved_tensors
        columns = [_scalars(column) for column in weights.t()]
        estimate_grads = [_weighted_sum(column, grads) for column in columns]
        weight_grads = [_inner(grad, estimate) for grad in grads for estimate in estimates]
        return torch.stack(weight_grads).view_as(weights).to(weights.dtype), *estimate_grads


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, estimate: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(estimate, weight)
        return _add(base, estimate, _scalar(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        estimate, weight = ctx.saved_tensors
        return grad, grad * _scalar(weight), _inner(grad, estimate).to(weight.dtype)


Scalar = float | Tensor
"""A plain number on the CPU, where kernels take one at no cost; elsewhere a tensor, so that nothing
waits for the device.
"""


def _scalar(weight: Tensor) -> Scalar:
    return weight.item() if weight.device.type == "cpu" else weight


def _scalars(weights: Tensor) -> list[Scalar]:
    return list(weights.tolist() if weights.device.type == "cpu" else weights.unbind())


def _add(base: Tensor, estimate: Tensor, weight: Scalar) -> Tensor:
    if isinstance(weight, Tensor):
        return torch.addcmul(base, estimate, weight.to(estimate.dtype))
    return torch.add(base, estimate, alpha=weight)


def _weighted_sum(weights: Sequence[Scalar], tensors: Sequence[Tensor]) -> Tensor:
    result = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        if isinstance(weight, Tensor):
            result.addcmul_(tensor, weight.to(tensor.dtype))
        else:
            result.add_(tensor, alpha=weight)
    return result


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two tensors, summed in at least float32."""
    if a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64):
        return torch.dot(a.reshape(-1), b.reshape(-1))
    return (a * b).sum(dtype=torch.float32)


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

    def of_layer(
        self, layer: int, estimates: Sequence[Tensor], *, evaluates: bool
    ) -> LayerMix | FewTokensMix:
        """Sum up the earlier estimates for one layer.

        Args:
            layer: the layer, the first being 0.
            estimates: `s_0` to that of the layer before, each (batch, time, dim).
            evaluates: whether the layer asks for evaluation points; without, only the hidden state
                is made.
        """
        count = layer + 1
        assert len(estimates) == count, (len(estimates), layer)
        outer = self.outer[count]
        if FewTokensMix.serves(estimates, outer):
            return FewTokensMix(tuple(estimates), self.inner[count], outer)
        if not evaluates:
            (hidden_prefix,) = weighted_sums(outer[None, :count], estimates)
            return LayerMix(None, None, hidden_prefix, outer[count])
        rows = torch.stack([self.inner[count], outer])
        point_prefix, hidden_prefix = weighted_sums(rows[:, :count], estimates)
        return LayerMix(point_prefix, rows[0, count], hidden_prefix, rows[1, count])


class LayerMix(NamedTuple):
    """The mix as one layer sees it: sums over earlier estimates, to which its own is added."""

    point_prefix: Tensor | None
    """`sum_{k<l} A[l,k] s_k`, (batch, time, dim)."""
    point_weight: Tensor | None
    """`A[l,l]`, a scalar."""
    hidden_prefix: Tensor
    """`sum_{k<l} C[l,k] s_k`, (batch, time, dim)."""
    hidden_weight: Tensor
    """`C[l,l]`, a scalar."""

    def evaluation_point(self, estimate: Tensor) -> Tensor:
        """Compute `sum_{k<l} A[l,k] s_k + A[l,l] estimate`."""
        assert self.point_prefix is not None, "the layer said that it makes no corrections"
        assert self.point_weight is not None
        return add_scaled(self.point_prefix, estimate, self.point_weight)

    def hidden(self, estimate: Tensor) -> Tensor:
        """Compute `sum_{k<l} C[l,k] s_k + C[l,l] estimate`."""
        return add_scaled(self.hidden_prefix, estimate, self.hidden_weight)


class FewTokensMix:
    """`LayerMix` for a decoding step: stacking a few small estimates costs one operation.

    Args:
        estimates: those of the layers before, each (batch, time, dim).
        inner: the layer's row of A.
        outer: the layer's row of C.
    """

    def __init__(self, estimates: tuple[Tensor, ...], inner: Tensor, outer: Tensor) -> None:
        self._estimates = estimates
        self._inner = inner
        self._outer = outer
        self._point_prefix: Tensor | None = None

    @staticmethod
    def serves(estimates: Sequence[Tensor], weights: Tensor) -> bool:
        """Tell whether stacking is the faster way; it keeps no gradient."""
        first = estimates[0]
        return (
            not torch.is_grad_enabled()
            and first.numel() <= _FEW_VALUES
            and first.dtype == weights.dtype
        )

    def evaluation_point(self, estimate: Tensor) -> Tensor:
        """Compute `sum_{k<l} A[l,k] s_k + A[l,l] estimate`."""
        count = len(self._estimates)
        if self._point_prefix is None:
            self._point_prefix = _sum_of_stacked(self._inner[:count], self._estimates)
        return torch.addcmul(self._point_prefix, estimate, self._inner[count])

    def hidden(self, estimate: Tensor) -> Tensor:
        """Compute `sum_{k<l} C[l,k] s_k + C[l,l] estimate`."""
        estimates = (*self._estimates, estimate)
        return _sum_of_stacked(self._outer[: len(estimates)], estimates)


_FEW_VALUES = 1 << 13
"""Up to so many values each, stacking the estimates is faster than adding them one by one."""


def _sum_of_stacked(weights: Tensor, estimates: tuple[Tensor, ...]) -> Tensor:
    stacked = torch.stack(estimates).view(len(estimates), -1)
    return torch.mv(stacked.t(), weights).view_as(estimates[0])


def _layer_norms(num_layers: int, dim: int, eps: float) -> nn.ModuleList:
    return nn.ModuleList(nn.LayerNorm(dim, eps=eps) for _ in range(num_layers))
