"""Losses from hidden states, in chunks of positions, so that the logits are never whole.

    for each chunk:    logits = hidden @ weight.T;    loss += loss_of(logits)

Logits, (batch, time, vocab), are the largest tensor of a training step, and a loss and its gradient
need several of that size. Here the forward pass computes the gradients of a chunk at once, keeps
those with respect to `hidden` and `weight`, and frees the logits; the backward pass only scales
what was kept. So nothing is computed twice, and any loss will do that is a sum over positions.
Logits that fit into one chunk give bitwise the same results as whole ones.
Source: Liger Kernel (Hsu et al. 2024), where the loss is a hand-written kernel; here PyTorch
differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iiet.arithmetic import at_least_float32, product_dtype
from iiet.batch import Batch

__all__ = ["CHUNK_ELEMENTS", "LazyLogits", "Logits", "loss_by_chunks"]

CHUNK_ELEMENTS = 1 << 25
"""Most logits at once: 128 MiB in float32. A GPU needs milliseconds for them, so the number of
kernels does not matter, and the half dozen tensors of this size are small beside a model."""


@dataclass(frozen=True, eq=False)
class LazyLogits:
    """Logits that are not computed yet: `hidden @ weight.T`."""

    hidden: Tensor
    """(batch, time, dim), after the final norm."""
    weight: Tensor
    """(vocab, dim), of the head."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits, (batch, time, vocab)."""
        return torch.Size((*self.hidden.shape[:-1], len(self.weight)))

    def whole(self) -> Tensor:
        """Compute all logits, (batch, time, vocab)."""
        return F.linear(self.hidden, self.weight)

    def at(self, rows: slice) -> Tensor:
        """Compute the logits of some positions, counted row by row: (1, positions, vocab)."""
        return F.linear(self.hidden.flatten(0, -2)[None, rows], self.weight)

    def chunks(self) -> Iterator[slice]:
        """Yield the positions of each chunk; all chunks but the last have the same size."""
        num_rows = self.shape[:-1].numel()
        num_chunks = max(1, -(-self.shape.numel() // CHUNK_ELEMENTS))
        size = max(1, -(-num_rows // num_chunks))
        for start in range(0, num_rows, size):
            yield slice(start, start + size)

    def detached(self) -> LazyLogits:
        """Return the same without gradients, and with the weight in the precision of products."""
        # Autocast would convert the weight again for each chunk.
        weight = self.weight.detach().to(product_dtype(self.weight))
        return LazyLogits(self.hidden.detach(), weight)


Logits = Tensor | LazyLogits

LossOfChunk = Callable[[Tensor, Batch, slice | None], tuple[Tensor, ...]]
"""(logits, their batch, which positions; None: all) -> the loss and other sums over positions."""


def loss_by_chunks(logits: Logits, batch: Batch, loss_of: LossOfChunk) -> tuple[Tensor, ...]:
    """Compute what `loss_of` gives for all positions; whole logits are one chunk.

    Only the first value, the loss, has a gradient. The counts of a chunk's batch are those of the
    whole, so that its means add up.
    """
    if isinstance(logits, Tensor):
        loss, *others = loss_of(logits, batch, None)
        return loss, *(value.detach() for value in others)
    if logits.hidden.shape[:-1] != batch.input_ids.shape:
        raise ValueError(
            f"the batch must be (batch, time) as the hidden states, here "
            f"{tuple(logits.hidden.shape[:-1])}, got {tuple(batch.input_ids.shape)}"
        )
    flat = batch.flattened()

    def of_rows(part: Tensor, rows: slice) -> tuple[Tensor, ...]:
        return loss_of(part, flat.span(rows), rows)

    hidden, weight = logits.hidden, logits.weight
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        values: tuple[Tensor, ...] = _LossByChunks.apply(  # type: ignore[no-untyped-call]
            hidden, weight, of_rows
        )
        return values
    fixed = logits.detached()
    return _sums([of_rows(fixed.at(rows), rows) for rows in fixed.chunks()])


def _sums(of_chunks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(
        torch.stack(values).sum() if len(values) > 1 else values[0]
        for values in zip(*of_chunks, strict=True)
    )


class _LossByChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss_of: Callable[[Tensor, slice], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        fixed = LazyLogits(hidden, weight).detached()
        head = fixed.weight.requires_grad_(needs_weight)
        points = fixed.hidden.flatten(0, -2)
        hidden_grad = torch.empty_like(points) if needs_hidden else None
        weight_grad: Tensor | None = None
        values = []
        for rows in fixed.chunks():
            point = points[rows].requires_grad_(needs_hidden)
            with torch.enable_grad():
                loss, *others = loss_of(F.linear(point[None], head), rows)
            wanted = [leaf for leaf in (point, head) if leaf.requires_grad]
            gradients = list(torch.autograd.grad(loss, wanted))
            if needs_weight:
                # Summed in float32, whatever the precision of the product.
                part = gradients.pop()
                weight_grad = (
                    at_least_float32(part) if weight_grad is None else weight_grad.add_(part)
                )
            if hidden_grad is not None:
                hidden_grad[rows] = gradients.pop()
            values.append((loss.detach(), *(value.detach() for value in others)))
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.shape, ctx.dtype = hidden.shape, weight.dtype
        sums = _sums(values)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # `once_differentiable` would return constants.
            raise RuntimeError(
                "the gradient of a loss in chunks has no gradient itself; run both passes within "
                "iiet.plain_formulas()"
            )
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = (hidden_grad * upstream).view(ctx.shape)
        if weight_grad is not None:
            weight_grad = (weight_grad * upstream).to(ctx.dtype)
        return hidden_grad, weight_grad, None
