"""Losses: cross-entropy, divergences between next-token distributions, error of hidden states.

In: logits, (batch, time, vocab), or hidden states, (batch, time, dim). `mask`, (batch, time) of
bool, says which positions count (default: all); values at the others, NaN included, have no effect.
Out: the mean over the positions that count, a scalar; 0 if there are none. `count` replaces their
number as the divisor, so that the parts of a batch add up to the whole's mean (`Batch.split`).

The divergences are exactly 0, with gradient 0, where teacher and student agree. Logits are the
largest tensor of a training step, and autograd would keep several of that size for a divergence. So
the forward pass computes the gradient by its closed form, chunk by chunk, and keeps nothing else.
Shapes that differ, and values out of range, are a ValueError.
Source: Hinton et al. 2015 (temperature and its square); this project (gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from iiet import chunked_loss
from iiet.arithmetic import at_least_float32
from iiet.batch import NO_TARGET, Batch, Count
from iiet.chunked_loss import Logits, loss_by_chunks

__all__ = [
    "DivergenceKind",
    "batch_cross_entropy",
    "cross_entropy",
    "cross_entropy_and_accuracy",
    "cross_entropy_by_source",
    "hidden_state_error",
    "kl_divergence",
    "mean_divergence",
    "next_token_loss",
    "rows_at_once",
    "softened",
]

DivergenceKind = Literal["forward", "reverse", "jensen_shannon"]

# A divergence has half a dozen temporary tensors. On a CPU each is this share of the logits, so all
# are smaller than the logits. Below the lower bound a core is not busy; above the upper one no time
# is saved.
CHUNK_SHARE = 16
FEWEST_ELEMENTS = 1 << 16
CHUNK_ELEMENTS = 1 << 21
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
"""Of a divergence."""

Compare = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(rows, the student's logits / T of these rows) -> (divergence of each row, its gradient with
respect to logits / T)."""


def cross_entropy(
    logits: Tensor, targets: Tensor, *, mask: Tensor | None = None, count: Count = None
) -> Tensor:
    """Compute the mean of `-log softmax(logits)[target]`, in float32 or better.

    Positions whose target is `NO_TARGET` do not count, whatever the mask says.
    """
    total, counted = target_losses(logits, targets, mask, reduction="sum")
    return total / divisor_of(count, counted, total.dtype)


