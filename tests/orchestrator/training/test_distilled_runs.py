"""Distillation runs and their controls, trained for real; journals name the parts of the loss."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from changed_trials import with_accuracy

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig
from orchestrator.models.folder import load_config, read_text_files
from orchestrator.models.open import load_model
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.settings import DistillationSettings, TrainingSettings, resolve_settings
from orchestrator.sweeping import trial as trial_module
from orchestrator.sweeping.trial import run_trial
from orchestrator.sweeping.trials import student_job, student_trial
from orchestrator.training import devices, teacher_cache
from orchestrator.training.devices import World, decoder_to_train
from orchestrator.training.dropping import kept_config
from orchestrator.training.job import job_key
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import open_workspace

RECIPE: dict[str, Any] = {
    "num_steps": 6,
    "num_tokens_per_step": 64,
    "num_validation_tokens": 64,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "iterate_from_fraction": 0.0,
}
MODEL: dict[str, Any] = {
    "vocab_size": 300, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2,
    "ffn_dim": 32, "context_length": 16,
}  # fmt: skip
HIDDEN = DistillationConfig(hidden_weight=0.5)

MakeJob = Callable[..., TrainingJob]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokens: Path) -> Path:
    model = ModelConfig.from_dict({**MODEL, "schedule": [2, 1]}).to_dict()
    job = TrainingJob(
        run_folder=str(tmp_path_factory.mktemp("runs") / "teacher"),
        tokens_folder=str(tiny_tokens),
        model=model,
        recipe=TrainingSettings(**RECIPE),
    )
    return Path(str(run_job(job).checkpoint))


@pytest.fixture
def student(tmp_path: Path, tiny_tokens: Path, teacher: Path) -> MakeJob:
    """Make the job of a student from the settings `distillation`, in a folder of its own."""

    def make(name: str = "student", schedule: tuple[int, ...] = (1, 0), **more: Any) -> TrainingJob:
        recipe = TrainingSettings(**{**RECIPE, **more.pop("recipe", {})})
        job = student_job(
            DistillationSettings(training=recipe, **more),
            teacher=teacher,
            config=ModelConfig.from_dict({**MODEL, "schedule": schedule}),
            tokens_folder=str(tiny_tokens),
            run_folder=str(tmp_path / name),
        )
        assert job
        return job

    return make


@pytest.mark.parametrize("control", ["distill", "cross_entropy"])
def test_a_student_has_the_text_files_of_its_imported_teacher(
    control: str, student: MakeJob, teacher: Path, tmp_path: Path
) -> None:
    imported = tmp_path / "imported" / teacher.name
    shutil.copytree(teacher, imported)
    (imported / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    job = student(control=control)
    folders = {name: str(imported) for name in ("teacher_folder", "initial_folder")}
    kept = {name: folder for name, folder in folders.items() if getattr(job, name)}
    checkpoint = Path(str(run_job(job.model_copy(update=kept)).checkpoint))
    assert read_text_files(checkpoint) == read_text_files(imported)


def test_a_student_of_fewer_layers_starts_from_the_kept_ones(
    student: MakeJob, teacher: Path
) -> None:
    job = student()
    config = kept_config(load_config(teacher), (1,))
    smaller = job.model_copy(update={"model": config, "kept_layers": (1,)})
    assert job_key(smaller) != job_key(smaller.model_copy(update={"kept_layers": (0,)}))
    start, full = decoder_to_train(smaller, World(), None), load_model(teacher)
    for name, weights in full.fields[1].state_dict().items():
        assert torch.equal(start.fields[0].state_dict()[name], weights)
    outcome = run_job(smaller)
    trained = load_model(Path(str(outcome.checkpoint)))
    assert trained.config == config
    assert all(value > 0 for value in numbers(smaller, "train/kl").values())
    with pytest.raises(UserError, match="from 0 to 1 in ascending order"):
        run_job(smaller.model_copy(update={"kept_layers": (2,)}))
    with pytest.raises(UserError, match="another configuration"):
        run_job(smaller.model_copy(update={"kept_layers": (0, 1)}))


def numbers(job: TrainingJob, metric: str) -> dict[int, float]:
    """Return step, from 1 -> a metric in the journal."""
    return {
        record["step"]: record["values"][metric]
        for record in read_journal(job.folder)[0]
        if metric in record.get("values", {})
    }


def test_the_teacher_contributes_only_within_its_window(student: MakeJob) -> None:
    job, always = student(teacher_from_step=2, teacher_until_step=4), student("always")
    assert job_key(job) != job_key(always)
    outcome, usual = run_job(job), run_job(always)
    assert list(numbers(job, "train/kl")) == [3, 4]
    assert all(value > 0 for value in numbers(job, "train/kl").values())
    losses, entropies = (numbers(job, f"train/{name}") for name in ("loss", "cross_entropy"))
    assert list(entropies) == [1, 2, 3, 4, 5, 6]
    assert [step for step in losses if losses[step] != entropies[step]] == [3, 4]
    assert list(numbers(always, "train/kl")) == [1, 2, 3, 4, 5, 6]
    assert outcome.training_flops < usual.training_flops, "a teacher outside its window is not run"


@pytest.mark.parametrize(
    ("window", "problem"),
    [
        (["teacher_until_step=0"], r"distillation\.teacher_until_step"),
        (["teacher_from_step=-1"], r"distillation\.teacher_from_step"),
    ],
)
def test_a_window_without_a_step_is_refused(window: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        resolve_settings({}, [f"distillation.{part}" for part in window])


def test_distillation_in_stages_trains_the_schedule_of_each_step(student: MakeJob) -> None:
    staged = student(schedule=(2, 1), recipe={"iterate_from_fraction": 0.5})
    none = student("none", schedule=(0, 0))
    at_once = student("at once", schedule=(2, 1))
    assert len({job_key(job) for job in (staged, none, at_once)}) == 3
    outcomes = [run_job(job) for job in (staged, none, at_once)]
    for metric in ("train/kl", "train/loss"):
        found, without, full = (numbers(job, metric) for job in (staged, none, at_once))
        assert [found[step] for step in (1, 2, 3)] == [without[step] for step in (1, 2, 3)]
        assert found[4] != without[4]
        assert found[1] != full[1]
    # The student starts as its teacher: under the full schedule they agree.
    assert numbers(at_once, "train/kl")[1] == pytest.approx(0, abs=1e-6)
    flops = [outcome.training_flops for outcome in outcomes]
    assert flops[0] == pytest.approx((flops[1] + flops[2]) / 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_hidden_states_are_a_term_of_a_run(student: MakeJob, precision: str) -> None:
    job = student(hidden_weight=0.5, kl_weight=2.0, recipe={"precision": precision})
    assert job_key(job) != job_key(
        job.model_copy(update={"distillation": DistillationConfig(kl_weight=2.0)})
    )
    outcome = run_job(job)
    assert outcome.finished
    assert math.isfinite(outcome.validation_loss)
    names = ("loss", "cross_entropy", "kl", "hidden")
    loss, entropy, kl, hidden = (numbers(job, f"train/{name}") for name in names)
    assert len(hidden) == RECIPE["num_steps"]
    for step, error in hidden.items():
        assert error > 0
        total = entropy[step] + 2 * kl[step] + 0.5 * error
        assert loss[step] == pytest.approx(total, rel=1e-5)


def test_several_passes_and_recomputation_give_the_hidden_states_of_one_pass(
    student: MakeJob,
) -> None:
    plain, lean, split = (
        student(name, hidden_weight=0.5, recipe=recipe)
        for name, recipe in (
            ("plain", {}),
            ("lean", {"activation_checkpointing": True}),
            ("split", {"num_sequences_per_pass": 2}),
        )
    )
    for job in (plain, lean, split):
        run_job(job)
    for metric in ("train/loss", "train/hidden"):
        expected = pytest.approx(numbers(plain, metric), rel=1e-4)
        assert numbers(lean, metric) == expected
        assert numbers(split, metric) == expected


def _trial(control: str, teacher: Path, tokens: Path, space: Path) -> Trial:
    from iiet.pruning import FamilyMember
    from iiet.schedule import IterationSchedule

    settings = resolve_settings(
        {"distillation": {"control": control, "training": RECIPE}},
    )
    schedule = IterationSchedule((1, 0))
    return student_trial(
        settings,
        open_workspace(space),
        teacher,
        ModelConfig.from_dict({**MODEL, "schedule": [1, 0]}),
        FamilyMember(schedule=schedule, threshold_above=0.1, threshold_up_to=0.2),
        TrialSuite(suite="x", tokens_folder=str(tokens)),
    )


@pytest.mark.parametrize("control", ["cross_entropy", "scratch"])
def test_a_control_is_trained_without_a_teacher(
    control: str,
    teacher: Path,
    tiny_tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial_module, "measure_trial", with_accuracy)
    trial = _trial(control, teacher, tiny_tokens, tmp_path)
    started_from: list[Decoder] = []
    loaded: list[Path] = []
    decoder_to_train, load = devices.decoder_to_train, devices.load_model

    def watched(*arguments: Any) -> Decoder:
        decoder = decoder_to_train(*arguments)
        started_from.append(load_like(decoder))
        return decoder

    def counted(folder: Path, **options: Any) -> Decoder:
        loaded.append(folder)
        return load(folder, **options)

    monkeypatch.setattr("orchestrator.training.trainer.decoder_to_train", watched)
    monkeypatch.setattr(devices, "load_model", counted)
    monkeypatch.setattr(teacher_cache, "load_model", counted)
    result = run_trial(trial)
    assert result
    assert result.numbers["train/steps"] == RECIPE["num_steps"]

    job = trial.job
    assert job
    assert teacher_cache.load_teacher(job, World()) is None
    assert numbers(job, "train/kl") == {}
    assert len(numbers(job, "train/loss")) == RECIPE["num_steps"]
    torch.manual_seed(job.recipe.seed)
    fresh, taught = Decoder(trial.model), load_model(teacher)
    (first,) = started_from
    expected = fresh if control == "scratch" else taught
    assert same_weights(first, expected)
    assert not same_weights(first, taught if control == "scratch" else fresh)
    # The teacher's folder is read only for the student's initial weights.
    assert loaded == ([] if control == "scratch" else [teacher])


def load_like(decoder: Decoder) -> Decoder:
    copied = Decoder(decoder.config)
    copied.load_state_dict(decoder.state_dict())
    return copied


def same_weights(one: Decoder, other: Decoder) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


Call = tuple[dict[str, Any], str]
"""A job, and how its workers share the model."""


def run_calls(rank: int, folder: str, calls: list[Call]) -> None:
    """Run jobs in turn as one of two workers; started by `mp.spawn`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    for job, parallel in calls:
        run_job(TrainingJob.model_validate(job), world=World(rank=rank, size=2, parallel=parallel))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_distill_hidden_states_like_one(
    student: MakeJob, tmp_path: Path, teacher: Path
) -> None:
    more: dict[str, Any] = {"hidden_weight": 0.5, "teacher_from_step": 1}
    lean = {"activation_checkpointing": True, "precision": "bf16"}
    pairs = {
        parallel: (student(parallel, **more), student(f"{parallel}-lean", **more, recipe=lean))
        for parallel in ("ddp", "fsdp")
    }
    calls = [
        (job.model_dump(mode="json"), parallel) for parallel, pair in pairs.items() for job in pair
    ]
    alone, rough = student("alone", **more), student("rough", **more, recipe=lean)
    for job in (alone, rough):
        run_job(job)
    mp.spawn(run_calls, (str(tmp_path), calls), nprocs=2)
    for exact, half in pairs.values():
        for metric in ("train/loss", "train/kl", "train/hidden", "train/gradient_norm"):
            assert numbers(exact, metric) == pytest.approx(numbers(alone, metric), rel=1e-4)
        assert list(numbers(exact, "train/hidden")) == [2, 3, 4, 5, 6]
        assert numbers(half, "train/loss") == pytest.approx(numbers(rough, "train/loss"), rel=0.02)
        assert numbers(half, "train/hidden") == pytest.approx(
            numbers(rough, "train/hidden"), rel=0.1
        )
