"""Distillation runs and their controls, trained for real; journals name the parts of the loss."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from same_run import curve
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iiet.decoder import Decoder
from iiet.model.schedule import IterationSchedule
from orchestrator.models.folder import load_config, read_text_files
from orchestrator.models.load import load_model
from orchestrator.records.training import TrainingJob
from orchestrator.settings import DistillationSettings, TrainingSettings, resolve_settings
from orchestrator.training.devices import decoder_to_train, load_teacher
from orchestrator.training.distilling import student_job
from orchestrator.training.job import job_key
from orchestrator.training.trainer import run_job
from orchestrator.training.world import World
from orchestrator.workspace.errors import UserError

RECIPE: dict[str, Any] = {
    "num_steps": 6, "num_tokens_per_step": 64, "num_validation_tokens": 64, "learning_rate": 1e-2,
    "warmup_steps": 2, "iterate_from_fraction": 0.0,
}  # fmt: skip

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def teacher(save_tiny, tmp_path) -> Path:
    return save_tiny(tmp_path / "runs" / "teacher")


@pytest.fixture
def student(tmp_path, tiny_tokens, tiny_model, teacher) -> MakeJob:
    """Make the job of a student from the settings `distillation`, in a folder of its own."""

    def make(name: str = "student", schedule: tuple[int, ...] = (1, 0), **more: Any) -> TrainingJob:
        recipe = TrainingSettings(**{**RECIPE, **more.pop("recipe", {})})
        job = student_job(
            DistillationSettings(training=recipe, **more),
            teacher=teacher,
            schedule=IterationSchedule(schedule),
            tokens_folder=str(tiny_tokens),
        )
        assert job
        return job.model_copy(update={"run_folder": str(tmp_path / name)})

    return make


def test_a_student_starts_from_its_teacher_and_leaves_it_alone(student, teacher):
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    short = {"num_steps": 2}
    job = student(schedule=(0, 1), recipe={**short, "learning_rate": 1e-9})
    outcome = run_job(job)
    decoder = load_model(Path(str(outcome.checkpoint)))
    assert decoder.schedule.corrections == (0, 1)
    for name, tensor in load_model(teacher).state_dict().items():
        assert torch.allclose(decoder.state_dict()[name], tensor, atol=1e-6), name
    assert {n: c for n, c in before.items() if (teacher / n).read_bytes() != c} == {}
    loss, entropy, kl = (curve(job, f"train/{n}")[1] for n in ("loss", "cross_entropy", "kl"))
    assert kl > 0
    assert loss == pytest.approx(entropy + kl, rel=1e-5)
    # The FLOPs of a teacher that runs count, a third of the student's at equal schedules.
    plain, taught = (
        run_job(student(control, schedule=(2, 1), control=control, recipe=short)).training_flops
        for control in ("cross_entropy", "distill")
    )
    assert taught == pytest.approx(plain * 4 / 3)


def test_the_flops_of_a_teacher_are_those_of_the_sequences_that_it_reads(student, teacher):
    length = 8  # Half of its context.
    recipe = {"num_steps": 2, "sequence_length": length}
    plain, taught = (
        run_job(student(control, control=control, recipe=recipe))
        for control in ("cross_entropy", "distill")
    )
    counter = FlopCounterMode(display=False)
    model = load_model(teacher)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, length, dtype=torch.long))
    # PyTorch counts the pairs of tokens that the causal mask hides, and none of the mix's sums.
    evaluations = 3 + 2
    hidden_pairs = length * (length - 1) / 2
    unseen = evaluations * 4 * 16 * hidden_pairs
    assert plain.num_tokens == taught.num_tokens
    of_teacher = (taught.training_flops - plain.training_flops) / taught.num_tokens
    assert of_teacher == pytest.approx((counter.get_total_flops() - unseen) / length, rel=0.01)


def test_a_student_has_the_text_files_of_its_imported_teacher(student, teacher, tmp_path):
    imported = tmp_path / "imported" / teacher.name
    shutil.copytree(teacher, imported)
    (imported / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    job = student(recipe={"num_steps": 1})
    folders = {name: str(imported) for name in ("teacher_folder", "initial_folder")}
    imported_folders = {name: folder for name, folder in folders.items() if getattr(job, name)}
    checkpoint = Path(str(run_job(job.model_copy(update=imported_folders)).checkpoint))
    assert read_text_files(checkpoint) == read_text_files(imported)


def test_a_student_of_fewer_layers_starts_from_the_kept_ones(student, teacher):
    job = student(recipe={"num_steps": 2})
    full = load_config(teacher)
    config = full.of_kept_layers(full.corrections.leaving_out([0]))
    smaller = job.model_copy(update={"model": config, "kept_layers": (1,)})
    assert job_key(smaller) != job_key(smaller.model_copy(update={"kept_layers": (0,)}))
    start = decoder_to_train(smaller, World(), None)
    full = load_model(teacher)
    first_weights = start.model.layers[0].state_dict()
    for name, weights in full.model.layers[1].state_dict().items():
        assert torch.equal(first_weights[name], weights) or name.startswith("mix.")
    trained = load_model(Path(str(run_job(smaller).checkpoint)))
    assert trained.config == config
    assert all(value > 0 for value in curve(smaller, "train/kl").values())


def test_the_teacher_contributes_only_within_its_window(student):
    job = student(teacher_from_step=2, teacher_until_step=4)
    always = student("always")
    assert job_key(job) != job_key(always)
    outcome = run_job(job)
    outcome_of_always = run_job(always)
    assert list(curve(job, "train/kl")) == [3, 4]
    assert all(value > 0 for value in curve(job, "train/kl").values())
    losses, entropies = (curve(job, f"train/{name}") for name in ("loss", "cross_entropy"))
    assert list(entropies) == [1, 2, 3, 4, 5, 6]
    assert [step for step in losses if losses[step] != entropies[step]] == [3, 4]
    assert list(curve(always, "train/kl")) == [1, 2, 3, 4, 5, 6]
    assert outcome.training_flops < outcome_of_always.training_flops, (
        "a teacher outside its window is not run"
    )
    for window in ("teacher_until_step=0", "teacher_from_step=-1"):
        with pytest.raises(UserError, match=rf"distillation\.{window.partition('=')[0]}"):
            resolve_settings({}, [f"distillation.{window}"])


@pytest.mark.parametrize("control", ["cross_entropy", "scratch"])
def test_a_control_is_trained_without_a_teacher(control, student, teacher):
    job = student(control=control, recipe={"seed": 1, "num_steps": 2})
    assert load_teacher(job, World()) is None
    assert (job.initial_folder is None) == (control == "scratch")
    start = decoder_to_train(job, World(), None).state_dict()
    torch.manual_seed(job.recipe.seed)
    fresh = Decoder(job.model).state_dict()
    taught = load_model(teacher).state_dict()
    expected, unexpected = (fresh, taught) if control == "scratch" else (taught, fresh)
    assert all(torch.equal(start[name], expected[name]) for name in expected)
    assert not all(torch.equal(start[name], unexpected[name]) for name in unexpected)
    run_job(job)
    assert curve(job, "train/kl") == {}
    assert len(curve(job)) == 2
