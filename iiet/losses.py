"""The losses, each what its name says: cross-entropy, divergences, hidden-state error.

In: logits `(batch, time, vocab)` or hidden states `(batch, time, dim)`, and a `mask`, `(batch,
time)` of bool: the positions that count, all when not given. Out: a scalar, the mean over these
positions, 0 where there are none. What stands at the others does not matter, be it no number. The
sum is divided by `count` where it is given, so that parts of a batch can add up to the whole's mean
(`Batch.split`).

The divergences are true ones: exactly zero with a zero gradient where teacher and student agree,
and never negative. A cross-entropy against soft targets, often called "KL", is neither.

With a large vocabulary the logits are the largest tensor of a training step. A divergence written
in plain operations saves several more of that size for its backward; here the gradient, which has a
closed form, is computed chunk by chunk in the forward and is the only thing kept.
Source: Hinton et al. 2015 (temperature and its square); this project (gradients below).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from iiet.batch import NO_TARGET, Batch

__all__ = [
    "CHUNK_ELEMENTS",
    "DivergenceKind",
    "batch_cross_entropy",
    "cross_entropy",
    "hidden_state_error",
    "kl_divergence",
    "mean_divergence",
    "next_token_loss",
]

DivergenceKind = Literal["forward", "reverse", "jensen_shannon"]

CHUNK_ELEMENTS = 1 << 21
"""Most logits that are worked on at a time: more save no time."""
# A chunk of tokens x vocabulary is this share of the logits, which half a dozen tensors of its size
# then leave the largest of the step, within these numbers of elements: fewer do not keep a core
# busy, more save no time.
CHUNK_SHARE = 16
FEWEST_ELEMENTS = 1 << 16

Compare = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(rows, the student's logits / T of these rows) -> divergence of each row, its slope (its gradient
with respect to logits / T)."""


def cross_entropy(
    logits: Tensor, targets: Tensor, *, mask: Tensor | None = None, count: float | None = None
) -> Tensor:
    """Compute the mean of `-log softmax(logits)[target]`, in float32 or better.

    Args:
        logits: (batch, time, vocab).
        targets: (batch, time) of integers; positions with `NO_TARGET` do not count.
        mask: which others count.
        count: divides the sum, instead of the number of targets that count.

    Raises:
        ValueError: logits, targets and mask do not fit together.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must be (batch, time) as the logits, here {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    counted = _counted(mask, logits) & (targets != NO_TARGET)
    if mask is not None:
        targets = targets.masked_fill(~counted, NO_TARGET)
        # Their gradient is zero times their softmax, which is no number if they are none.
        logits = logits.masked_fill(~counted.unsqueeze(-1), 0)
    total = F.cross_entropy(
        at_least_float32(logits).flatten(0, 1),
        targets.flatten(),
        ignore_index=NO_TARGET,
        reduction="sum",
    )
    return total / _divisor(count, counted, total.dtype)


def batch_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Compute the `cross_entropy` of a batch's targets from the logits, (batch, time, vocab)."""
    return cross_entropy(logits, batch.targets, mask=batch.taught, count=batch.target_count)


def next_token_loss(logits: Tensor, input_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute the mean of `-log p(token t+1 | tokens <= t)`: the `cross_entropy` of text.

    Args:
        logits: (batch, time, vocab); those of the last position have no target and do not count.
        input_ids: (batch, time) of integers.
        mask: the tokens that count as targets; all when not given.
    """
    # Shifting the targets instead of the logits avoids a copy of the logits.
    return batch_cross_entropy(logits, Batch.of_text(input_ids, mask))


def kl_divergence(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    count: float | None = None,
    kind: DivergenceKind = "forward",
) -> Tensor:
    """Compute the mean divergence per position between next-token distributions, times T^2.

    With `p = softmax(teacher / T)`, `q = softmax(student / T)` and `m = (p + q) / 2`: `forward` is
    `KL(p || q) = sum p log(p / q)`, `reverse` is `KL(q || p)`, `jensen_shannon` is
    `(KL(p || m) + KL(q || m)) / 2`. T^2 keeps the gradient's size when the temperature rises.

    Args:
        teacher_logits: (batch, time, vocab); never receives a gradient.
        student_logits: (batch, time, vocab).
        temperature: above 0; larger ones weigh the unlikely tokens more.
        mask: which positions count.
        count: divides the sum, instead of the number of positions that count.
        kind: which divergence.

    Raises:
        ValueError: shapes that differ, also of the mask, a temperature that is not above 0, or an
        unknown kind.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher and student differ in shape: {tuple(teacher_logits.shape)} and "
            f"{tuple(student_logits.shape)}; they need the same tokens and vocabulary"
        )
    check_temperature(temperature)
    if kind not in get_args(DivergenceKind):
        raise ValueError(f"divergence must be one of {get_args(DivergenceKind)}, got {kind!r}")
    theirs = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])

    def compare(rows: slice, scaled: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(at_least_float32(theirs[rows]) / temperature, dim=-1)
        return _DIVERGENCES[kind](log_p, torch.log_softmax(scaled, dim=-1))

    return mean_divergence(student_logits, compare, temperature, mask, count)


def hidden_state_error(
    teacher_hidden: Sequence[Tensor],
    student_hidden: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    count: float | None = None,
) -> Tensor:
    """Compute the mean over layers and positions of `|h_student - h_teacher|^2 / |h_teacher|^2`.

    Relative, because hidden states grow with depth and the last layers would decide alone; position
    by position, so that a batch in several passes, or of several workers, has the error of the
    whole.

    Args:
        teacher_hidden: one (batch, time, dim) per layer; never receives a gradient.
        student_hidden: the same shapes.
        mask: which positions count.
        count: divides the sum, instead of the number of positions that count.

    Raises:
        ValueError: the two have different numbers of layers, or none; a mask of another shape.
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
    return error / _divisor(count, counted, error.dtype)


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def _counted(mask: Tensor | None, values: Tensor) -> Tensor:
    """Return which positions of `values`, (batch, time, any), count; (batch, time) of bool."""
    positions = values.shape[:-1]
    if mask is None:
        return torch.ones(positions, dtype=torch.bool, device=values.device)
    # A mask of one row or one column would be spread over all of them, and the mean be wrong.
    if mask.shape != positions:
        raise ValueError(
            f"mask must be (batch, time), here {tuple(positions)}, got {tuple(mask.shape)}"
        )
    return mask.bool()


def _divisor(count: float | None, counted: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a sum over the positions that count is divided by; 1 where there are none."""
    if count is None:
        return counted.sum().clamp(min=1).to(dtype)
    return torch.full((), count or 1.0, dtype=dtype, device=counted.device)


def mean_divergence(
    student_logits: Tensor,
    compare: Compare,
    temperature: float,
    mask: Tensor | None,
    count: float | None,
) -> Tensor:
    counted = _counted(mask, student_logits)
    divisor = _divisor(count, counted, _wider(student_logits.dtype))
    keep_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    divergence: Tensor = _MeanDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits, compare, counted.flatten(), divisor, temperature, keep_gradient
    )
    return divergence


