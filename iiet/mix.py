"""The learned multistep mix: how a layer reads the estimates of all earlier layers.

Each layer leaves an estimate `s_l`; `s_0` are the embeddings. Layer l owns its rows of two
lower-triangular matrices, which start as means. A gives the points x where the layer evaluates its
field, with its current estimate e in place of s_l; C gives the hidden state:

    x   = sum_{k<l} A[l,k] s_k + A[l,l] e
    h_l = sum_{k<=l} C[l,k] s_k

The sums over k < l are computed once per layer. Estimates, rows and sums are at least float32; x
and h_l are rounded once. `PlainHistory` sums over a list; `FusedHistory` computes the same by
matrix products over one buffer, and `StepHistory` in few operations where there is one token per
row. Source: the PCformer and IIET papers; the three forms: this project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from iiet.arithmetic import KeepsFloat32, at_least_float32, fast_forms_allowed, float32_product

__all__ = [
    "EstimateNorm",
    "FusedHistory",
    "History",
    "LayerMix",
    "Mix",
    "PlainHistory",
    "StepHistory",
    "start",
]


def start(embeddings: Tensor, num_layers: int) -> History:
    """Return the history before the first layer; it holds `s_0`, (batch, time, dim)."""
    estimate = at_least_float32(embeddings)
    if fast_forms_allowed():
        if _is_token_step(embeddings):
            return StepHistory(estimate, num_layers)
        return FusedHistory.started(estimate, num_layers)
    return PlainHistory((estimate,))


class Mix(KeepsFloat32):
    """The rows of A and C of one layer, the first being 0."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(layer + 2))  # row of A
        self.outer = nn.Parameter(torch.empty(layer + 2))  # row of C
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start both rows as the mean."""
        for row in (self.inner, self.outer):
            nn.init.constant_(row, 1.0 / len(row))

    def forward(
        self, history: History, *, dtype: torch.dtype, corrects: bool
    ) -> LayerMix | UncorrectedStep:
        """Sum the earlier estimates; points and hidden states are rounded to `dtype`.

        A layer that makes no corrections needs no evaluation points, and sums with C only.
        """
        if not corrects and isinstance(history, StepHistory):
            return UncorrectedStep(history, self, dtype)
        rows = torch.stack([self.inner, self.outer]) if corrects else self.outer[None]
        earlier, own = at_least_float32(rows).split_with_sizes([rows.size(1) - 1, 1], 1)
        history, sums = history.sums(earlier)
        return LayerMix(history, dtype, sums, own.flatten().unbind())


@dataclass(frozen=True)
class LayerMix:
    """The mix in one layer: sums over earlier estimates, to which the layer adds its own."""

    history: History
    dtype: torch.dtype
    sums: tuple[Tensor, ...]
    """`sum_{k<l} C[l,k] s_k`, (batch, time, dim); where the layer corrects, after that with A."""
    own: tuple[Tensor, ...]
    """`C[l,l]`, a scalar; where the layer corrects, after `A[l,l]`."""

    def with_prediction(self, prediction: Tensor, weight: Tensor) -> LayerMix:
        """Return the mix that adds `weight * prediction` to all points; the weight is a scalar."""
        point, hidden = self.sums
        point = self.history.add(point, prediction, weight, point.dtype)
        return replace(self, sums=(point, hidden))

    def point(self, estimate: Tensor) -> Tensor:
        """Return the point x at which to evaluate the field."""
        assert len(self.sums) == 2, "the mix was called with corrects=False"
        return self.history.add(self.sums[0], estimate, self.own[0], self.dtype)

    def leave(self, estimate: Tensor) -> tuple[Tensor, History]:
        """Return the hidden state `h_l`, and the history with the layer's estimate."""
        return self.history.leave(self.sums[-1], estimate, self.own[-1], self.dtype)


