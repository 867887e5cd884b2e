"""Stored outputs are complete or absent, and bitwise equal to those of the teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig
from orchestrator.models.folder import weights_key
from orchestrator.models.open import load_model
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.terminal.progress import Progress
from orchestrator.training import teacher_cache
from orchestrator.training.devices import World
from orchestrator.training.job import job_key
from orchestrator.training.teacher_cache import (
    ANSWERS,
    CachedTeacher,
    CachePlan,
    TeacherWork,
    answers_by_step,
    cache_plan,
    delete_answers,
    find_cache_damage,
    load_teacher,
    open_cache,
    store_answers,
    teacher_work,
    write_cache,
)
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import delete_folder
from orchestrator.workspace.journal import read_journal

RECIPE: dict[str, Any] = {
    "num_steps": 6,
    "num_tokens_per_step": 64,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "iterate_from_fraction": 0.0,
}

MakeStudent = Callable[..., TrainingJob]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokens: Path) -> Path:
    model = {
        "vocab_size": 300, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2,
        "ffn_dim": 32, "context_length": 16, "schedule": [2, 1],
    }  # fmt: skip
    job = TrainingJob(
        run_folder=str(tmp_path_factory.mktemp("runs") / "teacher"),
        tokens_folder=str(tiny_tokens),
        model=model,
        recipe=TrainingSettings(**RECIPE),
    )
    return Path(str(run_job(job).checkpoint))


@pytest.fixture
def student(tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any], teacher: Path):
    def make(
        name: str = "student", *, recipe: dict[str, Any] | None = None, **more: Any
    ) -> TrainingJob:
        return TrainingJob(
            **{
                "run_folder": str(tmp_path / name),
                "tokens_folder": str(tiny_tokens),
                "model": {**tiny_model, "schedule": [1, 0]},
                "recipe": TrainingSettings(**{**RECIPE, **(recipe or {})}),
                "objective": "distill",
                "teacher_folder": str(teacher),
                "initial_folder": str(teacher),
                "distillation": DistillationConfig(),
                **more,
            }
        )

    return make


class Notes(Progress):
    """Records the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def plan_of(job: TrainingJob) -> CachePlan:
    plan = cache_plan(job)
    assert plan
    return plan


def stored(job: TrainingJob, parent: Path) -> TrainingJob:
    plan = plan_of(job)
    return job.model_copy(
        update={"teacher_cache": str(write_cache(plan, parent, answers_by_step(job)))}
    )


def opened(job: TrainingJob) -> CachedTeacher:
    plan = plan_of(job)
    cache = open_cache(Path(str(job.teacher_cache)), plan)
    assert cache
    return cache


def losses(job: TrainingJob) -> list[float]:
    records, _ = read_journal(job.folder)
    return [r["values"]["train/loss"] for r in records if "train/loss" in r.get("values", {})]


@pytest.mark.parametrize(
    ("recipe", "distillation"),
    [
        ({}, {}),
        ({"num_sequences_per_pass": 3}, {"temperature": 2.0}),
        ({"precision": "bf16"}, {}),
        ({}, {"divergence": "reverse", "start_step": 2, "end_step": 5}),
    ],
)
def test_a_run_with_stored_outputs_is_bitwise_equal_to_one_with_a_live_teacher(
    student: MakeStudent, tmp_path: Path, recipe: dict[str, Any], distillation: dict[str, Any]
) -> None:
    more = {"recipe": recipe, "distillation": DistillationConfig(**distillation)}
    live, reading = student("live", **more), stored(student("reading", **more), tmp_path / "t")
    live_run, cached_run = run_job(live), run_job(reading)
    assert len(losses(live)) == 6
    assert losses(reading) == losses(live)
    assert weights_key(Path(str(cached_run.checkpoint))) == weights_key(
        Path(str(live_run.checkpoint))
    )
    assert cached_run.training_flops < live_run.training_flops, "only a teacher that runs counts"
    started = [read_journal(job.folder)[0][0] for job in (live, reading)]
    assert ['"reads_teacher": true' in json.dumps(event) for event in started] == [False, True]


