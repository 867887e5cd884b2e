"""Losses, their gradients and validation are those of plain formulas: masks, sources, elastic."""

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
from refusals import refused
from torch.nn import functional as F

from iiet.cost import training_flops_per_token
from iiet.decoder import Decoder
from iiet.freezing import freeze, trained_part
from iiet.iiad.distillation import RememberingTeacher, distillation_loss, frozen_teacher
from iiet.model.batch import NO_TARGET, Batch
from iiet.model.config import DistillationConfig, ModelConfig
from iiet.model.facts import facts_of
from iiet.model.fast import plain_formulas
from iiet.model.losses import cross_entropy
from iiet.model.schedule import IterationSchedule
from orchestrator.models.folder import served_schedules
from orchestrator.settings import ElasticSettings, TrainingSettings, resolve_settings
from orchestrator.sweeping.models import ModelVariant, settings_of
from orchestrator.training.job import job_key, key_fields, pretraining_job
from orchestrator.training.objective import (
    Objective,
    losses_of,
    make_objective,
    make_optimizer,
    output_sizes,
    set_learning_rate,
    validation_metrics,
)
from orchestrator.training.schedules import drawn_by_step
from orchestrator.training.trainer import run_job
from orchestrator.training.world import World
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import VALIDATION_METRIC
from orchestrator.workspace.layout import PROVENANCE, Workspace

SCHEDULE = IterationSchedule((2, 1))
NUM_STEPS = 2
NUM_ROWS = 6
LENGTH = 12


def fresh_decoder(seed: int = 0, **changes: Any) -> Decoder:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2,
             "ffn_dim": 24, "context_length": LENGTH, "schedule": SCHEDULE,
             "initializer_std": 0.2}  # fmt: skip
    return Decoder(ModelConfig(**{**sizes, **changes})).double()


# The optimizer


@pytest.mark.parametrize("options", [{"start": "identity"}, {"learn_damping": "scalar"}])
def test_gates_alone_have_a_learning_rate_of_their_own(options):
    decoder = fresh_decoder(method_options=facts_of("iiet").Options(**options))
    optimizer = make_optimizer(decoder, TrainingSettings(gate_rate_factor=7.0))
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    fast = {name for name, p in decoder.named_parameters() if rates[id(p)] == 3.5}
    assert fast == {n for n in decoder.method_parameters() if n.endswith(("damping", "blend"))}
    assert {rates[id(p)] for name, p in decoder.named_parameters() if name not in fast} == {0.5}
    assert not any(decays[id(p)] for name, p in decoder.named_parameters() if name in fast)


@pytest.mark.parametrize("method", ["iiet", "pcformer", "vanilla"])
def test_muon_has_the_matrices_of_fields_and_adamw_all_else(method):
    schedule = SCHEDULE if method == "iiet" else None
    decoder = fresh_decoder(method=method, schedule=schedule, tie_embeddings=False).float()
    optimizer = make_optimizer(decoder, TrainingSettings(optimizer="muon", muon_rate_factor=3.0))
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter in decoder.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    parameters = dict(decoder.named_parameters())
    by_muon = {n for n, p in parameters.items() if "momentum_buffer" in optimizer.state[p]}
    assert by_muon == {name for name in parameters if name.endswith("_proj.weight")}
    assert {name for name, p in parameters.items() if rates[id(p)] == 1.5} == by_muon
    by_adamw = {name for name, p in parameters.items() if "exp_avg" in optimizer.state[p]}
    assert by_adamw == parameters.keys() - by_muon
    for name in by_muon:
        assert optimizer.state[parameters[name]].keys() == {"momentum_buffer"}


def test_muon_leaves_frozen_layers_alone():
    decoder = fresh_decoder(method_options=facts_of("iiet").Options(start="identity"))
    freeze(decoder.model, trained_part(SCHEDULE, "added"), decoder.lm_head)
    optimizer = make_optimizer(decoder, TrainingSettings(optimizer="muon"))
    assert isinstance(optimizer, torch.optim.AdamW)  # No matrix is trained.
    freeze(decoder.model, trained_part(SCHEDULE, (2,)), decoder.lm_head)
    optimizer = make_optimizer(decoder, TrainingSettings(optimizer="muon"))
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert updated == {id(p) for p in decoder.parameters() if p.requires_grad}