class EstimateNorm(KeepsFloat32, nn.LayerNorm):
    """The LayerNorm that makes an estimate of a field's output, at least in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _parameter(self, "weight"), _parameter(self, "bias")
        if x.dtype != torch.float32 or weight.dtype != torch.float32:
            x, weight, bias = map(at_least_float32, (x, weight, bias))
        return torch.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def _parameter(module: nn.Module, name: str) -> Tensor:
    """Return `module.name` in a third of the time, which counts in a decoding step."""
    found = module._parameters.get(name)
    value: Tensor = getattr(module, name) if found is None else found
    return value


@dataclass(frozen=True)
class PlainHistory:
    """The estimates `s_0, ..., s_{l-1}` of a pass as a list, each (batch, time, dim)."""

    estimates: tuple[Tensor, ...]

    def sums(self, rows: Tensor) -> tuple[PlainHistory, tuple[Tensor, ...]]:
        """Compute `sum_k rows[i, k] s_k`, (batch, time, dim), for each row i.

        Also returns the history to continue with.
        """
        sums = [torch.zeros_like(self.estimates[0]) for _ in rows]
        for weights, estimate in zip(rows.unbind(1), self.estimates, strict=True):
            sums = [total + weight * estimate for total, weight in zip(sums, weights, strict=True)]
        return self, tuple(sums)

    def add(self, base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute `base + weight * estimate`, rounded to `dtype`; the weight is a scalar."""
        return (base + weight * estimate).to(dtype)

    def leave(
        self, base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, PlainHistory]:
        """Compute `add`, and append the estimate to the history."""
        return self.add(base, estimate, weight, dtype), PlainHistory((*self.estimates, estimate))


