"""Controls of a teacher with a source: as many FLOPs, the same data, the same layers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from read_tokens import noted_tokens
from refusals import refused

from iiet import ModelConfig
from iiet.hf.weights import WEIGHTS
from orchestrator.models.load import load_model
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.records.trial import SOURCE, SOURCE_CONTINUED
from orchestrator.settings import TrainingSettings, resolve_settings
from orchestrator.settings.evaluation import DEFAULT_RETENTION
from orchestrator.sweeping.retrofit import (
    EQUAL_TOKENS,
    SCRATCH,
    SCRATCH_WITH_SOURCE,
    Retrofit,
    retrofit_of,
    training_flops,
    with_retention,
)
from orchestrator.training.source import find_source
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import write_json
from orchestrator.workspace.layout import DONE_NAME, PROVENANCE

ALL_CONTROLS = "sweep.source_controls=[source, source_continued, scratch, scratch_with_source]"


@pytest.fixture
def make(space, save_tiny, tiny_tokens, tiny_model) -> Callable[..., Retrofit]:
    """A function that returns the retrofit of a plain model of four layers, of which the teacher
    corrects the second and the fourth: assignments of settings, then the teacher's recipe."""
    layers = {"num_layers": 4, "schedule": [0, 2, 0, 1]}
    save_tiny(space.runs / "plain", **{**layers, "method": "vanilla", "schedule": None})
    identity = {"method_options": {"start": "identity"}}
    model = ModelConfig.from_dict({**tiny_model, **layers, **identity})

    def retrofit(*assignments: str, **recipe: Any) -> Retrofit:
        source = find_source(space, "plain")
        usual = {"num_steps": 2, "num_tokens_per_step": 64, "num_validation_tokens": 64}
        teacher = TrainingJob(
            run_folder=str(space.runs / "teacher"),
            tokens_folder=str(tiny_tokens),
            model=model,
            recipe=TrainingSettings(**{**usual, "iterate_from_fraction": 0.0, **recipe}),
            initial_folder=str(source.folder),
        )
        return Retrofit(
            teacher=teacher,
            source=source,
            source_job=None,
            settings=resolve_settings({}, assignments),
            workspace=space,
        )

    return retrofit


def outcome_of(job: TrainingJob) -> TrainingOutcome:
    outcome = run_job(job)
    assert outcome.finished
    return outcome


def with_trained_candidates(retrofit: Retrofit) -> Retrofit:
    """Train both candidates, and return the retrofit as the next plan has it."""
    for job in retrofit.candidates.values():
        run_job(job)
    return replace(retrofit)


def continued_job(retrofit: Retrofit) -> TrainingJob:
    assert retrofit.continued is not None
    return retrofit.continued


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_the_source_is_trained_on_until_its_flops_are_the_teachers(make, kl_weight):
    retrofit = make(source_kl_weight=kl_weight)
    teacher = outcome_of(retrofit.teacher)
    assert continued_job(retrofit).tokens_folder == "", "it can be priced, but not run"
    retrofit = with_trained_candidates(retrofit)
    job = continued_job(retrofit)
    continued = outcome_of(job)
    of_a_step = continued.training_flops / job.recipe.num_steps
    assert teacher.training_flops <= continued.training_flops
    assert continued.training_flops < teacher.training_flops + of_a_step
    assert continued.training_flops == pytest.approx(training_flops(job))
    for candidate in retrofit.candidates.values():
        assert outcome_of(candidate).num_tokens == teacher.num_tokens
    assert job.recipe.source_kl_weight == kl_weight
    assert job.initial_folder == retrofit.teacher.initial_folder


def training_tokens(job: TrainingJob) -> torch.Tensor:
    """Train a job, and return the tokens that its model learned from, in their order."""
    with noted_tokens() as read:
        outcome_of(job)
    return torch.cat(read.trained)


def test_the_control_reads_the_same_data_in_the_same_order(make):
    retrofit = with_trained_candidates(make(seed=3, sequence_length=8))
    of_teacher = training_tokens(retrofit.teacher)
    of_control = training_tokens(continued_job(retrofit))
    assert of_teacher.shape == (2 * 8, 8)
    assert len(of_control) > len(of_teacher)
    assert torch.equal(of_control[: len(of_teacher)], of_teacher)


@pytest.mark.parametrize("trained", ["corrected", "added"])
def test_the_control_trains_the_layers_that_get_corrections(make, trained):
    retrofit = with_trained_candidates(make(trained_layers=trained, warmup_steps=0))
    job = continued_job(retrofit)
    assert job.recipe.trained_layers == (2, 4)
    before = load_model(retrofit.source.folder).state_dict()
    after = load_model(Path(str(outcome_of(job).checkpoint))).state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[2] for name in changed} == {"1", "3"}
    text = retrofit.sentences[SOURCE_CONTINUED]
    assert "layers 2, 4" in text
    assert ("only what it adds" in text) == (trained == "added")


