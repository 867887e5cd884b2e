"""A next-token distribution told by its k likeliest tokens and one bucket that holds all others.

In: logits `(batch, time, vocab)`. Out: k + 1 log-probabilities per token, a few hundred bytes where
the logits have many thousand. The tail keeps its mass, so what remains is a distribution, and a
divergence between two of them is a true one; without the bucket, a student that guesses the k
tokens right and is wrong elsewhere would look perfect or even better than that. By the data
processing inequality it is never above the divergence of the full distributions, and grows to it
with k.

The tail's mass is a log-sum-exp over what the bucket holds, never one minus the rest, which has no
digits left where the tail is small. Some tokens at a time: what is computed on the way has several
times the size of their logits, and those of all would weigh more than a training step. Source: this
project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iiet.losses import (
    CHUNK_ELEMENTS,
    at_least_float32,
    check_temperature,
    expected,
    mean_divergence,
)

__all__ = ["CoarseDistribution", "coarse_kl_divergence", "coarsen"]


@dataclass(frozen=True, eq=False, kw_only=True)
class CoarseDistribution:
    """The k likeliest tokens of each position, and the rest as one."""

    ids: Tensor
    """(batch, time, k) of integers: the tokens that have a bucket of their own."""
    log_probs: Tensor
    """(batch, time, k): their log-probabilities at `temperature`."""
    log_tail: Tensor
    """(batch, time): log of the mass of all others; minus infinity where there are none."""
    temperature: float
    """What the logits were divided by before any of this."""

    @classmethod
    def joined(cls, parts: Sequence[CoarseDistribution]) -> CoarseDistribution:
        """Join distributions over other sequences, one after the other, at least one."""
        return cls(
            ids=torch.cat([part.ids for part in parts]),
            log_probs=torch.cat([part.log_probs for part in parts]),
            log_tail=torch.cat([part.log_tail for part in parts]),
            temperature=parts[0].temperature,
        )


@torch.no_grad()
def coarsen(logits: Tensor, top_k: int, *, temperature: float = 1.0) -> CoarseDistribution:
    """Reduce `softmax(logits / T)` to its `top_k` likeliest tokens and a tail.

    Args:
        logits: (batch, time, vocab).
        top_k: at least 1; all tokens, and an empty tail, if the vocabulary is no larger.
        temperature: above 0.

    Raises:
        ValueError: `top_k` or the temperature is out of range.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    check_temperature(temperature)
    vocab = logits.shape[-1]
    parts: list[tuple[Tensor, Tensor]] = []
    for rows in torch.split(logits.reshape(-1, vocab), max(1, CHUNK_ELEMENTS // vocab)):
        scaled = at_least_float32(rows) / temperature
        ids = scaled.topk(min(top_k, vocab), dim=-1).indices
        parts.append((ids, _log_buckets(scaled, ids)))
    ids, buckets = (
        torch.cat(whole).view(*logits.shape[:-1], whole[0].shape[-1])
        for whole in zip(*parts, strict=True)
    )
    return CoarseDistribution(
        ids=ids,
        log_probs=buckets[..., :-1],
        log_tail=buckets[..., -1],
        temperature=temperature,
    )


def coarse_kl_divergence(
    teacher: CoarseDistribution,
    student_logits: Tensor,
    *,
    mask: Tensor | None = None,
    count: float | None = None,
) -> Tensor:
    """Compute the mean KL(teacher || student) per position over the teacher's buckets, times T^2.

    The student's tokens fall into the same k + 1 buckets, at the teacher's temperature T. Not above
    the forward `kl_divergence` of the full distributions, and equal to it with a bucket for each
    token; `mask` and `count` are as there.

    Raises:
        ValueError: teacher, student or mask hold different numbers of tokens, or the teacher more
        buckets than the vocabulary.
    """
    num_top = teacher.ids.shape[-1]
    if teacher.ids.shape[:-1] != student_logits.shape[:-1] or num_top > student_logits.shape[-1]:
        raise ValueError(
            f"the teacher has {num_top} likeliest tokens at {tuple(teacher.ids.shape[:-1])} "
            f"positions, the student logits of shape {tuple(student_logits.shape)}; "
            "they need the same tokens and vocabulary"
        )
    ids = teacher.ids.long().reshape(-1, num_top)
    log_p = torch.cat([teacher.log_probs, teacher.log_tail.unsqueeze(-1)], dim=-1).detach()
    log_p = log_p.reshape(-1, num_top + 1)

    def compare(rows: slice, scaled: Tensor) -> tuple[Tensor, Tensor]:
        return _forward_over_buckets(ids[rows], log_p[rows].to(scaled.dtype), scaled)

    return mean_divergence(student_logits, compare, teacher.temperature, mask, count)


def _forward_over_buckets(ids: Tensor, log_p: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) over buckets; its slope is q_v - p_v in a bucket of one token, and in the tail
    q_v (1 - p_tail / q_tail): the tail's own token by token, moved as one."""
    log_q = _log_buckets(scaled, ids)
    p = log_p.exp()
    log_each = torch.log_softmax(scaled, dim=-1)
    # As logarithms: where q's tail has almost no mass, p_tail / q_tail alone would overflow. Equal
    # tails leave exactly 0.
    gap = log_p[:, -1:] - log_q[:, -1:]
    has_mass = (log_each > -math.inf) & (log_p[:, -1:] > -math.inf)
    slope = log_each.exp() - torch.where(has_mass, log_each + gap, -math.inf).exp()
    slope.scatter_(-1, ids, (log_q.exp() - p)[:, :-1])
    return expected(p, log_p - log_q), slope


def _log_buckets(scaled: Tensor, ids: Tensor) -> Tensor:
    """Return the log-mass of each bucket under `softmax(scaled)`, (..., k + 1), the tail last.

    Equal inputs give equal bits, on which a loss of exactly 0 rests.
    """
    total = scaled.logsumexp(-1, keepdim=True)
    tail = scaled.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([scaled.gather(-1, ids), tail], dim=-1) - total
