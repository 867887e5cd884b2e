"""Batches with masked positions: training, validation and teacher cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bare_trainer import BareTrainer

from iiet.batch import NO_TARGET, Batch
from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig, distillation_loss, frozen_teacher
from iiet.losses import cross_entropy
from iiet.schedule import IterationSchedule
from orchestrator.settings import TrainingSettings
from orchestrator.training.devices import World
from orchestrator.training.objective import Objective, make_objective, validation_metrics
from orchestrator.training.teacher_cache import CachePlan, open_cache, write_cache
from orchestrator.workspace.journal import VALIDATION_METRIC

SCHEDULE = IterationSchedule((2, 1))
NUM_STEPS, NUM_ROWS, LENGTH = 4, 6, 12


def fresh_decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=32, dim=16, num_layers=2, num_heads=2, num_kv_heads=2, ffn_dim=24,
        context_length=LENGTH, schedule=SCHEDULE, initializer_std=0.2,
    )  # fmt: skip
    return Decoder(config).double()


def tokens_of(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 32, (NUM_ROWS, LENGTH), generator=generator)


def completions(step: int) -> Batch:
    """Text of which row n counts from token 2n on, so that in the last one nothing does."""
    start = 2 * torch.arange(1, NUM_ROWS + 1)[:, None]
    return Batch.of_text(tokens_of(step), torch.arange(LENGTH) >= start)


def answers(step: int) -> Batch:
    """A task: the first token again, at the end of every other row, and twice in the first."""
    tokens = tokens_of(step)
    targets = torch.full_like(tokens, NO_TARGET)
    targets[::2, -1] = tokens[::2, 0]
    targets[0, -2] = tokens[0, 1]
    return Batch(tokens, targets)


def nothing(step: int) -> Batch:
    return Batch(tokens_of(step), torch.full((NUM_ROWS, LENGTH), NO_TARGET))


Source = Callable[[int], Batch]


def trained(
    source: Source, objective: Objective, *, per_pass: int | None
) -> tuple[Decoder, list[Mapping[str, float]]]:
    """Train a fresh decoder on a source, and return it with what the loop reported."""
    decoder = fresh_decoder()
    recipe = TrainingSettings(
        num_steps=NUM_STEPS, learning_rate=0.1, warmup_steps=0, num_sequences_per_pass=per_pass
    )
    trainer = BareTrainer(decoder, objective, recipe, batch=source)
    assert trainer.train()
    return decoder, [numbers for numbers in trainer.reported if "train/loss" in numbers]


@pytest.mark.parametrize("source", [completions, answers])
@pytest.mark.parametrize("distills", [False, True])
def test_passes_of_any_size_equal_one_pass(source: Source, distills: bool) -> None:
    objective = make_objective(lambda _: SCHEDULE)
    if distills:
        objective = make_objective(
            lambda _: SCHEDULE,
            frozen_teacher(fresh_decoder(seed=1)),
            DistillationConfig(hidden_weight=0.5),
        )
    whole, numbers = trained(source, objective, per_pass=None)
    for per_pass in (4, 1):
        cut, numbers_of_passes = trained(source, objective, per_pass=per_pass)
        assert len(numbers) == NUM_STEPS
        for found, expected in zip(numbers_of_passes, numbers, strict=True):
            assert found == pytest.approx(expected, rel=1e-9)
        for found, expected in zip(cut.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_the_loss_counts_unmasked_targets_only() -> None:
    _, numbers = trained(answers, make_objective(lambda _: SCHEDULE), per_pass=4)
    batch, terms = answers(0), []
    log_p = fresh_decoder()(batch.input_ids).log_softmax(-1)
    for row, column in (batch.targets != NO_TARGET).nonzero().tolist():
        terms.append(-log_p[row, column, batch.targets[row, column]].item())
    assert len(terms) == 4
    assert numbers[0]["train/loss"] == pytest.approx(sum(terms) / 4, rel=1e-12)


def test_a_step_without_targets_changes_nothing() -> None:
    teacher = frozen_teacher(fresh_decoder(seed=1))
    objective = make_objective(lambda _: SCHEDULE, teacher, DistillationConfig())
    decoder, numbers = trained(nothing, objective, per_pass=4)
    assert [n["train/loss"] for n in numbers] == [0.0] * NUM_STEPS
    assert [n["train/gradient_norm"] for n in numbers] == [0.0] * NUM_STEPS
    for found, expected in zip(decoder.parameters(), fresh_decoder().parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("source", [completions, answers])
def test_validation_weighs_batches_by_their_targets(source: Source) -> None:
    decoder, batches = fresh_decoder(), [*source(0).split(4), nothing(0), *source(1).split(5)]
    found = validation_metrics(decoder, batches, SCHEDULE, precision="fp32", world=World())
    both = [source(0), source(1)]
    logits, targets = (
        torch.cat(values)
        for values in ([decoder(b.input_ids) for b in both], [b.targets for b in both])
    )
    masks = [b.targets != NO_TARGET if b.mask is None else b.mask for b in both]
    expected = cross_entropy(logits, targets, mask=torch.cat(masks)).item()
    assert found[VALIDATION_METRIC] == pytest.approx(expected, rel=1e-12)
    right = (logits.argmax(-1) == targets)[torch.cat(masks).bool()].double().mean().item()
    assert found.get("validation/accuracy") == (
        None if batches[0].is_text else pytest.approx(right)
    )
    empty = validation_metrics(decoder, [nothing(0)], SCHEDULE, precision="fp32", world=World())
    assert empty.keys() == {VALIDATION_METRIC}
    assert math.isnan(empty[VALIDATION_METRIC])


def of_two_sources(step: int) -> Batch:
    """Six sequences of text and two of answers, in one batch."""
    text, task = completions(step), answers(step)
    sources = torch.cat([torch.zeros_like(text.input_ids), torch.ones_like(task.input_ids)])
    return Batch(
        torch.cat([text.input_ids, task.input_ids]),
        torch.cat([text.targets.masked_fill(~text.counted, NO_TARGET), task.targets]),
        sources=sources,
    )


@pytest.mark.parametrize("per_pass", [None, 3])
def test_losses_by_source_are_those_of_each_source_and_weigh_up_to_the_total(
    per_pass: int | None,
) -> None:
    names = ("files", "phop_2")
    objective = make_objective(lambda _: SCHEDULE, source_names=names)
    decoder, numbers = trained(of_two_sources, objective, per_pass=per_pass)
    plain, plain_numbers = trained(
        of_two_sources, make_objective(lambda _: SCHEDULE), per_pass=per_pass
    )
    batch, first = of_two_sources(0), numbers[0]
    logits = fresh_decoder()(batch.input_ids)
    total = 0.0
    for number, name in enumerate(names):
        chosen = (batch.sources == number) & batch.counted
        expected = cross_entropy(logits, batch.targets, mask=chosen).item()
        assert first[f"train/loss_{name}"] == pytest.approx(expected, rel=1e-9)
        total += expected * chosen.sum().item()
    assert first["train/loss"] == pytest.approx(total / batch.num_targets, rel=1e-9)
    assert set(first) - set(plain_numbers[0]) == {f"train/loss_{name}" for name in names}
    for found, expected in zip(decoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_validation_by_source_weighs_up_to_the_total() -> None:
    decoder, names = fresh_decoder(), ("files", "phop_2", "chain_2")
    batches = [
        replace(batch, sources=torch.full_like(batch.input_ids, number))
        for number, source in enumerate((completions, answers))
        for batch in source(0).split(3)
    ]
    options: dict[str, Any] = {"precision": "fp32", "world": World()}
    found = validation_metrics(decoder, batches, SCHEDULE, **options, source_names=names)
    alone = {
        name: validation_metrics(decoder, [source(0)], SCHEDULE, **options)
        for name, source in zip(names, (completions, answers), strict=False)
    }
    expected = {
        f"{metric}_{name}": value for name, own in alone.items() for metric, value in own.items()
    }
    weights = [completions(0).num_targets, answers(0).num_targets]
    losses = [own[VALIDATION_METRIC] for own in alone.values()]
    expected[VALIDATION_METRIC] = float(np.average(losses, weights=weights))
    expected["validation/accuracy"] = alone["phop_2"]["validation/accuracy"]
    assert found == pytest.approx(expected, rel=1e-12)
    assert "validation/accuracy_phop_2" in found


def test_a_teacher_cache_serves_every_mask_and_masked_outputs_do_not_matter(
    tmp_path: Path,
) -> None:
    teacher, student = frozen_teacher(fresh_decoder(seed=1)).float(), fresh_decoder().float()
    plan = CachePlan(
        origin={"test": "masks"},
        num_steps=1,
        num_sequences=NUM_ROWS,
        context_length=LENGTH,
        vocab_size=32,
    )
    tokens = tokens_of(0)
    cache = open_cache(
        write_cache(plan, tmp_path, lambda _: (tokens, teacher(tokens).detach())), plan
    )
    assert cache
    config = DistillationConfig()
    for batch in (completions(0), answers(0), Batch.of_text(tokens)):
        live, _ = distillation_loss(student, teacher, batch, config=config)
        read, _ = distillation_loss(student, cache, batch, config=config)
        assert read.item() == live.item()
        if batch.taught is not None:
            spoiled = cache(tokens).masked_fill(~batch.taught.unsqueeze(-1), math.nan)
            loss, _ = distillation_loss(student, lambda _, s=spoiled: s, batch, config=config)
            assert loss.item() == live.item()
