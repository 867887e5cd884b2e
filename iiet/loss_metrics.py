"""The cross-entropy with further numbers from the same logits: accuracy, and losses by source."""

from __future__ import annotations

import torch
from torch import Tensor

from iiet.batch import Batch
from iiet.chunked_loss import Logits, loss_by_chunks
from iiet.losses import divisor_of, target_losses

__all__ = ["cross_entropy_and_accuracy", "cross_entropy_by_source"]


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
