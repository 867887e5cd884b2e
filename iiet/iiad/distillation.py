"""Distillation (IIAD): a student under a cheaper iteration schedule learns from its full teacher.

In: student, teacher and a batch. Out: the loss and its parts, for any training loop. The student
starts from the teacher's weights; the teacher is a frozen copy of its own, because the optimizer
changes weights in place. A step costs the student's forward and backward and the teacher's forward.
Source: IIAD (IIET paper); weight, temperature and the window of steps from the authors' code;
reverse divergence and hidden-state term: this project.

Elastic training makes one set of weights learn every schedule of a family:

    loss = L(full) + weight * sum over drawn members m of L(m)

A step runs the full schedule first, then each drawn member. With a teacher, L is the distillation
loss of each (`student_loss`). Without one, L(full) is the cross-entropy, and the members learn from
what the full schedule predicted in this step (`AnswerKeeper`, `elastic_loss`):
L(m) = CE(m) + kl_weight * KL(full || m). Only its last hidden states are kept, and the logits are
computed again in the chunks of the loss. Source: slimmable networks (Yu et al. 2018) and in-place
distillation (Yu and Huang 2019) for widths; per layer and correction: this project.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from iiet.decoder import Decoder
from iiet.model.batch import Batch
from iiet.model.config import DistillationConfig
from iiet.model.losses import (
    LazyLogits,
    Logits,
    batch_cross_entropy,
    hidden_state_error,
    kl_divergence,
    logits_at,
    loss_by_chunks,
)

__all__ = [
    "AnswerKeeper",
    "RememberingTeacher",
    "distillation_loss",
    "frozen_teacher",
    "elastic_loss",
    "student_loss",
]


Model = Callable[..., Any]
"""`model(input_ids) -> logits`; with `return_hidden=True`, `(logits, one hidden state per layer)`.
A decoder or a wrapped one. Only of a `Decoder` the logits are computed in chunks
(`iiet.model.losses`)."""
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def frozen_teacher(decoder: ModuleT) -> ModuleT:
    """Copy a model for teaching: own storage, eval mode, no gradients.

    A `forward`, or a layer's `field`, that was compiled or wrapped on the original is dropped; the
    copy may be compiled again.
    """
    teacher = copy.deepcopy(decoder)
    for module in teacher.modules():
        # A copied function still calls the original module; a copied bound method calls the copy.
        # The result of `torch.compile(module)` builds its function again when copied.
        for name in ("forward", "field"):
            is_function = isinstance(vars(module).get(name), FunctionType)
            if is_function and "_orig_mod" not in module._modules:
                delattr(module, name)
    return teacher.requires_grad_(False).eval()


class RememberingTeacher:
    """A teacher that several schedules learn from in one step: it reads each batch once."""

    def __init__(self, teacher: Model) -> None:
        self._teacher = teacher
        self._input_ids: Tensor | None = None
        self._answer: tuple[Any, ...] = ()

    def __call__(self, input_ids: Tensor, *, return_hidden: bool = False) -> Any:
        """Return the teacher's answer; it is computed once for each tensor of token ids."""
        if input_ids is not self._input_ids:
            self._answer = _answer_of(self._teacher, input_ids, with_hidden=return_hidden)
            self._input_ids = input_ids
        return self._answer if return_hidden else self._answer[0]


