"""Elastic training: one set of weights learns every schedule of a family.

    loss = L(full) + weight * sum over drawn members m of L(m)

A step runs the full schedule first, then each member of the family that is drawn, forward and
backward one after another. With a teacher, L is the distillation loss of each (`student_loss`).
Without one, L(full) is the cross-entropy, and L(m) = CE(m) + kl_weight * KL(full || m): the members
learn from what the full schedule predicted in this step, without a gradient to it and without
another forward pass. Its last hidden states are kept, and the logits are computed again in the
chunks of the loss, so a member costs its own forward and backward pass, and the head's product.
Source: slimmable networks (Yu et al. 2018) and in-place distillation (Yu and Huang 2019) for
widths; per layer and correction: this project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from iiet.batch import Batch
from iiet.chunked_loss import LazyLogits, Logits
from iiet.config import ModelConfig
from iiet.cost import training_flops_per_token
from iiet.distillation import DistillationConfig, Model, student_loss
from iiet.schedule import IterationSchedule

__all__ = ["AnswerKeeper", "member_flops_per_token", "member_loss"]


class AnswerKeeper:
    """A model that keeps what it predicted in its latest call, for `member_loss`.

    Called as the model is, with a `finish`.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.answer: Logits | None = None
        """Detached: logits, or the hidden states that they follow from."""

    def __call__(self, *inputs: Any, finish: Callable[..., Any], **options: Any) -> Any:
        """Call the model; its answer is kept within its forward pass."""

        def keep(logits: Logits, *others: Any) -> Any:
            if isinstance(logits, LazyLogits):
                self.answer = LazyLogits(logits.hidden.detach(), logits.weight.detach())
            else:
                self.answer = logits.detach()
            return finish(logits, *others)

        return self._model(*inputs, finish=keep, **options)


def member_loss(
    answer: Logits, batch: Batch, config: DistillationConfig
) -> Callable[[Logits], tuple[Tensor, dict[str, Tensor]]]:
    """Return `cross_entropy + kl_weight * KL(answer || member)` as a decoder's `finish`.

    Args:
        answer: of the full schedule, for this batch; see `AnswerKeeper`.
        batch: what the member predicts.
        config: weight and temperature of the divergence.
    """

    def loss_of(logits: Logits) -> tuple[Tensor, dict[str, Tensor]]:
        fixed = answer
        if isinstance(answer, LazyLogits) and isinstance(logits, LazyLogits):
            # The weights are those of this step. A sharded model may have moved them meanwhile.
            fixed = LazyLogits(answer.hidden, logits.weight).detached()
        return student_loss(lambda _: fixed, batch, config=config)(logits)

    return loss_of


def member_flops_per_token(
    config: ModelConfig, member: IterationSchedule, *, reads_full: bool
) -> float:
    """Count a member's forward and backward pass.

    `reads_full`: it learns from the full schedule, whose logits are computed once more.
    """
    again = 2 * config.dim * config.vocab_size if reads_full else 0
    return training_flops_per_token(config, member) + again