# Masked batches


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


def of_two_sources(step: int) -> Batch:
    """Six sequences of text and as many of answers, in one batch."""
    text = completions(step)
    task = answers(step)
    sources = torch.cat([torch.zeros_like(text.input_ids), torch.ones_like(task.input_ids)])
    return Batch(
        torch.cat([text.input_ids, task.input_ids]),
        torch.cat([text.targets.masked_fill(~text.counted, NO_TARGET), task.targets]),
        component_numbers=sources,
    )


Source = Callable[[int], Batch]


def trained(
    source: Source, objective: Objective, *, per_pass: int | None
) -> tuple[Decoder, list[Mapping[str, float]]]:
    """Train a fresh decoder on a source, and return it with what the loop reported."""
    recipe = TrainingSettings(
        num_steps=NUM_STEPS, learning_rate=0.1, warmup_steps=0, num_sequences_per_pass=per_pass
    )
    trainer = BareTrainer(fresh_decoder(), objective, recipe, batch=source)
    assert trainer.train()
    return trainer.decoder, [n for n in trainer.reported if "train/loss" in n]


@pytest.mark.parametrize("source", [completions, answers])
@pytest.mark.parametrize("distills", [False, True])
def test_passes_of_any_size_equal_one_pass(source, distills):
    teacher = frozen_teacher(fresh_decoder(seed=1)) if distills else None
    objective = make_objective(
        lambda _: SCHEDULE, teacher, DistillationConfig(hidden_weight=0.5 * distills)
    )
    expected_decoder, numbers = trained(source, objective, per_pass=None)
    assert len(numbers) == NUM_STEPS
    for per_pass in (4, 1):
        cut, numbers_of_passes = trained(source, objective, per_pass=per_pass)
        for actual_numbers, expected_numbers in zip(numbers_of_passes, numbers, strict=True):
            assert actual_numbers == pytest.approx(expected_numbers, rel=1e-9)
        pairs = zip(cut.parameters(), expected_decoder.parameters(), strict=True)
        for parameter, expected in pairs:
            torch.testing.assert_close(parameter, expected, rtol=1e-9, atol=1e-13)


