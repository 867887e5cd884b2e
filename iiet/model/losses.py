"""Losses: cross-entropy, divergences between next-token distributions, error of hidden states.

In: logits, (batch, time, vocab), or hidden states, (batch, time, dim). `mask`, (batch, time) of
bool, says which positions count (default: all); values at the others, NaN included, have no effect.
Out: the mean over the positions that count, a scalar; 0 if there are none. `count` replaces their
number as the divisor (`Batch.split`). Shapes that differ are a ValueError.

Logits are the largest tensor of a training step, and a loss and its gradient need several of that
size. So `loss_by_chunks` goes over positions: it computes logits from hidden states (`LazyLogits`),
their loss and its gradients, frees them, and keeps gradients of hidden states and weight, which the
backward pass only scales. Logits of one chunk give bitwise the same results as whole ones.
`kl_divergence` keeps its gradient in closed form, exactly 0 where teacher and student agree.
Source: Hinton et al. 2015 (temperature and its square); Liger Kernel (Hsu et al. 2024), where a
loss in chunks is a hand-written kernel; this project (gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from iiet.model.batch import NO_TARGET, Batch, Count
from iiet.model.config import DivergenceKind
from iiet.model.layers import at_least_float32, product_dtype

__all__ = [
    "CHUNK_ELEMENTS",
    "LazyLogits",
    "Logits",
    "batch_cross_entropy",
    "cross_entropy",
    "cross_entropy_and_accuracy",
    "cross_entropy_by_component",
    "hidden_state_error",
    "kl_divergence",
    "logits_at",
    "loss_by_chunks",
    "next_token_loss",
]


CHUNK_ELEMENTS = 1 << 25
"""Most logits at once: 128 MiB in float32. A GPU needs milliseconds for them, so the number of
kernels does not matter, and the half dozen tensors of this size are small beside a model."""
CPU_ELEMENTS = 1 << 18
"""Numbers in each of the half dozen temporaries of a divergence on a CPU, so that its cache holds
them."""


@dataclass(frozen=True, eq=False)
class LazyLogits:
    """Logits that are not computed yet: `hidden @ weight.T`.

    Raises:
        ValueError: the shapes do not fit.
    """

    hidden: Tensor
    """(batch, time, dim), after the final norm."""
    weight: Tensor
    """(vocab, dim), of the head."""

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.hidden.size(-1) != self.weight.size(1):
            raise ValueError(
                f"weight must be (vocab, dim) for hidden of {tuple(self.hidden.shape)}, got "
                f"{tuple(self.weight.shape)}"
            )

    def detach(self) -> LazyLogits:
        """Return the same without gradients, and with the weight in the precision of products."""
        # Autocast would convert the weight again for each chunk.
        weight = self.weight.detach().to(product_dtype(self.weight))
        return LazyLogits(self.hidden.detach(), weight)


Logits = Tensor | LazyLogits


def logits_at(logits: Logits, rows: slice) -> Tensor:
    """Return the logits of some positions, counted row by row, (1, positions, vocab)."""
    if isinstance(logits, Tensor):
        return logits.flatten(0, -2)[None, rows]
    return F.linear(logits.hidden.flatten(0, -2)[None, rows], logits.weight)


LossOfChunk = Callable[[Tensor, Batch, slice], tuple[Tensor, ...]]
"""(logits, (1, positions, vocab); their batch; which positions these are, counted row by row) ->
the loss and other sums over positions."""


def loss_by_chunks(logits: Logits, batch: Batch, loss_of: LossOfChunk) -> tuple[Tensor, ...]:
    """Compute what `loss_of` gives for all positions; whole logits are one chunk.

    Only the first value, the loss, has a gradient. The counts of a chunk's batch are those of the
    whole, so that its means add up.
    """
    points = logits if isinstance(logits, Tensor) else logits.hidden
    if points.shape[:-1] != batch.input_ids.shape:
        raise ValueError(
            f"the batch must be (batch, time) as the logits, here {tuple(points.shape[:-1])}, got "
            f"{tuple(batch.input_ids.shape)}"
        )
    flat = batch.flattened()

    def of_rows(part: Tensor, rows: slice) -> tuple[Tensor, ...]:
        return loss_of(part, flat.span(rows), rows)

    if isinstance(logits, Tensor):
        every_row = slice(None)
        loss, *further_sums = of_rows(logits_at(logits, every_row), every_row)
        return loss, *(value.detach() for value in further_sums)
    if not torch.is_grad_enabled() or not (points.requires_grad or logits.weight.requires_grad):
        fixed = logits.detach()
        chunks = _chunks(points, len(fixed.weight))
        return _sums([of_rows(logits_at(fixed, rows), rows) for rows in chunks])
    return _with_gradients(logits, of_rows)


def _with_gradients(
    logits: LazyLogits, of_rows: Callable[[Tensor, slice], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Compute losses and their gradients chunk by chunk, and add them up."""
    needs_hidden = logits.hidden.requires_grad
    needs_weight = logits.weight.requires_grad
    fixed = logits.detach()
    head = fixed.weight.requires_grad_(needs_weight)
    points = fixed.hidden.flatten(0, -2)
    hidden_grad = torch.empty_like(points) if needs_hidden else None
    weight_grad: Tensor | None = None
    sums_of_chunks = []
    for rows in _chunks(points, len(head)):
        chunk = points[rows].requires_grad_(needs_hidden)
        loss, *further_sums = of_rows(F.linear(chunk[None], head), rows)
        leaves = [leaf for leaf in (chunk, head) if leaf.requires_grad]
        gradients = list(torch.autograd.grad(loss, leaves))
        if needs_weight:
            # Summed in float32, whatever the precision of the product.
            part = gradients.pop()
            weight_grad = at_least_float32(part) if weight_grad is None else weight_grad.add_(part)
        if hidden_grad is not None:
            hidden_grad[rows] = gradients.pop()
        sums_of_chunks.append((loss.detach(), *(value.detach() for value in further_sums)))
    loss, *further_sums = _sums(sums_of_chunks)
    if hidden_grad is not None:
        hidden_grad = hidden_grad.view_as(logits.hidden)
    known = _KnownGradients.apply(  # type: ignore[no-untyped-call]
        loss, (hidden_grad, weight_grad), logits.hidden, logits.weight
    )
    return known, *further_sums