class _MeanDivergence(torch.autograd.Function):
    """The masked mean of a divergence over tokens; keeps its gradient, of the student's size."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        compare: Compare,
        counted: Tensor,
        divisor: Tensor,
        temperature: float,
        keep_gradient: bool,
    ) -> Tensor:
        vocab = student.shape[-1]
        ours = student.reshape(-1, vocab)
        values = ours.new_zeros(len(ours), dtype=divisor.dtype)
        # Divided by the number of positions, most slopes are below what float16 can hold; they must
        # meet the scale of the loss, which comes with the backward, before they are rounded to it.
        kept = torch.float32 if ours.dtype == torch.float16 else ours.dtype
        gradient = torch.zeros_like(ours, dtype=kept) if keep_gradient else None
        elements = min(CHUNK_ELEMENTS, max(FEWEST_ELEMENTS, ours.numel() // CHUNK_SHARE))
        chunk = max(1, elements // vocab)
        for start in range(0, len(ours), chunk):
            part = slice(start, start + chunk)
            value, slope = compare(part, at_least_float32(ours[part]) / temperature)
            # Rounding can take a tiny divergence below zero. Masked positions may hold NaN, which
            # a product would spread.
            values[part] = value.clamp(min=0).masked_fill(~counted[part], 0)
            if gradient is not None:
                # `slope` is with respect to logits / T: one T of T^2 remains.
                slope *= temperature / divisor
                gradient[part] = slope.masked_fill_(~counted[part, None], 0)
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


def _forward(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q); its slope is q - p."""
    p = log_p.exp()
    return expected(p, log_p - log_q), log_q.exp() - p


def _reverse(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p); its slope is q (log(q/p) - KL)."""
    q, surprise = log_q.exp(), log_q - log_p
    value = expected(q, surprise)
    return value, _product(q, surprise - value.unsqueeze(-1))


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || m) + KL(q || m)) / 2; its slope is q (log(q/m) - KL(q || m)) / 2."""
    p, q = log_p.exp(), log_q.exp()
    difference = log_q - log_p
    # log((1 + e^-|d|) / 2) is exactly 0 at d = 0, which log(m) from rounded p and q is not.
    half = torch.log1p(torch.expm1(-difference.abs()) / 2)
    surprise = difference.clamp(max=0) - half
    student_value = expected(q, surprise)
    teacher_value = expected(p, (-difference).clamp(max=0) - half)
    slope = _product(q, surprise - student_value.unsqueeze(-1)) / 2
    return (teacher_value + student_value) / 2, slope


_DIVERGENCES = {"forward": _forward, "reverse": _reverse, "jensen_shannon": _jensen_shannon}


def _product(probability: Tensor, value: Tensor) -> Tensor:
    """`probability * value`, and 0 where the probability is 0, whatever infinity stands there."""
    return torch.where(probability > 0, probability * value, 0)


def expected(probability: Tensor, value: Tensor) -> Tensor:
    """Sum `probability * value` over the last axis."""
    return _product(probability, value).sum(dim=-1)


def _wider(dtype: torch.dtype) -> torch.dtype:
    """Return the precision that is computed in: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(values: Tensor) -> Tensor:
    return values.to(_wider(values.dtype))