def test_its_rate_is_the_better_of_two(make):
    retrofit = make(learning_rate=1e-3, num_steps=1)
    rates = [job.recipe.learning_rate for job in retrofit.candidates.values()]
    assert rates == [1e-3, 2e-3]
    for own_rate, other_rate in ((1e-3, 2e-3), (5e-4, 5e-4)):
        known = replace(retrofit, source=replace(retrofit.source, learning_rate=own_rate))
        assert [job.recipe.learning_rate for job in known.candidates.values()] == [1e-3, other_rate]
    retrofit = with_trained_candidates(retrofit)
    for losses, rate in (
        ((2.0, 1.0), 2e-3),
        ((1.0, 2.0), 1e-3),
        ((math.nan, math.nan), 1e-3),
    ):
        for job, loss in zip(retrofit.candidates.values(), losses, strict=True):
            outcome = outcome_of(job).model_copy(update={"validation_loss": loss})
            outcome.write(job.folder / DONE_NAME)
        assert continued_job(replace(retrofit)).recipe.learning_rate == rate


def test_models_may_lose_so_much_only_where_the_source_is_measured_beside_them(make):
    usual = make()
    assert with_retention(usual.settings, usual).evaluation.retention == DEFAULT_RETENTION
    assert with_retention(usual.settings, None).evaluation.retention == {}
    for controls in ("[]", "[source_continued]"):
        without_source = make(f"sweep.source_controls={controls}")
        settings = with_retention(without_source.settings, without_source)
        assert settings.evaluation.retention == {}
        bounded = make(f"sweep.source_controls={controls}", "evaluation.retention={lastword: 1.0}")
        with refused(UserError, "evaluation.retention", "sweep.source_controls"):
            with_retention(bounded.settings, bounded)


def test_controls_stand_beside_the_front_as_far_as_they_are_trained(make):
    retrofit = make()
    assert list(retrofit.measurable_controls({})) == [SOURCE]
    label, *_ = retrofit.candidates
    finished = {label: Path("a"), SOURCE_CONTINUED: Path("b")}
    assert list(retrofit.measurable_controls(finished)) == [SOURCE, SOURCE_CONTINUED]
    retrofit = with_trained_candidates(retrofit)
    finished = dict.fromkeys((*retrofit.candidates, SOURCE_CONTINUED), Path("c"))
    assert list(retrofit.measurable_controls(finished)) == [SOURCE, EQUAL_TOKENS, SOURCE_CONTINUED]
    assert retrofit.trainings_by_control == {
        SOURCE: (),  # It is there.
        SOURCE_CONTINUED: (*retrofit.candidates, SOURCE_CONTINUED),
    }
    without_controls = make("sweep.source_controls=[]")
    assert (
        without_controls.candidates,
        without_controls.continued,
        without_controls.measurable_controls({}),
    ) == ({}, None, {})


def test_models_from_random_weights_have_the_flops_of_teacher_and_source(make):
    retrofit = make(ALL_CONTROLS, source_kl_weight=0.5, trained_layers="added")
    with pytest.raises(UserError, match=r"sweep\.source_controls"):
        _ = retrofit.scratch
    plain = retrofit.teacher.model_copy(
        update={"model": retrofit.source.config, "initial_folder": None}
    )
    changes = {"source_kl_weight": 0.0, "trained_layers": "all", "num_steps": 30}
    changed_recipe = plain.recipe.model_copy(update=changes)
    source_job = plain.model_copy(update={"recipe": changed_recipe})
    scratch = replace(retrofit, source_job=source_job).scratch
    of_teacher = training_flops(retrofit.teacher)
    for label, flops in (
        (SCRATCH, of_teacher),
        (SCRATCH_WITH_SOURCE, of_teacher + training_flops(source_job)),
    ):
        job = scratch[label]
        assert (job.initial_folder, job.recipe.trained_layers) == (None, "all")
        assert job.model == retrofit.teacher.model
        of_a_step = training_flops(job) / job.recipe.num_steps
        assert flops <= training_flops(job) < flops + of_a_step


def test_a_given_teacher_has_the_controls_of_its_training(make, space, tiny_tokens):
    job = make().teacher
    checkpoint = Path(str(outcome_of(job).checkpoint))
    shutil.copytree(tiny_tokens, space.tokens / tiny_tokens.name)
    settings = resolve_settings({}, [ALL_CONTROLS])
    retrofit, gap = retrofit_of(checkpoint, settings, space)
    assert retrofit is not None
    assert not gap
    assert retrofit.source.folder == Path(str(job.initial_folder))
    assert [*retrofit.candidates]
    assert retrofit_of(retrofit.source.folder, settings, space) == (None, "")
    provenance = retrofit.source.folder / PROVENANCE
    before = provenance.read_text()
    write_json(provenance, {**json.loads(before), "checksums": {WEIGHTS: "others"}})
    assert retrofit_of(checkpoint, settings, space)[0] is None, "the source has changed"
    provenance.write_text(before)
    shutil.rmtree(retrofit.source.folder.parent)
    retrofit, gap = retrofit_of(checkpoint, settings, space)
    assert retrofit is None
    assert "source" in gap