def test_the_loss_counts_unmasked_targets_only_and_without_one_nothing_changes():
    _, numbers = trained(answers, make_objective(lambda _: SCHEDULE), per_pass=4)
    batch = answers(0)
    terms = []
    log_p = fresh_decoder()(batch.input_ids).log_softmax(-1)
    for row, column in (batch.targets != NO_TARGET).nonzero().tolist():
        terms.append(-log_p[row, column, batch.targets[row, column]].item())
    assert len(terms) == 4
    assert numbers[0]["train/loss"] == pytest.approx(sum(terms) / 4, rel=1e-12)

    teacher = frozen_teacher(fresh_decoder(seed=1))
    objective = make_objective(lambda _: SCHEDULE, teacher, DistillationConfig())
    decoder, numbers = trained(nothing, objective, per_pass=4)
    assert [n["train/loss"] for n in numbers] == [0.0] * NUM_STEPS
    assert [n["train/gradient_norm"] for n in numbers] == [0.0] * NUM_STEPS
    for parameter, expected in zip(decoder.parameters(), fresh_decoder().parameters(), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("source", [completions, answers])
def test_validation_weighs_batches_by_their_targets(source):
    decoder = fresh_decoder()
    batches = [*source(0).split(4), nothing(0), *source(1).split(5)]
    metrics = validation_metrics(decoder, batches, SCHEDULE, precision="fp32", world=World())
    unsplit = [source(0), source(1)]
    logits = torch.cat([decoder(b.input_ids) for b in unsplit])
    targets = torch.cat([b.targets for b in unsplit])
    counted = torch.cat([b.counted for b in unsplit])
    expected = cross_entropy(logits, targets, mask=counted).item()
    assert metrics[VALIDATION_METRIC] == pytest.approx(expected, rel=1e-12)
    right = (logits.argmax(-1) == targets)[counted].double().mean().item()
    accuracy = None if batches[0].is_text else pytest.approx(right)
    assert metrics.get("validation/accuracy") == accuracy
    empty = validation_metrics(decoder, [nothing(0)], SCHEDULE, precision="fp32", world=World())
    assert empty.keys() == {VALIDATION_METRIC}
    assert math.isnan(empty[VALIDATION_METRIC])


def test_losses_by_source_are_those_of_each_source_and_weigh_up_to_the_total():
    names = ("files", "phop_2")
    objective = make_objective(lambda _: SCHEDULE, component_names=names)
    decoder, numbers = trained(of_two_sources, objective, per_pass=3)
    objective = make_objective(lambda _: SCHEDULE)
    plain, plain_numbers = trained(of_two_sources, objective, per_pass=3)
    batch = of_two_sources(0)
    first_numbers = numbers[0]
    logits = fresh_decoder()(batch.input_ids)
    total = 0.0
    for number, name in enumerate(names):
        chosen = (batch.component_numbers == number) & batch.counted
        expected = cross_entropy(logits, batch.targets, mask=chosen).item()
        assert first_numbers[f"train/loss_{name}"] == pytest.approx(expected, rel=1e-9)
        total += expected * chosen.sum().item()
    assert first_numbers["train/loss"] == pytest.approx(total / batch.num_targets, rel=1e-9)
    assert set(first_numbers) - set(plain_numbers[0]) == {f"train/loss_{name}" for name in names}
    for parameter, expected in zip(decoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-9, atol=1e-13)


def test_validation_by_source_weighs_up_to_the_total():
    decoder = fresh_decoder()
    names = ("files", "phop_2", "chain_2")
    batches = [
        replace(batch, component_numbers=torch.full_like(batch.input_ids, number))
        for number, source in enumerate((completions, answers))
        for batch in source(0).split(3)
    ]
    options: dict[str, Any] = {"precision": "fp32", "world": World()}
    metrics = validation_metrics(decoder, batches, SCHEDULE, **options, component_names=names)
    metrics_of_sources = {
        name: validation_metrics(decoder, [source(0)], SCHEDULE, **options)
        for name, source in zip(names, (completions, answers), strict=False)
    }
    expected = {
        f"{metric}_{name}": value
        for name, metrics_of_one in metrics_of_sources.items()
        for metric, value in metrics_of_one.items()
    }
    weights = [completions(0).num_targets, answers(0).num_targets]
    losses = [metrics_of_one[VALIDATION_METRIC] for metrics_of_one in metrics_of_sources.values()]
    expected[VALIDATION_METRIC] = float(np.average(losses, weights=weights))
    expected["validation/accuracy"] = metrics_of_sources["phop_2"]["validation/accuracy"]
    assert metrics == pytest.approx(expected, rel=1e-12)
    assert "validation/accuracy_phop_2" in metrics


@pytest.mark.parametrize("method", ["iiet", "pcformer", "looped", "vanilla"])
def test_the_sizes_of_outputs_are_those_of_the_largest_layer(method):
    decoder = fresh_decoder(method=method, schedule=1 if facts_of(method).has_corrections else None)
    batch = completions(0)
    sizes = output_sizes(
        decoder, batch.input_ids, decoder.schedule, precision="fp32", world=World()
    )
    outputs = decoder.evaluations(batch.input_ids)
    of_evaluation: dict[str, list[float]] = {}
    for (_, k), output in outputs.items():
        size = float(output.detach().norm()) / output.numel() ** 0.5
        of_evaluation.setdefault(f"validation/output_rms_{k}", []).append(size)
    assert sizes == pytest.approx({name: max(of) for name, of in of_evaluation.items()}, rel=1e-6)
    assert decoder.training


# Elastic training

FULL = IterationSchedule((2, 2))
NONE = IterationSchedule((0, 0))


@pytest.mark.parametrize(("num_drawn", "per_pass"), [(1, None), (2, 1)])
def test_the_gradients_are_those_of_the_sum_written_plainly(num_drawn, per_pass):
    decoder = fresh_decoder(schedule=FULL)
    tokens = torch.randint(decoder.config.vocab_size, (2, LENGTH))
    cheaper = [NONE, IterationSchedule((1, 1))][:num_drawn]
    elastic = ElasticSettings(weight=0.3, kl_weight=0.7, temperature=1.5)
    trainer = BareTrainer(
        decoder,
        make_objective(lambda _: FULL),
        TrainingSettings(num_sequences_per_pass=per_pass, clip_norm=1e9, elastic=elastic),
        cheaper=cheaper,
    )
    mask = torch.rand(2, LENGTH) > 0.3
    numbers = trainer.gradients(Batch.of_text(tokens, mask))
    gradients = [parameter.grad for parameter in decoder.parameters()]

    counted = mask[:, 1:]
    taught = torch.cat([mask[:, 1:], mask[:, -1:]], dim=1)
    with plain_formulas():
        logits = {s: decoder(tokens, schedule=s) for s in (FULL, *cheaper)}
    entropy = {
        schedule: F.cross_entropy(of[:, :-1][counted], tokens[:, 1:][counted])
        for schedule, of in logits.items()
    }
    log_p = {s: torch.log_softmax(of / 1.5, dim=-1)[taught] for s, of in logits.items()}
    full_log_p = log_p[FULL].detach()
    kl = {s: 1.5**2 * (full_log_p.exp() * (full_log_p - log_p[s])).sum(-1).mean() for s in cheaper}
    loss = entropy[FULL] + 0.3 * sum(entropy[s] + 0.7 * kl[s] for s in cheaper)
    expected = list(torch.autograd.grad(loss, list(decoder.parameters())))
    torch.testing.assert_close(gradients, expected, rtol=1e-7, atol=1e-12)
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert numbers["full_loss"] == pytest.approx(entropy[FULL].item(), rel=1e-9)
    means = [sum(of[s].item() for s in cheaper) / num_drawn for of in (entropy, kl)]
    assert [numbers["cheaper_loss"], numbers["cheaper_kl"]] == pytest.approx(means, rel=1e-9)


def test_a_step_that_draws_no_member_is_one_of_the_objective_alone():
    decoder = fresh_decoder()
    objective = make_objective(lambda _: SCHEDULE)
    loss, parts = objective(decoder, completions(0), 0)
    [alone] = losses_of(objective, decoder, completions(0), 0, elastic=ElasticSettings())
    assert torch.equal(alone[0], loss)
    assert alone[1].keys() == parts.keys()


@pytest.mark.parametrize("hidden_weight", [0.0, 0.4])
def test_with_a_teacher_each_schedule_learns_as_its_student_would(hidden_weight):
    decoder = fresh_decoder(schedule=FULL)
    teacher = frozen_teacher(decoder)
    teacher_calls = list[int]()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    teacher.register_forward_pre_hook(lambda *_: teacher_calls.append(1))
    cheaper = (NONE, IterationSchedule((1, 0)))
    config = DistillationConfig(kl_weight=0.7, temperature=1.5, hidden_weight=hidden_weight)
    remembering = RememberingTeacher(teacher)
    trainer = BareTrainer(
        decoder,
        make_objective(lambda _: FULL, remembering, config),
        TrainingSettings(
            clip_norm=1e9, num_sequences_per_pass=1, elastic=ElasticSettings(weight=0.3)
        ),
        cheaper=cheaper,
        teacher=remembering,
        distillation=config,
    )
    batch = Batch.of_text(torch.randint(decoder.config.vocab_size, (2, LENGTH)))
    numbers = trainer.gradients(batch)
    gradients = [parameter.grad for parameter in decoder.parameters()]
    assert len(teacher_calls) == 2  # Each part of the batch once, for three schedules.

    losses, parts = zip(
        *(
            distillation_loss(decoder.with_schedule(schedule), teacher, batch, config=config)
            for schedule in (FULL, *cheaper)
        ),
        strict=True,
    )
    loss = losses[0] + 0.3 * (losses[1] + losses[2])
    expected = list(torch.autograd.grad(loss, list(decoder.parameters())))
    torch.testing.assert_close(gradients, expected, rtol=1e-7, atol=1e-12)
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert numbers["full_loss"] == pytest.approx(losses[0].item(), rel=1e-9)
    names = {"cross_entropy": "cheaper_loss", "kl": "cheaper_kl", "hidden": "cheaper_hidden"}
    for name in parts[0]:
        mean = (parts[1][name] + parts[2][name]).item() / 2
        assert numbers[names[name]] == pytest.approx(mean, rel=1e-9)


ELASTIC: dict[str, Any] = {
    "num_steps": 8, "num_tokens_per_step": 32, "num_validation_tokens": 32,
    "iterate_from_fraction": 0.25, "checkpoint_every_steps": 3,
}  # fmt: skip


@pytest.mark.slow
def test_the_flops_of_an_elastic_run_are_planned(tiny_job, tmp_path):
    family = ElasticSettings(schedules=("2,0", "1,0", "0,0"), num_drawn=2)
    job = tiny_job("elastic", **ELASTIC, elastic=family)
    outcome = run_job(job)
    # The number of evaluations is that of the draws.
    drawn_at = drawn_by_step(job.model.corrections, job.recipe)
    full = job.model.corrections
    drawn_schedules = [schedule for step in range(8) for schedule in drawn_at(step)]
    assert len(drawn_schedules) == 6 * 2
    trained_schedules = [NONE] * 2 + [full] * 6 + drawn_schedules
    flops = sum(training_flops_per_token(job.model, schedule) for schedule in trained_schedules)
    # Each member computes the full schedule's logits again.
    flops += len(drawn_schedules) * 2 * job.model.dim * job.model.vocab_size
    assert outcome.training_flops == pytest.approx(32 * flops)
    # The weights are saved once, and say whom they serve.
    served = [(2, 1), (2, 0), (1, 0), (0, 0)]
    checkpoint = Path(str(outcome.checkpoint))
    assert [s.corrections for s in served_schedules(checkpoint)] == served
    record = checkpoint / PROVENANCE
    record.write_text(record.read_text().replace('"1,0"', '"1,y"'))
    with refused(UserError, "provenance.json"):
        served_schedules(checkpoint)

    plain = tiny_job("plain", **ELASTIC)
    weightless = tiny_job("weightless", **ELASTIC, elastic=ElasticSettings(weight=0))
    outcome_of_plain = run_job(plain)
    outcome_of_weightless = run_job(weightless)
    assert outcome_of_plain.validation_loss == outcome_of_weightless.validation_loss
    assert outcome_of_plain.validation_loss != outcome.validation_loss
    assert outcome_of_plain.training_flops == outcome_of_weightless.training_flops
    assert job_key(plain) != job_key(job)
    assert "elastic" not in key_fields(plain)["recipe"]

    lean = {"activation_checkpointing": True, "num_sequences_per_pass": 1}
    for name, changes, tolerance in (("bf16", {"precision": "bf16"}, 0.03), ("lean", lean, 1e-5)):
        rounded = run_job(tiny_job(name, **ELASTIC, **changes, elastic=family))
        assert rounded.validation_loss == pytest.approx(outcome.validation_loss, abs=tolerance)


def test_a_family_has_one_key_however_it_is_written_and_models_without_corrections_none(tmp_path):
    def key(schedules: str) -> str:
        changes = ["model.corrections=2", f"training.elastic.schedules={schedules}"]
        return pretraining_job(resolve_settings({}, changes), Workspace(tmp_path), None).run_folder

    assert key("[0, 1]") == key("['1*6', '0,0,0,0,0,0', 0]") != key("[0]")
    settings = resolve_settings({}, ["training.elastic.num_drawn=1"])
    for method, corrections, is_elastic in (
        ("vanilla", None, False), ("iiet", 0, False), ("iiet", 2, True), ("looped", "2", True),
    ):  # fmt: skip
        variant = ModelVariant(method=method, corrections=corrections)
        assert (settings_of(settings, variant).training.elastic is not None) == is_elastic
