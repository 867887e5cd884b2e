"""Elastic training: cheaper schedules are drawn in each step and trained beside the full one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_trainer import BareTrainer
from torch.nn import functional as F

from iiet.arithmetic import plain_formulas
from iiet.batch import Batch
from iiet.config import ModelConfig
from iiet.cost import training_flops_per_token
from iiet.decoder import Decoder
from iiet.distillation import (
    DistillationConfig,
    RememberingTeacher,
    distillation_loss,
    frozen_teacher,
)
from iiet.schedule import IterationSchedule
from orchestrator.models.folder import served_schedules
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ElasticSettings, Settings, TrainingSettings, resolve_settings
from orchestrator.sweeping.models import ModelVariant, settings_of
from orchestrator.training.job import job_key, key_fields, pretraining_job
from orchestrator.training.objective import (
    Passes,
    elastic_passes,
    make_objective,
    mean_by_source,
    single_pass,
)
from orchestrator.training.schedules import drawn_by_step
from orchestrator.training.shared_steps import first_stage_of
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import Workspace

RECIPE: dict[str, Any] = {
    "num_steps": 8,
    "num_tokens_per_step": 32,
    "num_validation_tokens": 32,
    "iterate_from_fraction": 0.25,
    "elastic": ElasticSettings(num_drawn=2),
}
NESTED = ("3,1", "3,0", "1,0", "0,0")


def drawn(
    *corrections: int, elastic: ElasticSettings | None = None, **recipe: Any
) -> list[tuple[tuple[int, ...], ...]]:
    """Return what is drawn in each step."""
    elastic = elastic or ElasticSettings(num_drawn=2)
    settings = TrainingSettings(**{**RECIPE, "num_steps": 400, "elastic": elastic, **recipe})
    drawn_at = drawn_by_step(IterationSchedule(corrections), settings)
    return [tuple(one.corrections for one in drawn_at(step)) for step in range(400)]


def test_members_are_drawn_from_seed_and_step_alone() -> None:
    family = ElasticSettings(schedules=NESTED, num_drawn=2)
    found = drawn(3, 3, elastic=family)
    assert found[:100] == [()] * 100  # The first stage has no corrections.
    assert all(len(set(step)) == 2 for step in found[100:])
    assert found == drawn(3, 3, elastic=family)
    assert found != drawn(3, 3, elastic=family, seed=1)
    # A step draws the same in a longer training, and more draws leave the first ones alone.
    longer = drawn(3, 3, elastic=family, num_steps=800, iterate_from_fraction=0.125)
    assert longer == found
    three = ElasticSettings(schedules=NESTED, num_drawn=3)
    assert [one[:2] for one in drawn(3, 3, elastic=three)] == found
    # Neither does the order in which the family is written matter.
    backwards = ElasticSettings(schedules=NESTED[::-1], num_drawn=2)
    assert drawn(3, 3, elastic=backwards) == found


def test_members_are_drawn_in_proportion_to_what_they_leave_out() -> None:
    family = ElasticSettings(schedules=NESTED, num_drawn=1)
    recipe = TrainingSettings(num_steps=8000, iterate_from_fraction=0.0, elastic=family)
    drawn_at = drawn_by_step(IterationSchedule((3, 3)), recipe)
    counts = Counter(member.corrections for step in range(8000) for member in drawn_at(step))
    # The four leave out 2, 3, 5 and 6 of 6 corrections; 8,000 draws vary by up to 45.
    expected = {(3, 1): 1000, (3, 0): 1500, (1, 0): 2500, (0, 0): 3000}
    assert counts == {member: pytest.approx(count, abs=180) for member, count in expected.items()}


def test_without_a_family_all_layers_get_the_same_largest_number() -> None:
    of_step = drawn(3, 1)[100:]
    assert {one for step in of_step for one in step} == {(0, 0), (1, 1), (2, 1)}
    few = drawn(1, 1, elastic=ElasticSettings(num_drawn=5))
    assert few[100:] == [((0, 0),)] * 300  # There are no others.


def test_members_stay_below_the_schedule_of_a_ramp() -> None:
    family = ElasticSettings(schedules=NESTED, num_drawn=9)
    found = drawn(3, 3, elastic=family, iterate_from_fraction=0, iterate_ramp_fraction=0.75)
    assert {frozenset(step) for step in found[:100]} == {frozenset({(1, 0), (0, 0)})}
    assert {frozenset(step) for step in found[100:200]} == {
        frozenset({(2, 1), (2, 0), (1, 0), (0, 0)})
    }


def test_without_corrections_or_weight_nothing_is_drawn() -> None:
    no_weight = drawn(3, 1, elastic=ElasticSettings(weight=0))
    assert drawn(0, 0) == no_weight == [()] * 400


@pytest.mark.parametrize("num_drawn", [1, 2])
@pytest.mark.parametrize("per_pass", [None, 1])
def test_the_gradients_are_those_of_the_sum_written_plainly(
    tiny_model: dict[str, Any], per_pass: int | None, num_drawn: int
) -> None:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig.from_dict({**tiny_model, "schedule": [2, 2]})).double()
    tokens = torch.randint(decoder.config.vocab_size, (2, 16))
    cheaper = [IterationSchedule((0, 0)), IterationSchedule((1, 1))][:num_drawn]
    elastic = ElasticSettings(weight=0.3, kl_weight=0.7, temperature=1.5)
    trainer = BareTrainer(
        decoder,
        make_objective(lambda _: decoder.schedule),
        TrainingSettings(num_sequences_per_pass=per_pass, clip_norm=1e9),
        passes=elastic_passes(lambda _: tuple(cheaper), elastic),
    )
    mask = torch.rand(2, 16) > 0.3
    numbers = trainer.gradients(Batch.of_text(tokens, mask))
    found = [parameter.grad for parameter in decoder.parameters()]

    counted, taught = mask[:, 1:], torch.cat([mask[:, 1:], mask[:, -1:]], dim=1)
    with plain_formulas():
        logits = {s: decoder(tokens, schedule=s) for s in (decoder.schedule, *cheaper)}
    entropy = {
        schedule: F.cross_entropy(of[:, :-1][counted], tokens[:, 1:][counted])
        for schedule, of in logits.items()
    }
    soft = {s: torch.log_softmax(of / 1.5, dim=-1)[taught] for s, of in logits.items()}
    own = soft[decoder.schedule].detach()
    kl = {s: 1.5**2 * (own.exp() * (own - soft[s])).sum(-1).mean() for s in cheaper}
    loss = entropy[decoder.schedule] + 0.3 * sum(entropy[s] + 0.7 * kl[s] for s in cheaper)
    expected = list(torch.autograd.grad(loss, list(decoder.parameters())))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert numbers["full_loss"] == pytest.approx(entropy[decoder.schedule].item(), rel=1e-9)
    means = [sum(of[s].item() for s in cheaper) / num_drawn for of in (entropy, kl)]
    assert [numbers["member_loss"], numbers["member_kl"]] == pytest.approx(means, rel=1e-9)


@pytest.mark.parametrize("hidden_weight", [0.0, 0.4])
def test_with_a_teacher_each_schedule_learns_as_its_student_would(
    tiny_model: dict[str, Any], hidden_weight: float
) -> None:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig.from_dict({**tiny_model, "schedule": [2, 2]})).double()
    teacher = frozen_teacher(decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    num_read = 0

    def count(*_: Any) -> None:
        nonlocal num_read
        num_read += 1

    teacher.register_forward_pre_hook(count)
    cheaper = (IterationSchedule((0, 0)), IterationSchedule((1, 0)))
    config = DistillationConfig(kl_weight=0.7, temperature=1.5, hidden_weight=hidden_weight)
    remembering = RememberingTeacher(teacher)
    trainer = BareTrainer(
        decoder,
        make_objective(lambda _: decoder.schedule, remembering, config),
        TrainingSettings(clip_norm=1e9, num_sequences_per_pass=1),
        passes=elastic_passes(lambda _: cheaper, ElasticSettings(weight=0.3), remembering, config),
    )
    batch = Batch.of_text(torch.randint(decoder.config.vocab_size, (2, 16)))
    batch = batch.counted_as(batch.num_targets, batch.num_positions)
    numbers = trainer.gradients(batch)
    found = [parameter.grad for parameter in decoder.parameters()]
    assert num_read == 2  # Each part of the batch once, for three schedules.

    losses, parts = zip(
        *(
            distillation_loss(decoder.with_schedule(one), teacher, batch, config=config)
            for one in (decoder.schedule, *cheaper)
        ),
        strict=True,
    )
    loss = losses[0] + 0.3 * (losses[1] + losses[2])
    expected = list(torch.autograd.grad(loss, list(decoder.parameters())))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert numbers["full_loss"] == pytest.approx(losses[0].item(), rel=1e-9)
    names = {"cross_entropy": "member_loss", "kl": "member_kl", "hidden": "member_hidden"}
    for name in parts[0]:
        mean = (parts[1][name] + parts[2][name]).item() / 2
        assert numbers[names[name]] == pytest.approx(mean, rel=1e-9)


def test_without_a_divergence_members_learn_from_the_targets_alone(
    tiny_model: dict[str, Any],
) -> None:
    decoder = Decoder(ModelConfig.from_dict({**tiny_model, "schedule": [2, 2]}))
    cheaper = IterationSchedule((0, 1))
    passes = elastic_passes(lambda _: (cheaper,), ElasticSettings(weight=2.0, kl_weight=0.0))
    objective = make_objective(lambda _: decoder.schedule)
    batch = Batch.of_text(torch.randint(decoder.config.vocab_size, (2, 16)))
    (_, parts), (loss, member) = [each(decoder, batch, 0) for each in passes(objective, 0)]
    alone, _ = make_objective(lambda _: cheaper)(decoder, batch, 0)
    assert loss.item() == pytest.approx(2 * alone.item())
    assert (set(parts), set(member)) == ({"full_loss"}, {"member_loss"})
    assert elastic_passes(lambda _: (), ElasticSettings())(objective, 0) == (objective,)
    assert single_pass(objective, 0) == (objective,)


def test_a_resumed_run_equals_one_from_the_start_and_its_flops_are_planned(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    def job(name: str, **changes: Any) -> TrainingJob:
        return TrainingJob(
            run_folder=str(tmp_path / name),
            tokens_folder=str(tiny_tokens),
            model={**tiny_model, "schedule": [2, 2]},
            recipe=TrainingSettings(**{**RECIPE, **changes}),
        )

    family = {"elastic": ElasticSettings(schedules=("2,1", "1,0", "0,0"), num_drawn=2)}
    whole, split = job("whole", **family), job("split", **family)
    outcome = run_job(whole)
    steps = iter(range(99))
    assert not run_job(split, should_stop=lambda: next(steps) == 5).finished
    again = run_job(split)
    assert again.validation_loss == outcome.validation_loss
    assert again.training_flops == outcome.training_flops
    states = [Decoder.load(str(o.checkpoint)).state_dict() for o in (again, outcome)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    names = ("train/loss", "train/full_loss", "train/member_kl", "validation/cheapest_loss")
    curves = [
        {(name, r["step"]): r["values"][name] for r in read_journal(one.folder)[0]
         for name in names if name in r.get("values", {})}
        for one in (whole, split)
    ]  # fmt: skip
    assert curves[0] == curves[1]
    assert {name for name, _ in curves[0]} == set(names)
    # The number of evaluations is that of the draws.
    drawn_at = drawn_by_step(whole.model.corrections, whole.recipe)
    trained = [IterationSchedule.none(2)] * 2 + [whole.model.corrections] * 6
    drawn_ones = [schedule for step in range(8) for schedule in drawn_at(step)]
    assert len(drawn_ones) == 6 * 2
    flops = sum(training_flops_per_token(whole.model, one) for one in trained + drawn_ones)
    # Each member computes the full schedule's logits again.
    flops += len(drawn_ones) * 2 * whole.model.dim * whole.model.vocab_size
    flops *= 32
    assert outcome.training_flops == pytest.approx(flops)
    planned = Estimate(config=whole.model, recipe=whole.recipe)
    assert planned.flops == pytest.approx(flops)
    # The weights are saved once, and say whom they serve.
    served = [(2, 2), (2, 1), (1, 0), (0, 0)]
    assert [s.corrections for s in served_schedules(Path(str(outcome.checkpoint)))] == served

    plain = job("plain", elastic=None)
    assert job_key(plain) != job_key(whole)
    assert "elastic" not in key_fields(plain)["recipe"]
    # Nothing is drawn in the first stage, so both may share it.
    stages = [
        first_stage_of(one.model_copy(update={"first_stages": str(tmp_path)}))
        for one in (plain, whole)
    ]
    assert stages[0] == stages[1] is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"activation_checkpointing": True, "num_sequences_per_pass": 1},
        {"compile": False, "checkpoint_every_steps": 3},
    ],
    ids=str,
)
def test_memory_and_precision_change_rounding_alone(
    changes: dict[str, Any], tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    def loss(name: str, **more: Any) -> float:
        job = TrainingJob(
            run_folder=str(tmp_path / name),
            tokens_folder=str(tiny_tokens),
            model={**tiny_model, "schedule": [2, 2]},
            recipe=TrainingSettings(**{**RECIPE, **more}),
        )
        return run_job(job).validation_loss

    tolerance = 0.03 if "precision" in changes else 1e-5
    assert loss("changed", **changes) == pytest.approx(loss("plain"), abs=tolerance)


def test_the_sources_of_a_mixture_have_the_losses_of_the_full_schedule(
    tiny_model: dict[str, Any],
) -> None:
    decoder = Decoder(ModelConfig.from_dict({**tiny_model, "schedule": [2, 2]})).double()
    tokens = torch.randint(decoder.config.vocab_size, (2, 16))
    batch = replace(Batch.of_text(tokens), sources=(tokens > 20).long())
    batch = batch.counted_as(batch.num_targets, batch.num_positions)

    def numbers(passes: Passes) -> dict[str, float]:
        objective = make_objective(lambda _: decoder.schedule, source_names=("a", "b"))
        trainer = BareTrainer(decoder, objective, TrainingSettings(), passes=passes)
        return mean_by_source(trainer.gradients(batch))

    none = IterationSchedule((0, 0))
    plain = numbers(single_pass)
    elastic = numbers(elastic_passes(lambda _: (none,), ElasticSettings()))
    assert plain.keys() >= {"loss_a", "loss_b"}
    for name in ("loss_a", "loss_b"):
        assert elastic[name] == pytest.approx(plain[name], rel=1e-12)
    assert elastic["full_loss"] == pytest.approx(plain["loss"], rel=1e-12)


def test_at_weight_0_training_is_that_of_the_full_schedule(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    def loss(name: str, elastic: ElasticSettings | None) -> tuple[float, float]:
        outcome = run_job(
            TrainingJob(
                run_folder=str(tmp_path / name),
                tokens_folder=str(tiny_tokens),
                model={**tiny_model, "schedule": [2, 2]},
                recipe=TrainingSettings(**{**RECIPE, "elastic": elastic}),
            )
        )
        return outcome.validation_loss, outcome.training_flops

    assert loss("weightless", ElasticSettings(weight=0)) == loss("plain", None)


@pytest.mark.parametrize("model", ["model.method=vanilla", "model.corrections=0"])
def test_a_model_without_corrections_is_refused(model: str, tmp_path: Path) -> None:
    settings = resolve_settings({}, [model, "training.elastic.num_drawn=1"])
    with pytest.raises(UserError, match=r"^training.elastic trains schedules of fewer corrections"):
        pretraining_job(settings, Workspace(tmp_path), None)


@pytest.mark.parametrize(
    ("schedules", "problem"),
    [
        ("[2]", r"2,2,2,2,2,2 is not below the full one"),
        ("['2,2,3,0,0,0']", r"2,2,3,0,0,0 is not below the full one, 2,2,2,2,2,2; each layer"),
        ("['1,1']", r"1,1 is for 2 layers, the model has 6"),
        ("[many]", r"'many' is not an iteration schedule"),
    ],
)
def test_a_family_that_does_not_fit_is_refused(
    schedules: str, problem: str, tmp_path: Path
) -> None:
    changes = ["model.corrections=2", f"training.elastic.schedules={schedules}"]
    with pytest.raises(UserError, match=r"^training.elastic.schedules: .*" + problem):
        pretraining_job(resolve_settings({}, changes), Workspace(tmp_path), None)


def test_a_family_has_one_key_however_it_is_written(tmp_path: Path) -> None:
    def key(schedules: str) -> str:
        changes = ["model.corrections=2", f"training.elastic.schedules={schedules}"]
        settings = resolve_settings({}, changes)
        return pretraining_job(settings, Workspace(tmp_path), None).run_folder

    assert key("[0, 1]") == key("['1*6', '0,0,0,0,0,0', 0]") != key("[0]")


@pytest.mark.parametrize(
    ("method", "corrections", "is_elastic"),
    [("vanilla", None, False), ("iiet", 0, False), ("iiet", 2, True), ("looped", "2", True)],
)
def test_models_of_a_sweep_without_corrections_have_no_members(
    method: str, corrections: int | str | None, is_elastic: bool
) -> None:
    settings: Settings = resolve_settings({}, ["training.elastic.num_drawn=1"])
    variant = ModelVariant(method=method, corrections=corrections)
    assert (settings_of(settings, variant).training.elastic is not None) == is_elastic