@dataclass(frozen=True)
class FusedHistory:
    """`PlainHistory` as the first `count` entries of a buffer that all layers share.

    All sums are then one skinny matrix product, and their gradients two more. Autograd does not
    watch the buffer. In its graph `link` stands for the entries: a tensor of their shape, that
    needs no memory, whose gradient is the buffer's gradient. Every operation takes one link and
    returns the next, so a gradient buffer has one owner at a time, which may add to it in place.
    """

    buffer: Tensor
    """(layers, batch, time, dim): the embeddings and the estimates of all layers but the last."""
    count: int
    link: Tensor | None
    """(count, batch, time, dim); None without gradients."""

    @classmethod
    def started(cls, embeddings: Tensor, num_layers: int) -> FusedHistory:
        buffer = embeddings.new_empty(num_layers, *embeddings.shape)
        if torch.is_grad_enabled():
            return cls(buffer, 1, _Start.apply(embeddings, buffer))  # type: ignore[no-untyped-call]
        buffer[0].copy_(embeddings)
        return cls(buffer, 1, None)

    def sums(self, rows: Tensor) -> tuple[FusedHistory, tuple[Tensor, ...]]:
        estimates = self.buffer[: self.count]
        if not torch.is_grad_enabled():
            return self, _products(rows, estimates).unbind()
        link, *sums = _Sums.apply(self.link, rows, estimates)  # type: ignore[no-untyped-call]
        return replace(self, link=link), tuple(sums)

    def add(self, base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if not torch.is_grad_enabled():
            return _add_scaled(base, estimate, weight, dtype)
        result: Tensor = _AddScaled.apply(base, estimate, weight, dtype)  # type: ignore[no-untyped-call]
        return result

    def leave(
        self, base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, FusedHistory]:
        if self.count == len(self.buffer):  # No layer reads the last layer's estimate.
            return self.add(base, estimate, weight, dtype), self
        entry, link = self.buffer[self.count], None
        if torch.is_grad_enabled():
            link, hidden = _Leave.apply(  # type: ignore[no-untyped-call]
                self.link, base, estimate, weight, dtype, entry
            )
        else:
            hidden = _add_scaled(base, estimate, weight, dtype)
            entry.copy_(estimate)
        return hidden, FusedHistory(self.buffer, self.count + 1, link)


class StepHistory:
    """`FusedHistory` for one token per row on a CPU, without gradients.

    At small widths the time of a decoding step is the number of its operations. So views of the
    buffer are made once, the history counts its estimates instead of being replaced, and has room
    for the last layer's, too (`UncorrectedStep`).
    """

    def __init__(self, embeddings: Tensor, num_layers: int) -> None:
        self._buffer = embeddings.new_empty(num_layers + 1, *embeddings.shape)
        self._entries = self._buffer.unbind()
        self._columns = self._buffer.view(num_layers + 1, -1).t()
        self._entries[0].copy_(embeddings)
        self._count = 1

    def sums(self, rows: Tensor) -> tuple[StepHistory, tuple[Tensor, ...]]:
        return self, _products(rows, self._buffer[: self._count]).unbind()

    def add(self, base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return _add_scaled(base, estimate, weight, dtype)

    def leave(
        self, base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, StepHistory]:
        self.append(estimate)
        return _add_scaled(base, estimate, weight, dtype), self

    def append(self, estimate: Tensor) -> Tensor:
        """Append a layer's estimate; return all as columns, (batch time dim, count)."""
        self._entries[self._count].copy_(estimate)
        self._count += 1
        return self._columns.narrow(1, 0, self._count)


class UncorrectedStep(NamedTuple):
    """`LayerMix` of an uncorrected layer in a `StepHistory`: one product with the row of C."""

    history: StepHistory
    mix: Mix
    dtype: torch.dtype

    def leave(self, estimate: Tensor) -> tuple[Tensor, StepHistory]:
        """Return the hidden state `h_l`, and the history with the layer's estimate."""
        columns = self.history.append(estimate)
        hidden = torch.mv(columns, at_least_float32(_parameter(self.mix, "outer")))
        hidden = hidden.view(estimate.shape)
        return hidden if hidden.dtype == self.dtype else hidden.to(self.dtype), self.history


def _is_token_step(embeddings: Tensor) -> bool:
    return (
        embeddings.is_cpu
        and embeddings.size(1) == 1
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


History = PlainHistory | FusedHistory | StepHistory


def _add_scaled(base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `base + weight * estimate`, rounded to `dtype` on writing."""
    return torch.addcmul(base, estimate, weight, out=torch.empty_like(base, dtype=dtype))


def _products(rows: Tensor, tensors: Tensor) -> Tensor:
    """Compute `sum_k rows[:, k] tensors[k]`."""
    return float32_product(rows, tensors.flatten(1)).view(len(rows), *tensors.shape[1:])


def _inner_products(grads: Tensor, estimates: Tensor, num_blocks: int = 1) -> Tensor:
    """Compute the inner product of each of (rows, batch, time, dim) and (count, batch, time, dim).

    A product of two dozen numbers over millions of terms leaves a GPU idle; blocks of tokens keep
    it busy. A CPU sums in one block.
    """
    if num_blocks == 1:
        return float32_product(grads.flatten(1), estimates.flatten(1).t())
    left = grads.view(len(grads), num_blocks, -1).transpose(0, 1)
    right = estimates.view(len(estimates), num_blocks, -1).permute(1, 2, 0)
    return float32_product(left, right).sum(0)


def _num_blocks(tensor: Tensor) -> int:
    """Return how many blocks the tokens of (batch, time, dim) make on their device."""
    return math.gcd(tensor.size(0) * tensor.size(1), _MAX_BLOCKS) if tensor.is_cuda else 1


_MAX_BLOCKS = 256


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _link(count: int, like: Tensor) -> Tensor:
    return like.new_empty(()).expand(count, *like.shape)  # One value of memory.


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, buffer: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        buffer[0].copy_(embeddings)
        return _link(1, embeddings)

    @staticmethod
    @once_differentiable
    def backward(_: Any, buffer_grad: Tensor | None) -> tuple[Tensor | None, None]:
        return (None if buffer_grad is None else buffer_grad[0]), None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, rows: Tensor, estimates: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows)
        ctx.estimates = estimates
        return _link(len(estimates), estimates[0]), *_products(rows, estimates).unbind()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, buffer_grad: Tensor | None, *sum_grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        if all(grad is None for grad in sum_grads):
            return buffer_grad, None, None
        like = ctx.estimates[0]
        grads = torch.stack([torch.zeros_like(like) if g is None else g for g in sum_grads])
        rows_grad = None
        if ctx.needs_input_grad[1]:
            rows_grad = _inner_products(grads, ctx.estimates, _num_blocks(like))
        if not ctx.needs_input_grad[0]:
            return None, rows_grad, None
        if buffer_grad is None:
            return _products(rows.t(), grads), rows_grad, None
        buffer_grad.flatten(1).addmm_(rows.t(), grads.flatten(1))
        return buffer_grad, rows_grad, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        link: Tensor,
        base: Tensor,
        estimate: Tensor,
        weight: Tensor,
        dtype: torch.dtype,
        entry: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        ctx.entry = entry
        entry.copy_(estimate)
        return _link(len(link) + 1, entry), _add_scaled(base, estimate, weight, dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, buffer_grad: Tensor | None, hidden_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        earlier = own = weight_grad = None
        if buffer_grad is not None:
            earlier, own = buffer_grad[:-1], buffer_grad[-1]
        if hidden_grad is not None:
            hidden_grad = at_least_float32(hidden_grad)
            weight_grad = _inner(hidden_grad, ctx.entry)
            scaled = hidden_grad * weight if own is None else None
            own = scaled if own is None else torch.addcmul(own, hidden_grad, weight)
        return earlier, hidden_grad, own, weight_grad, None, None


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(estimate, weight)
        return _add_scaled(base, estimate, weight, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        estimate, weight = ctx.saved_tensors
        grad = at_least_float32(grad)
        return grad, grad * weight, _inner(grad, estimate), None
