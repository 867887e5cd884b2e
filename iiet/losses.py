"""The losses, each what its name says: next-token cross-entropy, divergences, hidden-state error.

In: logits `(batch, time, vocab)` or hidden states `(batch, time, dim)`. Out: a scalar, a mean per
token. The divergences are true ones: exactly zero with a zero gradient where teacher and student
agree, and never negative. A cross-entropy against soft targets, often called "KL", is neither.

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

__all__ = [
    "CHUNK_ELEMENTS",
    "DivergenceKind",
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
IGNORED = -100

Compare = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(rows, the student's logits / T of these rows) -> divergence of each row, its slope (its gradient
with respect to logits / T)."""


def next_token_loss(logits: Tensor, input_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute the mean of `-log p(token t+1 | tokens <= t)`, in float32 or better.

    Args:
        logits: (batch, time, vocab); those of the last position have no target and do not count.
        input_ids: (batch, time) of integers.
        mask: (batch, time) of bool, the tokens that count as targets; all of them when not given.

    Returns:
        A scalar; 0 when no token counts.

    Raises:
        ValueError: a mask of another shape.
    """
    _check_mask(mask, input_ids.shape)
    # Shifting the targets instead of the logits avoids a copy of the logits.
    targets = torch.full_like(input_ids, IGNORED)
    targets[:, :-1] = input_ids[:, 1:]
    if mask is not None:
        targets[:, :-1].masked_fill_(~mask[:, 1:].bool(), IGNORED)
    total = F.cross_entropy(
        _at_least_float32(logits).flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return total / (targets != IGNORED).sum().clamp(min=1)


def kl_divergence(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    kind: DivergenceKind = "forward",
) -> Tensor:
    """Compute the mean divergence per token between next-token distributions, times T^2.

    With `p = softmax(teacher / T)`, `q = softmax(student / T)` and `m = (p + q) / 2`: `forward` is
    `KL(p || q) = sum p log(p / q)`, `reverse` is `KL(q || p)`, `jensen_shannon` is
    `(KL(p || m) + KL(q || m)) / 2`. T^2 keeps the gradient's size when the temperature rises.

    Args:
        teacher_logits: (batch, time, vocab); never receives a gradient.
        student_logits: (batch, time, vocab).
        temperature: above 0; larger ones weigh the unlikely tokens more.
        mask: (batch, time) of bool, the positions whose distributions count; all when not given.
        kind: which divergence.

    Returns:
        A scalar of at least 0; 0 when no position counts.

    Raises:
        ValueError: shapes that differ, also of the mask, a temperature that is not above 0, or an
        unknown kind.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher and student differ in shape: {tuple(teacher_logits.shape)} and "
            f"{tuple(student_logits.shape)}; they need the same tokens and vocabulary"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if kind not in get_args(DivergenceKind):
        raise ValueError(f"divergence must be one of {get_args(DivergenceKind)}, got {kind!r}")
    theirs = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])

    def compare(rows: slice, scaled: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(_at_least_float32(theirs[rows]) / temperature, dim=-1)
        return _DIVERGENCES[kind](log_p, torch.log_softmax(scaled, dim=-1))

    return mean_divergence(student_logits, compare, temperature, mask)


def hidden_state_error(
    teacher_hidden: Sequence[Tensor],
    student_hidden: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the mean over layers and tokens of `|h_student - h_teacher|^2 / |h_teacher|^2`.

    Relative, because hidden states grow with depth and the last layers would decide alone; token by
    token, so that a batch in several passes, or of several workers, has the error of the whole.

    Args:
        teacher_hidden: one (batch, time, dim) per layer; never receives a gradient.
        student_hidden: the same shapes.
        mask: (batch, time) of bool, the positions that count; all when not given.

    Returns:
        A scalar of at least 0, exactly 0 with a zero gradient at equality or when none counts.

    Raises:
        ValueError: the two have different numbers of layers, or none; a mask of another shape.
    """
    if not teacher_hidden or len(teacher_hidden) != len(student_hidden):
        raise ValueError(
            f"got hidden states of {len(teacher_hidden)} teacher and {len(student_hidden)} student "
            "layers; they must be the same number, at least 1"
        )
    _check_mask(mask, student_hidden[0].shape[:-1])
    errors = []
    for theirs, ours in zip(teacher_hidden, student_hidden, strict=True):
        target = _at_least_float32(theirs.detach())
        difference = _at_least_float32(ours) - target
        if mask is not None:
            ignored = ~mask.bool().unsqueeze(-1)
            target = target.masked_fill(ignored, 0)
            difference = difference.masked_fill(ignored, 0)
        size = target.square().sum(dim=-1).clamp(min=torch.finfo(target.dtype).tiny)
        errors.append((difference.square().sum(dim=-1) / size).sum())
    num_counted = target[..., 0].numel() if mask is None else mask.bool().sum().clamp(min=1)
    return torch.stack(errors).mean() / num_counted


def _check_mask(mask: Tensor | None, tokens: torch.Size) -> None:
    # A mask of one row or one column would be spread over all of them, and the mean be wrong.
    if mask is not None and mask.shape != tokens:
        raise ValueError(
            f"mask must be (batch, time), here {tuple(tokens)}, got {tuple(mask.shape)}"
        )


def mean_divergence(
    student_logits: Tensor, compare: Compare, temperature: float, mask: Tensor | None
) -> Tensor:
    _check_mask(mask, student_logits.shape[:-1])
    counts = torch.ones(student_logits.shape[:-1], device=student_logits.device)
    if mask is not None:
        counts = counts * mask
    keep_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    divergence: Tensor = _MeanDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits, compare, counts, temperature, keep_gradient
    )
    return divergence


class _MeanDivergence(torch.autograd.Function):
    """The masked mean of a divergence over tokens; keeps its gradient, of the student's size."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        compare: Compare,
        counts: Tensor,
        temperature: float,
        keep_gradient: bool,
    ) -> Tensor:
        vocab = student.shape[-1]
        ours = student.reshape(-1, vocab)
        counted = counts.flatten() > 0
        values = ours.new_zeros(len(ours), dtype=torch.promote_types(ours.dtype, torch.float32))
        num_counted = counted.sum().clamp(min=1).to(values)
        gradient = torch.zeros_like(ours) if keep_gradient else None
        elements = min(CHUNK_ELEMENTS, max(FEWEST_ELEMENTS, ours.numel() // CHUNK_SHARE))
        chunk = max(1, elements // vocab)
        for start in range(0, len(ours), chunk):
            part = slice(start, start + chunk)
            value, slope = compare(part, _at_least_float32(ours[part]) / temperature)
            # Rounding can take a tiny divergence below zero. Masked positions may hold NaN, which
            # a product would spread.
            values[part] = value.clamp(min=0).masked_fill(~counted[part], 0)
            if gradient is not None:
                # `slope` is with respect to logits / T: one T of T^2 remains.
                slope *= temperature / num_counted
                gradient[part] = slope.masked_fill_(~counted[part, None], 0)
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(student))
        return values.sum() * (temperature**2 / num_counted)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


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


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