def target_losses(
    logits: Tensor, targets: Tensor, mask: Tensor | None, *, reduction: Literal["sum", "none"]
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

    def loss_of(part: Tensor, span: Batch, _: slice | None) -> tuple[Tensor]:
        loss = cross_entropy(part, span.targets, mask=span.taught, count=span.target_count)
        return (loss,)

    (loss,) = loss_by_chunks(logits, batch, loss_of)
    return loss


def cross_entropy_and_accuracy(logits: Logits, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the `cross_entropy` of a batch, and the share of its targets that are likeliest."""

    def loss_of(part: Tensor, span: Batch, _: slice | None) -> tuple[Tensor, Tensor]:
        losses, counted = target_losses(part, span.targets, span.taught, reduction="sum")
        divisor = divisor_of(span.target_count, counted, losses.dtype)
        is_right = (part.argmax(dim=-1) == span.targets) & counted
        return losses / divisor, is_right.sum() / divisor

    loss, accuracy = loss_by_chunks(logits, batch, loss_of)
    return loss, accuracy


def cross_entropy_by_source(
    logits: Logits, batch: Batch, *, num_sources: int
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compute the `cross_entropy` of a batch, and what each of its sources adds to it.

    Returns:
        The loss; for each source its part of the loss, detached; for each source its share of the
        targets. The loss is the sum of the parts, and the mean of a source is part / share.
    """

    def loss_of(part: Tensor, span: Batch, _: slice | None) -> tuple[Tensor, ...]:
        assert span.sources is not None
        losses, counted = target_losses(part, span.targets, span.taught, reduction="none")
        divisor = divisor_of(span.target_count, counted, losses.dtype)
        # All sources at once: a GPU launches as many kernels for many as for one.
        numbers = torch.arange(num_sources, device=losses.device)
        is_own = span.sources.reshape(-1, 1) == numbers
        values = torch.stack([losses.detach(), counted.flatten().to(losses.dtype)])
        sums = (values[..., None] * is_own).sum(dim=1) / divisor
        return losses.sum() / divisor, *sums.flatten().unbind()

    loss, *others = loss_by_chunks(logits, batch, loss_of)
    return loss, tuple(others[:num_sources]), tuple(others[num_sources:])


def next_token_loss(logits: Logits, input_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute the mean of `-log p(token t+1 | tokens <= t)`: the `cross_entropy` of text.

    `mask` says which of `input_ids`, (batch, time), count as targets.
    """
    # Shifting the targets instead of the logits avoids a copy of the logits.
    return batch_cross_entropy(logits, Batch.of_text(input_ids, mask))


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

    With `p = softmax(teacher / T)`, `q = softmax(student / T)` and `m = (p + q) / 2`:

        forward          KL(p || q) = sum p log(p / q)
        reverse          KL(q || p)
        jensen_shannon   (KL(p || m) + KL(q || m)) / 2

    T^2 keeps the gradient's size when the temperature T rises. The teacher gets no gradient.

    Raises:
        ValueError: the shapes differ, or the temperature or the kind is not allowed.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher and student differ in shape: {tuple(teacher_logits.shape)} and "
            f"{tuple(student_logits.shape)}; they need the same tokens and vocabulary"
        )
    check_temperature(temperature)
    if kind not in _DIVERGENCES:
        raise ValueError(f"divergence must be one of {tuple(_DIVERGENCES)}, got {kind!r}")
    theirs = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])

    def compare(rows: slice, scaled: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(softened(theirs[rows], temperature), dim=-1)
        return _DIVERGENCES[kind](log_p, torch.log_softmax(scaled, dim=-1))

    return mean_divergence(student_logits, compare, temperature, mask, count)


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

    Raises:
        ValueError: there are no layers, or their numbers differ.
    """
    if not teacher_hidden or len(teacher_hidden) != len(student_hidden):
        raise ValueError(
            f"got hidden states of {len(teacher_hidden)} teacher and {len(student_hidden)} student "
            "layers; they must be the same number, at least 1"
        )
    counted = _counted(mask, student_hidden[0])
    errors = []
    for theirs, ours in zip(teacher_hidden, student_hidden, strict=True):
        target = at_least_float32(theirs.detach())
        difference = at_least_float32(ours) - target
        if mask is not None:
            target = target.masked_fill(~counted.unsqueeze(-1), 0)
            difference = difference.masked_fill(~counted.unsqueeze(-1), 0)
        size = target.square().sum(dim=-1).clamp(min=torch.finfo(target.dtype).tiny)
        errors.append((difference.square().sum(dim=-1) / size).sum())
    error = torch.stack(errors).mean()
    return error / divisor_of(count, counted, error.dtype)


def check_temperature(temperature: float) -> None:
    # Beyond, a quotient or the square is infinite in float32, and the divergence NaN.
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(
            f"temperature must be from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}, "
            f"got {temperature}"
        )


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


def divisor_of(count: Count, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the divisor of a mean over the positions that count, a scalar."""
    if count is None or isinstance(count, Tensor):
        count = counted.sum() if count is None else count
        return count.clamp(min=1).to(dtype)
    return torch.full((), count or 1.0, dtype=dtype, device=counted.device)


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Compute `logits / T`, in float32 or better."""
    logits = at_least_float32(logits)
    return logits if temperature == 1 else logits / temperature


def rows_at_once(logits: Tensor) -> int:
    """Return how many rows of logits, (rows, vocab), are compared with a teacher's together."""
    elements = min(CHUNK_ELEMENTS, max(FEWEST_ELEMENTS, logits.numel() // CHUNK_SHARE))
    if not logits.is_cpu:  # Each chunk is three dozen kernels, whose launches cost time.
        elements = chunked_loss.CHUNK_ELEMENTS
    return max(1, elements // logits.shape[-1])


def mean_divergence(
    student_logits: Tensor,
    compare: Compare,
    temperature: float,
    mask: Tensor | None,
    count: Count,
) -> Tensor:
    """Compute the mean of the divergence that `compare` gives, times T^2."""
    keep_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    divergence: Tensor = _MeanDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits, compare, temperature, mask, count, keep_gradient
    )
    return divergence


class _MeanDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        compare: Compare,
        temperature: float,
        mask: Tensor | None,
        count: Count,
        keep_gradient: bool,
    ) -> Tensor:
        vocab = student.shape[-1]
        ours = student.reshape(-1, vocab)
        counted = _counted(mask, student).flatten()
        divisor = divisor_of(count, counted, torch.promote_types(student.dtype, torch.float32))
        values = ours.new_zeros(len(ours), dtype=divisor.dtype)
        # float16 would round most of the gradient to 0 before the loss scale arrives in `backward`.
        kept = torch.float32 if ours.dtype == torch.float16 else ours.dtype
        gradient = torch.zeros_like(ours, dtype=kept) if keep_gradient else None
        chunk = rows_at_once(ours)
        for start in range(0, len(ours), chunk):
            rows = slice(start, start + chunk)
            value, slope = compare(rows, softened(ours[rows], temperature))
            # Rounding can take a tiny divergence below zero. Positions that do not count may hold
            # NaN, which a product would spread.
            values[rows] = value.clamp(min=0).masked_fill(~counted[rows], 0)
            if gradient is not None:
                # `slope` is with respect to logits / T: one T of T^2 remains.
                slope *= temperature / divisor
                gradient[rows] = slope.masked_fill_(~counted[rows, None], 0)
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(student))
            ctx.dtype = student.dtype
        return values.sum() * (temperature**2 / divisor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient * upstream.to(gradient.dtype)
        return scaled.to(ctx.dtype), None, None, None, None, None


# Each of these returns the divergence of each row and its slope, the gradient with respect to the
# student's logits / T.


def _forward(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q); slope q - p."""
    p = log_p.exp()
    return expected(p, log_p - log_q), log_q.exp() - p


def _reverse(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p); slope q (log(q/p) - KL)."""
    q, log_ratio = log_q.exp(), log_q - log_p
    value = expected(q, log_ratio)
    return value, _product(q, log_ratio - value.unsqueeze(-1))


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || m) + KL(q || m)) / 2; slope q (log(q/m) - KL(q || m)) / 2."""
    p, q = log_p.exp(), log_q.exp()
    difference = log_q - log_p
    # log((1 + e^-|d|) / 2) is exactly 0 at d = 0, which log(m) from rounded p and q is not.
    half = torch.log1p(torch.expm1(-difference.abs()) / 2)
    log_ratio = difference.clamp(max=0) - half
    student_value = expected(q, log_ratio)
    teacher_value = expected(p, (-difference).clamp(max=0) - half)
    slope = _product(q, log_ratio - student_value.unsqueeze(-1)) / 2
    return (teacher_value + student_value) / 2, slope


_DIVERGENCES = {"forward": _forward, "reverse": _reverse, "jensen_shannon": _jensen_shannon}


def _product(probability: Tensor, value: Tensor) -> Tensor:
    """`probability * value`, and 0 where the probability is 0 and the value infinite."""
    return torch.where(probability > 0, probability * value, 0)


def expected(probability: Tensor, value: Tensor) -> Tensor:
    return _product(probability, value).sum(dim=-1)
