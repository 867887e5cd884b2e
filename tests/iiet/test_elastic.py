"""A cheaper schedule learns from what the full one predicted in the same step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from iiet.decoder import Decoder
from iiet.iiad.distillation import AnswerKeeper, distillation_loss, elastic_loss
from iiet.model import losses
from iiet.model.batch import Batch
from iiet.model.config import DistillationConfig, ModelConfig
from iiet.model.fast import plain_formulas
from iiet.model.losses import batch_cross_entropy
from iiet.model.schedule import IterationSchedule


@pytest.fixture
def decoder(tiny_model) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig.from_dict({**tiny_model, "schedule": [2, 1]})).double()


@pytest.fixture
def batch(decoder) -> Batch:
    return Batch.of_text(torch.randint(decoder.config.vocab_size, (3, 12)))


def member_gradients(
    decoder: Decoder, batch: Batch, schedule: tuple[int, ...], **loss: float
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    keeper = AnswerKeeper(decoder)
    keeper(batch.input_ids, loss_fn=partial(batch_cross_entropy, batch=batch))
    loss_fn = elastic_loss(keeper.answer, batch, DistillationConfig(**loss))
    value, parts = decoder(batch.input_ids, schedule=IterationSchedule(schedule), loss_fn=loss_fn)
    return parts, list(torch.autograd.grad(value, list(decoder.parameters()), allow_unused=True))


def test_the_full_schedule_teaches_itself_nothing(decoder, batch):
    parts, gradients = member_gradients(decoder, batch, (2, 1), kl_weight=5.0)
    assert parts["kl"] == 0
    loss = decoder(batch.input_ids, loss_fn=partial(batch_cross_entropy, batch=batch))
    expected = torch.autograd.grad(loss, list(decoder.parameters()))
    torch.testing.assert_close(gradients, list(expected), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("chunk", [losses.CHUNK_ELEMENTS, 64])
def test_a_member_learns_as_from_a_frozen_copy(decoder, batch, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
    parts, gradients = member_gradients(decoder, batch, (0, 1), kl_weight=0.7, temperature=2.0)

    def teacher(input_ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = decoder(input_ids)
        return logits

    config = DistillationConfig(kl_weight=0.7, temperature=2.0)
    student = decoder.with_schedule(IterationSchedule((0, 1)))
    loss, expected_parts = distillation_loss(student, teacher, batch, config=config)
    assert parts["kl"] == pytest.approx(expected_parts["kl"].item(), rel=1e-9)
    expected = torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True)
    torch.testing.assert_close(gradients, list(expected), rtol=1e-8, atol=1e-13)


def test_whole_logits_are_kept_where_there_are_no_hidden_states(decoder, batch):
    parts, gradients = member_gradients(decoder, batch, (0, 0))
    with plain_formulas():
        plain_parts, expected = member_gradients(decoder, batch, (0, 0))
    assert parts["kl"] == pytest.approx(plain_parts["kl"].item(), rel=1e-9)
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-13)