def distillation_loss(
    student: Model,
    teacher: Model | None,
    batch: Batch | Tensor,
    *,
    config: DistillationConfig | None = None,
    step: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute `cross_entropy + kl_weight * KL(teacher || student) + hidden_weight * error`.

    The cross-entropy is over the targets that count, the other terms are over `batch.teacher_mask`.

    Args:
        student: called once.
        teacher: called without gradients, at the steps that need it; None if no step does.
        batch: a tensor, (batch, time) of token ids, is text.
        config: weights, temperature, divergence and window; None for the defaults.
        step: counted from 0.

    Returns:
        The loss, a scalar, and its unweighted parts at this step, detached: `cross_entropy`, `kl`
        and `hidden`.

    Raises:
        ValueError: the teacher is None.
    """
    batch = Batch.of_text(batch) if isinstance(batch, Tensor) else batch
    config = config or DistillationConfig()
    loss_of = student_loss(teacher, batch, config=config, step=step)
    return loss_of(*_answer_of(student, batch.input_ids, with_hidden=config.needs_hidden(step)))


def student_loss(
    teacher: Model | None, batch: Batch, *, config: DistillationConfig, step: int = 0
) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """Run the teacher; return `distillation_loss` as a function of what the student computes.

    It takes the student's logits (and its hidden states, where the config `needs_hidden`), so it
    may be a decoder's `loss_fn`. Arguments and errors are those of `distillation_loss`.
    """
    answer: tuple[Any, ...] = ()
    if config.uses_teacher(step):
        if teacher is None:
            raise ValueError(
                f"step {step} needs a teacher, got None; set kl_weight and hidden_weight 0"
            )
        if isinstance(teacher, nn.Module):
            teacher.eval()
        with torch.no_grad():
            answer = _answer_of(teacher, batch.input_ids, with_hidden=config.needs_hidden(step))

    def of_logits(part: Tensor, span: Batch, rows: slice) -> tuple[Tensor, ...]:
        if not answer or config.kl_weight == 0:
            entropy = batch_cross_entropy(part, span)
            return entropy, entropy
        # The divergence comes first, and frees the teacher's logits before the cross-entropy keeps
        # a tensor of their size.
        divergence = kl_divergence(
            logits_at(answer[0], rows),
            part,
            temperature=config.temperature,
            kind=config.divergence,
            mask=span.teacher_mask,
            count=span.position_count,
        )
        entropy = batch_cross_entropy(part, span)
        return config.kl_weight * divergence + entropy, entropy, divergence

    def loss_of(logits: Logits, hidden: Sequence[Tensor] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        loss, *details = loss_by_chunks(logits, batch, of_logits)
        parts = dict(zip(("cross_entropy", "kl"), details, strict=False))
        if config.needs_hidden(step):
            error = hidden_state_error(
                answer[1], hidden, mask=batch.teacher_mask, count=batch.position_count
            )
            loss = loss + config.hidden_weight * error
            parts["hidden"] = error.detach()
        return loss, parts

    return loss_of


class AnswerKeeper:
    """A model that keeps what it predicted in its latest call, for `elastic_loss`.

    Called as the model is, with a `loss_fn`.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.answer: Logits | None = None
        """Detached: logits, or the hidden states that they follow from."""

    def __call__(self, *inputs: Any, loss_fn: Callable[..., Any], **options: Any) -> Any:
        """Call the model; its answer is kept within its forward pass."""

        def keep_then_score(logits: Logits, *hidden_states: Any) -> Any:
            self.answer = logits.detach()
            return loss_fn(logits, *hidden_states)

        return self._model(*inputs, loss_fn=keep_then_score, **options)


def elastic_loss(
    answer: Logits, batch: Batch, config: DistillationConfig
) -> Callable[[Logits], tuple[Tensor, dict[str, Tensor]]]:
    """Return `cross_entropy + kl_weight * KL(answer || member)` as a decoder's `loss_fn`.

    `answer` is the full schedule's for this batch, from an `AnswerKeeper`.
    """

    def loss_of(logits: Logits) -> tuple[Tensor, dict[str, Tensor]]:
        fixed = answer
        if isinstance(answer, LazyLogits) and isinstance(logits, LazyLogits):
            # The weights are those of this step. A sharded model may have moved them meanwhile.
            fixed = LazyLogits(answer.hidden, logits.weight).detach()
        return student_loss(lambda _: fixed, batch, config=config)(logits)

    return loss_of


def _answer_of(model: Model, input_ids: Tensor, *, with_hidden: bool) -> tuple[Any, ...]:
    """Return a model's logits, and its hidden states if wanted."""
    options: dict[str, Any] = {"return_hidden": True} if with_hidden else {}
    if isinstance(model, Decoder):
        options["loss_fn"] = lambda *answer: answer
    answer: Any = model(input_ids, **options)
    return answer if isinstance(answer, tuple) else (answer,)
