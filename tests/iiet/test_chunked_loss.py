"""Losses from hidden states in chunks equal those of whole logits, which never exist."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from live_tensors import LargestTensor
from refusals import refused
from torch import Tensor, nn

from iiet import Decoder, next_token_loss, plain_formulas, preset
from iiet.iiad.distillation import distillation_loss, frozen_teacher
from iiet.model.batch import NO_TARGET, Batch
from iiet.model.config import DistillationConfig
from iiet.model.losses import LazyLogits, batch_cross_entropy, cross_entropy
from orchestrator.training.objective import make_objective, validation_metrics
from orchestrator.training.world import World

VOCAB = 101
SEQUENCES = 3
TIME = 12
ELEMENTS = SEQUENCES * TIME * VOCAB


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Cut 36 positions into chunks of 8, the last one smaller."""
    monkeypatch.setattr("iiet.model.losses.CHUNK_ELEMENTS", 8 * VOCAB)


def fresh_decoder(*, tied: bool = True) -> Decoder:
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24, "vocab_size": VOCAB}
    config = preset("tiny", schedule="1,0", tie_embeddings=tied, initializer_std=0.3, **sizes)
    return Decoder(config).double()


def some_teacher(decoder: Decoder) -> Decoder:
    teacher = frozen_teacher(decoder)
    for parameter in teacher.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher


def some_batch(kind: str) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (SEQUENCES, TIME), generator=generator)
    mask = torch.rand(SEQUENCES, TIME, generator=generator) < 0.4
    if kind == "text":
        return Batch.of_text(ids)
    if kind == "masked text":
        return Batch.of_text(ids, mask).counted_as(11.0, 17.0)
    if kind == "few targets":
        return Batch(ids, ids.flip(1).masked_fill(mask, NO_TARGET))
    return Batch(ids, ids, torch.zeros_like(mask))


def value_and_gradients(decoder: Decoder, loss: Tensor, scale: float = 3.0) -> list[Tensor]:
    decoder.zero_grad()
    (scale * loss).backward()
    return [loss.detach(), *(p.grad for p in decoder.parameters() if p.grad is not None)]


def with_whole_logits(decoder: nn.Module) -> Callable[..., Any]:
    """Hide that a model is a decoder, so that its logits are computed before the loss."""
    return lambda *arguments, **options: decoder(*arguments, **options)