def test_a_job_with_stored_outputs_loads_no_teacher(
    student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stored(student(), tmp_path / "t")

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("orchestrator.training.teacher_cache.load_model", forbidden)
    assert isinstance(load_teacher(job, World()), CachedTeacher)
    with pytest.raises(AssertionError, match="was loaded"):
        load_teacher(job.model_copy(update={"teacher_cache": None}), World())


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_part_of_a_step_in_any_order_finds_its_outputs(
    student: MakeStudent, tmp_path: Path, teacher: Path, num_workers: int
) -> None:
    job = stored(student(), tmp_path / "t")
    cache, decoder = opened(job), load_model(teacher)
    outputs = answers_by_step(job)
    for step in (0, 5):
        sequences, _ = outputs(step)
        for share in sequences.flip(0).chunk(num_workers):
            with torch.no_grad():
                torch.testing.assert_close(cache(share), decoder(share))
    with pytest.raises(KeyError, match="no answer"):
        cache(torch.zeros(1, 16, dtype=torch.long))


def test_the_key_of_a_trial_depends_on_the_loss_and_not_on_the_cache(
    student: MakeStudent, tmp_path: Path
) -> None:
    job = student()
    assert job_key(stored(job, tmp_path / "t")) == job_key(job)
    assert job_key(student(distillation=DistillationConfig(temperature=2.0))) != job_key(job)


def test_the_key_of_a_cache_depends_on_what_changes_the_outputs(
    student: MakeStudent, tiny_model: dict[str, Any]
) -> None:
    def key(**more: Any) -> str:
        plan = cache_plan(student(**more))
        assert plan
        return plan.key

    usual = key()
    for same in (
        {"recipe": {"learning_rate": 0.5}},
        {"model": {**tiny_model, "schedule": [0, 0]}},
        {"distillation": DistillationConfig(kl_weight=2.0, temperature=3.0)},
    ):
        assert key(**same) == usual, same
    for other in (
        {"recipe": {"seed": 1}},
        {"recipe": {"num_steps": 7}},
        {"recipe": {"precision": "bf16"}},
        {"distillation": DistillationConfig(start_step=1)},
    ):
        assert key(**other) != usual, other


def test_hidden_states_and_jobs_without_a_teacher_have_no_cache(student: MakeStudent) -> None:
    for more in (
        {"distillation": DistillationConfig(hidden_weight=0.1)},
        {"distillation": DistillationConfig(kl_weight=0.0)},
        {"objective": "cross_entropy", "teacher_folder": None},
    ):
        assert cache_plan(student(**more)) is None


def test_a_damaged_cache_is_reported_and_written_again_and_never_read(
    student: MakeStudent, tmp_path: Path
) -> None:
    job = stored(student(), tmp_path / "t")
    folder, plan = Path(str(job.teacher_cache)), cache_plan(job)
    assert plan
    logits = folder / "answers.bin"
    good = logits.read_bytes()
    notes = Notes()
    for bad in (good[:-4], good[:-4] + b"\0\1\2\3"):
        logits.write_bytes(bad)
        assert find_cache_damage(folder, plan)
        assert write_cache(plan, tmp_path / "t", answers_by_step(job), progress=notes) == folder
        assert logits.read_bytes() == good
    assert [note.partition("(")[2].partition(")")[0] for note in notes.notes] == [
        "answers.bin is incomplete",
        "answers.bin was changed after writing",
    ]
    logits.write_bytes(good[:-4])
    assert run_job(job).finished, "a job with an incomplete cache runs the teacher"


def test_an_intact_cache_is_not_written_again(student: MakeStudent, tmp_path: Path) -> None:
    job = stored(student(), tmp_path / "t")
    plan = plan_of(job)

    def forbidden(_: int) -> Any:
        raise AssertionError("the teacher was run")

    assert write_cache(plan, tmp_path / "t", forbidden) == Path(str(job.teacher_cache))


def test_a_cache_does_not_open_for_another_plan(student: MakeStudent, tmp_path: Path) -> None:
    job = stored(student(), tmp_path / "t")
    other = cache_plan(student(recipe={"seed": 1}))
    assert other
    assert open_cache(Path(str(job.teacher_cache)), other) is None
    assert "other answers" in str(find_cache_damage(Path(str(job.teacher_cache)), other))


def test_all_students_of_a_teacher_read_one_file(
    student: MakeStudent, tmp_path: Path, tiny_model: dict[str, Any]
) -> None:
    jobs = [
        student("a"),
        student("plain", objective="cross_entropy", teacher_folder=None),
        student("b", model={**tiny_model, "schedule": [0, 0]}),
        student("hidden", distillation=DistillationConfig(hidden_weight=0.5)),
        student("other seed", recipe={"seed": 1}),
    ]
    shared, _ = store_answers(jobs, tmp_path / "t")
    assert [bool(job.teacher_cache) for job in shared] == [True, False, True, False, True]
    assert shared[0].teacher_cache == shared[2].teacher_cache != shared[4].teacher_cache
    assert len(list((tmp_path / "t").glob(f"*/{ANSWERS}"))) == 2
    assert store_answers(jobs, tmp_path / "t")[0] == shared


def test_the_teacher_runs_on_the_device_it_is_given_and_only_if_outputs_are_missing(
    student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def outputs(job: TrainingJob, *, device: str) -> Any:
        devices.append(device)
        return answers_by_step(job)

    monkeypatch.setattr(teacher_cache, "answers_by_step", outputs)
    jobs = [student("a"), student("b")]

    def store() -> None:
        store_answers(jobs, tmp_path / "t", on_device=lambda work, progress: work("cuda", progress))

    store()
    store()
    assert devices == ["cuda"]
    [logits] = (tmp_path / "t").glob("*/answers.bin")
    content = bytearray(logits.read_bytes())
    content[-1] ^= 1
    logits.write_bytes(content)
    store()
    assert devices == ["cuda", "cuda"], "a damaged cache is written again"


def work_of(jobs: Sequence[TrainingJob], parent: Path, *, is_stored: bool = True) -> TeacherWork:
    trainings = list(map(Estimate.of, jobs))
    plans = [each.cache if is_stored else None for each in trainings]
    return teacher_work(plans, [each.num_teacher_tokens for each in trainings], parent)


def test_the_estimate_counts_a_shared_teacher_once(student: MakeStudent, tmp_path: Path) -> None:
    jobs = [student("a"), student("b"), student("c", objective="cross_entropy")]
    own = RECIPE["num_steps"] * RECIPE["num_tokens_per_step"]
    assert work_of(jobs, tmp_path / "t", is_stored=False) == TeacherWork(2 * own)
    assert work_of(jobs, tmp_path / "t") == TeacherWork(own, own, plan_of(jobs[0]).num_bytes)
    store_answers(jobs, tmp_path / "t")
    assert work_of(jobs, tmp_path / "t") == TeacherWork()


def test_a_deleted_cache_is_replaced_by_the_teacher(student: MakeStudent, tmp_path: Path) -> None:
    [job], _ = store_answers([student("a")], tmp_path / "t")
    delete_answers([job])
    assert not Path(str(job.teacher_cache)).exists()
    assert isinstance(load_teacher(job, World()), Decoder)


def test_what_does_not_fit_on_the_disk_is_refused_and_a_full_disk_leaves_nothing(
    student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [student(f"{seed}", recipe={"seed": seed}) for seed in range(3)]
    plan, answers = plan_of(jobs[0]), answers_by_step(jobs[0])

    def full_after_half(number: int) -> Any:
        if number == plan.num_steps // 2:
            raise OSError(28, "No space left on device")
        return answers(number)

    with pytest.raises(OSError, match="No space"):
        write_cache(plan, tmp_path / "t", full_after_half)
    assert [path.name for path in (tmp_path / "t").iterdir()] == [f".{plan.key}.lock"]
    needed = 3 * plan.num_bytes
    monkeypatch.setattr(teacher_cache, "free_disk", lambda _: needed - 1)
    with pytest.raises(UserError, match=r"distillation\.teacher_cache needs .* set it to false"):
        store_answers(jobs, tmp_path / "t")
    monkeypatch.setattr(teacher_cache, "free_disk", lambda _: needed)
    assert work_of(jobs, tmp_path / "t").num_bytes == needed
    assert all(map(opened, store_answers(jobs, tmp_path / "t")[0]))


def test_the_logits_of_one_pass_only_are_computed_at_once(
    student: MakeStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = Decoder.forward

    def watched(self: Decoder, input_ids: Any, **more: Any) -> Any:
        sizes.append(len(input_ids))
        return forward(self, input_ids, **more)

    monkeypatch.setattr(Decoder, "forward", watched)
    sequences, logits = answers_by_step(student(recipe={"num_sequences_per_pass": 3}))(0)
    assert max(sizes) == 3
    assert sum(sizes) == len(sequences) == len(logits)


def test_a_cache_that_is_deleted_while_it_opens_is_missing(
    student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stored(student(), tmp_path / "t")
    plan = plan_of(job)

    def whole_until_now(folder: Path, *_: Any, **__: Any) -> None:
        delete_folder(folder)

    monkeypatch.setattr(teacher_cache, "find_cache_damage", whole_until_now)
    assert open_cache(Path(str(job.teacher_cache)), plan) is None
    assert not list((tmp_path / "t").glob("*/"))
