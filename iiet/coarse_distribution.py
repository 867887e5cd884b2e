"""The teacher's top-k: a next-token distribution of k likeliest tokens and a tail, and its KL.

It needs a fraction of the memory of logits, so a teacher's can be stored. Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iiet.batch import Count
from iiet.chunked_loss import LazyLogits, Logits
from iiet.losses import check_temperature, expected, mean_divergence, rows_at_once, softened

__all__ = ["CoarseDistribution", "coarse_kl_divergence", "coarsen"]


@dataclass(frozen=True, eq=False, kw_only=True)
class CoarseDistribution:
    """A next-token distribution by its k likeliest tokens and one bucket for all others.

    The bucket keeps the tail's mass, so a divergence between two of them is a true one; without it,
    a student that has the k tokens right and all else wrong would look perfect.
    """

    ids: Tensor
    """(batch, time, k): the tokens that have a bucket of their own."""
    log_probs: Tensor
    """(batch, time, k): their log-probabilities."""
    log_tail: Tensor
    """(batch, time): log of the mass of all others; minus infinity if there are none."""
    temperature: float
    """What the logits were divided by."""

    def at(self, rows: slice) -> CoarseDistribution:
        """Return it at some positions, counted row by row, as one sequence."""
        return CoarseDistribution(
            ids=self.ids.flatten(0, -2)[None, rows],
            log_probs=self.log_probs.flatten(0, -2)[None, rows],
            log_tail=self.log_tail.flatten()[None, rows],
            temperature=self.temperature,
        )

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
def coarsen(logits: Logits, top_k: int, *, temperature: float = 1.0) -> CoarseDistribution:
    """Reduce `softmax(logits / T)` to its `top_k` likeliest tokens and a tail.

    A vocabulary of at most `top_k` tokens leaves the tail empty.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    check_temperature(temperature)
    *shape, vocab = logits.shape
    k = min(top_k, vocab)
    ids: list[Tensor] = []
    buckets: list[Tensor] = []
    for rows in _pieces(logits):
        scaled = softened(rows, temperature)
        ids.append(scaled.topk(k, dim=-1).indices)
        buckets.append(_log_buckets(scaled, ids[-1]))
    log_probs = torch.cat(buckets).view(*shape, k + 1)
    return CoarseDistribution(
        ids=torch.cat(ids).view(*shape, k),
        log_probs=log_probs[..., :-1],
        log_tail=log_probs[..., -1],
        temperature=temperature,
    )


def _pieces(logits: Logits) -> Iterator[Tensor]:
    """Yield all rows of the logits, so few at once that temporary tensors are small."""
    if isinstance(logits, LazyLogits):
        fixed = logits.detached()
        for rows in fixed.chunks():
            yield from _pieces(fixed.at(rows))
    else:
        flat = logits.reshape(-1, logits.shape[-1])
        yield from torch.split(flat, rows_at_once(flat))


def coarse_kl_divergence(
    teacher: CoarseDistribution,
    student_logits: Tensor,
    *,
    mask: Tensor | None = None,
    count: Count = None,
) -> Tensor:
    """Compute the mean KL(teacher || student) over the teacher's buckets, times T^2.

    It is at most the forward `kl_divergence`, and equal to it with a bucket for each token.
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