KINDS = ("text", "masked text", "few targets", "nothing")
LOSSES: dict[str, dict[str, Any]] = {
    "cross-entropy": {"kl_weight": 0.0},
    "forward": {"kl_weight": 0.7, "temperature": 2.0},
    "reverse": {"divergence": "reverse"},
    "hidden": {"kl_weight": 0.7, "hidden_weight": 0.3},
    "hidden alone": {"kl_weight": 0.0, "hidden_weight": 0.3},
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("kind", "loss", "tied"),
    [
        (kind, loss, number % 2 == 0)
        for number, (kind, loss) in enumerate(itertools.product(KINDS, LOSSES))
    ],
)
def test_values_and_gradients_equal_those_of_whole_logits(kind, loss, tied):
    decoder = fresh_decoder(tied=tied)
    batch = some_batch(kind)
    config = LOSSES[loss]
    teacher = some_teacher(decoder)
    results = []
    pairs = [(decoder, teacher), (with_whole_logits(decoder), with_whole_logits(teacher))]
    for student, guide in pairs:
        total, parts = distillation_loss(student, guide, batch, config=DistillationConfig(**config))
        results.append([*value_and_gradients(decoder, total), *parts.values()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-14)


def test_logits_of_one_chunk_give_bitwise_the_same():
    decoder = fresh_decoder().float()
    batch = some_batch("text")
    teacher = some_teacher(decoder)
    results = []
    pairs = [(decoder, teacher), (with_whole_logits(decoder), with_whole_logits(teacher))]
    for student, guide in pairs:
        loss, _ = distillation_loss(student, guide, batch, config=DistillationConfig())
        results.append(value_and_gradients(decoder, loss, scale=0.25))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_no_tensor_of_a_training_step_is_as_large_as_the_logits(loss):
    decoder = fresh_decoder()
    batch = some_batch("masked text")
    schedule = decoder.schedule
    config = DistillationConfig(**LOSSES[loss]) if loss else None
    objective = make_objective(lambda _: schedule, some_teacher(decoder) if loss else None, config)
    with LargestTensor() as largest:
        objective(decoder, batch, 0)[0].backward()
        validation_metrics(decoder, [batch], schedule, precision="fp32", world=World())
    assert largest.num_values < ELEMENTS / 2


def adapted(decoder: Decoder) -> None:
    adapter = nn.Sequential(decoder.lm_head, nn.Linear(VOCAB, VOCAB, dtype=torch.float64))
    decoder.lm_head = adapter


def hooked(decoder: Decoder) -> None:
    decoder.lm_head.register_forward_hook(lambda *_: None)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("change", [adapted, hooked, nn.Module.half])
def test_a_head_that_must_be_called_gets_whole_logits(change):
    decoder = fresh_decoder(tied=False)
    batch = some_batch("text")
    assert isinstance(decoder(batch.input_ids, loss_fn=lambda logits: logits), LazyLogits)
    change(decoder)
    assert isinstance(decoder(batch.input_ids, loss_fn=lambda logits: logits), Tensor)
    chunked = decoder(batch.input_ids, loss_fn=partial(batch_cross_entropy, batch=batch))
    assert torch.equal(chunked, batch_cross_entropy(decoder(batch.input_ids), batch))


@pytest.mark.usefixtures("small_chunks")
def test_second_derivatives_exist_with_plain_formulas():
    decoder = fresh_decoder()
    ids = some_batch("text").input_ids
    weights = list(decoder.parameters())
    with plain_formulas():
        loss = decoder(ids, loss_fn=partial(next_token_loss, input_ids=ids))
        slopes = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        sum(slope.square().sum() for slope in slopes if slope is not None).backward()
    assert decoder.model.embed_tokens.weight.grad is not None
    loss = decoder(ids, loss_fn=partial(next_token_loss, input_ids=ids))
    with pytest.raises(RuntimeError, match="plain_formulas"):
        torch.autograd.grad(loss, decoder.model.norm.weight, create_graph=True)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("frozen", ["embedding", "all but the head"])
def test_frozen_weights_get_no_gradient(frozen):
    decoder = fresh_decoder(tied=False)
    batch = some_batch("text")
    is_trained = {"embedding": decoder.model.layers, "all but the head": decoder.lm_head}[frozen]
    decoder.requires_grad_(False)
    is_trained.requires_grad_()
    expected = value_and_gradients(decoder, batch_cross_entropy(decoder(batch.input_ids), batch))
    loss = decoder(batch.input_ids, loss_fn=partial(batch_cross_entropy, batch=batch))
    torch.testing.assert_close(value_and_gradients(decoder, loss), expected)


@pytest.fixture(params=[8 * VOCAB, 1 << 25], ids=["chunks", "whole"])
def chunk_elements(request, monkeypatch) -> None:
    monkeypatch.setattr("iiet.model.losses.CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunk_elements")
def test_gradients_in_bf16_are_summed_as_exactly_as_those_of_whole_logits():
    exact = fresh_decoder(tied=False)
    batch = some_batch("text")
    decoder = copy.deepcopy(exact).float()
    expected = value_and_gradients(exact, batch_cross_entropy(exact(batch.input_ids), batch))

    def error(loss_fn: Callable[..., Any] | None) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer = decoder(batch.input_ids, loss_fn=loss_fn)
            loss = answer if loss_fn else batch_cross_entropy(answer, batch)
        values = value_and_gradients(decoder, loss)
        assert loss.dtype == values[-1].dtype == torch.float32
        return float((values[-1] - expected[-1]).norm() / expected[-1].norm())

    assert error(partial(batch_cross_entropy, batch=batch)) < 1.1 * error(None) < 0.05


def test_a_batch_of_another_shape_is_refused():
    decoder = fresh_decoder()
    batch = some_batch("text")
    transposed = Batch.of_text(batch.input_ids.T)
    with refused(ValueError, "batch", "(12, 3)"):
        decoder(batch.input_ids, loss_fn=partial(batch_cross_entropy, batch=transposed))


@torch.no_grad()
def test_the_loss_of_padded_text_is_that_of_its_tokens():
    """Padding is on the left; its last position predicts no token."""
    decoder = fresh_decoder()
    ids = some_batch("text").input_ids
    num_padding = torch.tensor([0, 4, ids.size(1) - 1])
    mask = torch.arange(ids.size(1)) >= num_padding[:, None]
    rows = [row[padding:][None] for row, padding in zip(ids, num_padding, strict=True)]
    counts = [row.size(1) - 1 for row in rows]
    expected = sum(n * decoder.loss(row) for n, row in zip(counts, rows, strict=True)) / sum(counts)
    torch.testing.assert_close(decoder.loss(ids, attention_mask=mask.long()), expected)


@torch.no_grad()
def test_the_loss_of_targets_counts_where_there_are_any_and_no_padding():
    decoder = fresh_decoder()
    ids = some_batch("text").input_ids
    targets = ids.flip(1)
    targets[:, :3] = NO_TARGET
    expected = cross_entropy(decoder(ids), targets)
    torch.testing.assert_close(decoder.loss(ids, targets), expected)
    mask = torch.ones_like(ids)
    mask[:, -4:] = 0
    expected = cross_entropy(decoder(ids)[:, :-4], targets[:, :-4])
    torch.testing.assert_close(decoder.loss(ids, targets, mask), expected)
    assert decoder.loss(ids, schedule=0) != decoder.loss(ids)