class _KnownGradients(torch.autograd.Function):
    """Gives a value, (), the gradients that were computed with it; they are only scaled later."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # `once_differentiable` would return constants.
            raise RuntimeError(
                "the gradient of this loss has no gradient itself; a cross-entropy's has one if "
                "both passes run within iiet.plain_formulas()"
            )
        scaled = (
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, *scaled


def _chunks(points: Tensor, vocab: int, elements: int | None = None) -> list[slice]:
    """Return slices of the positions of (..., any) with at most `elements` logits each."""
    num_rows = points.shape[:-1].numel()
    num_chunks = max(1, -(-num_rows * vocab // (elements or CHUNK_ELEMENTS)))
    size = max(1, -(-num_rows // num_chunks))
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def _sums(of_chunks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(
        torch.stack(values).sum() if len(values) > 1 else values[0]
        for values in zip(*of_chunks, strict=True)
    )


def cross_entropy(
    logits: Tensor, targets: Tensor, *, mask: Tensor | None = None, count: Count = None
) -> Tensor:
    """Compute the mean of `-log softmax(logits)[target]`, in float32 or better.

    Positions whose target is `NO_TARGET` do not count, whatever the mask says.
    """
    total, counted = _target_losses(logits, targets, mask, "sum")
    return total / _divisor(count, counted, total.dtype)


def _target_losses(
    logits: Tensor, targets: Tensor, mask: Tensor | None, reduction: Literal["sum", "none"]
) -> tuple[Tensor, Tensor]:
    """Return the sum, or the losses of all positions in one row; and which positions count."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must be (batch, time) as the logits, here {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    counted = targets != NO_TARGET
    if mask is not None:
        counted &= _counted(mask, logits)
        targets = targets.masked_fill(~counted, NO_TARGET)
        # The gradient there is zero times the softmax, which is NaN if the logits are.
        logits = logits.masked_fill(~counted.unsqueeze(-1), 0)
    # A GPU converts and takes the logarithm in one kernel.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = F.nll_loss(
        torch.log_softmax(logits, dim=-1, dtype=dtype).flatten(0, 1),
        targets.flatten(),
        ignore_index=NO_TARGET,
        reduction=reduction,
    )
    return losses, counted


