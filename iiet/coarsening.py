"""Top-k distributions: the k likeliest tokens of each position and one bucket for all others.

In: logits (batch, time, vocab). Out: k + 1 log-probabilities per token, a few hundred bytes instead
of thousands. The bucket keeps the tail's mass, so the divergence between two of them is a true one,
at most that of the full distributions, and grows to it with k. Without the bucket, a student that
has the k tokens right and all else wrong would look perfect. Source: this project.
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
    """(batch, time, k): the tokens that have a bucket of their own."""
    log_probs: Tensor
    """(batch, time, k): their log-probabilities at `temperature`."""
    log_tail: Tensor
    """(batch, time): log of the mass of all others; minus infinity if there are none."""
    temperature: float
    """What the logits were divided by."""

    @classmethod
    def joined(cls, parts: Sequence[CoarseDistribution]) -> CoarseDistribution:
        """Concatenate distributions along the batch; at least one."""
        return cls(
            ids=torch.cat([part.ids for part in parts]),
            log_probs=torch.cat([part.log_probs for part in parts]),
            log_tail=torch.cat([part.log_tail for part in parts]),
            temperature=parts[0].temperature,
        )


@torch.no_grad()
def coarsen(logits: Tensor, top_k: int, *, temperature: float = 1.0) -> CoarseDistribution:
    """Reduce `softmax(logits / T)` to its `top_k` likeliest tokens and a tail.

    The tail is empty if the vocabulary has no more tokens than `top_k`.

    Raises:
        ValueError: `top_k` is below 1, or the temperature not above 0.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    check_temperature(temperature)
    *shape, vocab = logits.shape
    k = min(top_k, vocab)
    ids: list[Tensor] = []
    buckets: list[Tensor] = []
    # In chunks, since the temporary tensors have several times the size of the logits.
    for rows in torch.split(logits.reshape(-1, vocab), max(1, CHUNK_ELEMENTS // vocab)):
        scaled = at_least_float32(rows) / temperature
        ids.append(scaled.topk(k, dim=-1).indices)
        buckets.append(_log_buckets(scaled, ids[-1]))
    log_probs = torch.cat(buckets).view(*shape, k + 1)
    return CoarseDistribution(
        ids=torch.cat(ids).view(*shape, k),
        log_probs=log_probs[..., :-1],
        log_tail=log_probs[..., -1],
        temperature=temperature,
    )


def coarse_kl_divergence(
    teacher: CoarseDistribution,
    student_logits: Tensor,
    *,
    mask: Tensor | None = None,
    count: float | None = None,
) -> Tensor:
    """Compute the mean KL(teacher || student) over the teacher's buckets, times T^2.

    It is at most the forward `kl_divergence`, and equal to it with a bucket for each token.

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
    ids = teacher.ids.long().flatten(0, -2)
    log_p = torch.cat([teacher.log_probs, teacher.log_tail.unsqueeze(-1)], dim=-1)
    log_p = log_p.detach().flatten(0, -2)

    def compare(rows: slice, scaled: Tensor) -> tuple[Tensor, Tensor]:
        return _forward_over_buckets(ids[rows], log_p[rows].to(scaled.dtype), scaled)

    return mean_divergence(student_logits, compare, teacher.temperature, mask, count)


def _forward_over_buckets(ids: Tensor, log_p: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) over buckets; slope q_v - p_v for a token with a bucket of its own, and
    q_v (1 - p_tail / q_tail) for the others."""
    log_q = _log_buckets(scaled, ids)
    p = log_p.exp()
    log_each = torch.log_softmax(scaled, dim=-1)
    # In logarithms: p_tail / q_tail overflows where q's tail has almost no mass. Equal tails give
    # exactly 0.
    gap = log_p[:, -1:] - log_q[:, -1:]
    has_mass = (log_each > -math.inf) & (log_p[:, -1:] > -math.inf)
    slope = log_each.exp() - torch.where(has_mass, log_each + gap, -math.inf).exp()
    slope.scatter_(-1, ids, (log_q.exp() - p)[:, :-1])
    return expected(p, log_p - log_q), slope


def _log_buckets(scaled: Tensor, ids: Tensor) -> Tensor:
    """Return the log-mass of each bucket under `softmax(scaled)`, (..., k + 1), the tail last."""
    total = scaled.logsumexp(-1, keepdim=True)
    # Not log(1 - sum of the others), which has no digits left where the tail is small.
    tail = scaled.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([scaled.gather(-1, ids), tail], dim=-1) - total