def batch_cross_entropy(logits: Logits, batch: Batch) -> Tensor:
    """Compute the `cross_entropy` of a batch's targets."""

    def loss_of(part: Tensor, span: Batch, _: slice) -> tuple[Tensor]:
        return (cross_entropy(part, span.targets, mask=span.teacher_mask, count=span.target_count),)

    return loss_by_chunks(logits, batch, loss_of)[0]


def cross_entropy_and_accuracy(logits: Logits, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the `cross_entropy` of a batch, and the share of its targets that are likeliest."""

    def loss_of(part: Tensor, span: Batch, _: slice) -> tuple[Tensor, Tensor]:
        losses, counted = _target_losses(part, span.targets, span.teacher_mask, "sum")
        divisor = _divisor(span.target_count, counted, losses.dtype)
        is_right = (part.argmax(dim=-1) == span.targets) & counted
        return losses / divisor, is_right.sum() / divisor

    loss, accuracy = loss_by_chunks(logits, batch, loss_of)
    return loss, accuracy


def cross_entropy_by_component(
    logits: Logits, batch: Batch, *, num_components: int
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compute the `cross_entropy` of a batch, and what each component of the data adds to it.

    Returns:
        The loss; for each component its part of the loss, detached; for each its share of the
        targets. The loss is the sum of the parts, and the mean of a component is part / share.
    """

    def loss_of(part: Tensor, span: Batch, _: slice) -> tuple[Tensor, ...]:
        assert span.component_numbers is not None
        losses, counted = _target_losses(part, span.targets, span.teacher_mask, "none")
        divisor = _divisor(span.target_count, counted, losses.dtype)
        # All components at once: a GPU launches as many kernels for many as for one.
        numbers = torch.arange(num_components, device=losses.device)
        is_own = span.component_numbers.reshape(-1, 1) == numbers
        values = torch.stack([losses.detach(), counted.flatten().to(losses.dtype)])
        sums = (values[..., None] * is_own).sum(dim=1) / divisor
        return losses.sum() / divisor, *sums.flatten().unbind()

    loss, *by_component = loss_by_chunks(logits, batch, loss_of)
    return loss, tuple(by_component[:num_components]), tuple(by_component[num_components:])


def next_token_loss(logits: Logits, input_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute the mean of `-log p(token t+1 | tokens <= t)`: the `cross_entropy` of text.

    `mask` says which of `input_ids`, (batch, time), count as targets.
    """
    # Shifting the targets instead of the logits avoids a copy of the logits.
    return batch_cross_entropy(logits, Batch.of_text(input_ids, mask))


def hidden_state_error(
    teacher_hidden: Sequence[Tensor],
    student_hidden: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    count: Count = None,
) -> Tensor:
    """Compute the mean over layers and positions of `|h_student - h_teacher|^2 / |h_teacher|^2`.

    The error is relative, because hidden states grow with depth and the last layers would dominate.
    It is relative at each position, so that the parts of a batch add up to the whole. The teacher
    gets no gradient.
    """
    counted = _counted(mask, student_hidden[0])
    errors = []
    for teacher_state, student_state in zip(teacher_hidden, student_hidden, strict=True):
        target = at_least_float32(teacher_state.detach())
        difference = at_least_float32(student_state) - target
        if mask is not None:
            target = target.masked_fill(~counted.unsqueeze(-1), 0)
            difference = difference.masked_fill(~counted.unsqueeze(-1), 0)
        size = target.square().sum(dim=-1).clamp(min=torch.finfo(target.dtype).tiny)
        errors.append((difference.square().sum(dim=-1) / size).sum())
    error = torch.stack(errors).mean()
    return error / _divisor(count, counted, error.dtype)


def _counted(mask: Tensor | None, values: Tensor) -> Tensor:
    """Return the mask of `values`, (batch, time, any): all positions when None."""
    positions = values.shape[:-1]
    if mask is None:
        return torch.ones(positions, dtype=torch.bool, device=values.device)
    # One row or column would be broadcast to all and make the mean wrong.
    if mask.shape != positions:
        raise ValueError(
            f"mask must be (batch, time), here {tuple(positions)}, got {tuple(mask.shape)}"
        )
    return mask.bool()


def _divisor(count: Count, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the divisor of a mean over the positions that count, a scalar."""
    if count is None or isinstance(count, Tensor):
        count = counted.sum() if count is None else count
        return count.clamp(min=1).to(dtype)
    return torch.full((), count or 1.0, dtype=dtype, device=counted.device)


def kl_divergence(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    count: Count = None,
    kind: DivergenceKind = "forward",
) -> Tensor:
    """Compute the mean divergence between next-token distributions, times T^2.

    With `p = softmax(teacher / T)` and `q = softmax(student / T)`:

        forward   KL(p || q) = sum p log(p / q)
        reverse   KL(q || p)

    T^2 keeps the gradient's size when the temperature T rises. The teacher gets no gradient.

    Raises:
        ValueError: the shapes differ, or the temperature or the kind is not allowed.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher and student differ in shape: {tuple(teacher_logits.shape)} and "
            f"{tuple(student_logits.shape)}; they need the same tokens and vocabulary"
        )
    if not 1e-3 <= temperature <= 1e3:  # Beyond, its square is infinite in float32.
        raise ValueError(f"temperature must be from 0.001 to 1000, got {temperature}")
    if kind not in _DIVERGENCES:
        raise ValueError(f"divergence must be one of {tuple(_DIVERGENCES)}, got {kind!r}")
    teacher = teacher_logits.detach().flatten(0, -2)
    student = student_logits.detach().flatten(0, -2)
    counted = _counted(mask, student_logits).flatten()
    divisor = _divisor(count, counted, torch.promote_types(student.dtype, torch.float32))
    values = student.new_zeros(len(student), dtype=divisor.dtype)
    gradient = None
    if student_logits.requires_grad and torch.is_grad_enabled():
        # float16 would round most of the gradient to 0 before the loss scale arrives.
        kept = torch.float32 if student.dtype == torch.float16 else student.dtype
        gradient = torch.zeros_like(student, dtype=kept)
    elements = CPU_ELEMENTS if student.is_cpu else CHUNK_ELEMENTS
    for rows in _chunks(student, student.size(1), elements):
        log_p = _log_softened(teacher[rows], temperature)
        log_q = _log_softened(student[rows], temperature)
        value, slope = _DIVERGENCES[kind](log_p, log_q)
        # Rounding can take a tiny divergence below zero. Positions that do not count may hold NaN,
        # which a product would spread.
        values[rows] = value.clamp(min=0).masked_fill(~counted[rows], 0)
        if gradient is not None:
            # `slope` is with respect to logits / T: one T of T^2 remains.
            slope *= temperature / divisor
            gradient[rows] = slope.masked_fill_(~counted[rows, None], 0)
    divergence = values.sum() * (temperature**2 / divisor)
    if gradient is not None:
        divergence = _KnownGradients.apply(  # type: ignore[no-untyped-call]
            divergence, (gradient.view_as(student_logits),), student_logits
        )
    return divergence


def _log_softened(logits: Tensor, temperature: float) -> Tensor:
    logits = at_least_float32(logits)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


# Each of these returns the divergence of each row and its slope, the gradient with respect to the
# student's logits / T.


def _forward(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q); slope q - p."""
    p = log_p.exp()
    return _product(p, log_p - log_q).sum(-1), log_q.exp() - p


def _reverse(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p); slope q (log(q/p) - KL)."""
    q = log_q.exp()
    log_ratio = log_q - log_p
    value = _product(q, log_ratio).sum(-1)
    return value, _product(q, log_ratio - value.unsqueeze(-1))


def _product(probability: Tensor, value: Tensor) -> Tensor:
    """`probability * value`, and 0 where the probability is 0 and the value infinite."""
    return torch.where(probability > 0, probability * value, 0)


_DIVERGENCES = {"forward": _forward, "reverse": _reverse}
