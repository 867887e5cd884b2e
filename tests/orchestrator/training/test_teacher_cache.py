"""Stored outputs are complete or absent, and bitwise equal to those of the teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from iiet.chunked_loss import Logits
from iiet.coarse_distribution import CoarseDistribution, coarsen
from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import TrainingJob
from orchestrator.settings import DistillationSettings, TrainingSettings
from orchestrator.terminal.progress import Progress
from orchestrator.training import teacher_cache, teacher_cache_policy
from orchestrator.training.checkpoint import weights_key
from orchestrator.training.distributed import World
from orchestrator.training.job import job_key
from orchestrator.training.job_models import load_teacher
from orchestrator.training.model_loading import load_model
from orchestrator.training.run import run_job
from orchestrator.training.teacher_cache import (
    CachedTeacher,
    CachePlan,
    bytes_to_write,
    cache_plan,
    find_cache_damage,
    open_cache,
    teacher_outputs_by_step,
    write_cache,
)
from orchestrator.training.teacher_cache_policy import (
    TeacherWork,
    delete_teacher_caches,
    estimate_teacher_work,
    store_teacher_outputs,
)
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import VERIFIED_NAME, delete_folder
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
        update={"teacher_cache": str(write_cache(plan, parent, teacher_outputs_by_step(job)))}
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
        ({}, {"top_k": 7, "temperature": 2.0}),
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

    monkeypatch.setattr("orchestrator.training.job_models.load_model", forbidden)
    assert isinstance(load_teacher(job, World()), CachedTeacher)
    with pytest.raises(AssertionError, match="was loaded"):
        load_teacher(job.model_copy(update={"teacher_cache": None}), World())


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_any_part_of_a_step_in_any_order_finds_its_outputs(
    student: MakeStudent, tmp_path: Path, teacher: Path, num_workers: int
) -> None:
    job = stored(student(), tmp_path / "t")
    cache, decoder = opened(job), load_model(teacher)
    outputs = teacher_outputs_by_step(job)
    for step in (0, 5):
        sequences, _ = outputs(step)
        for share in sequences.flip(0).chunk(num_workers):
            with torch.no_grad():
                torch.testing.assert_close(cache(share), decoder(share))
    with pytest.raises(KeyError, match="no output"):
        cache(torch.zeros(1, 16, dtype=torch.long))


def test_the_key_of_a_trial_depends_on_the_loss_and_not_on_the_cache(
    student: MakeStudent, tmp_path: Path
) -> None:
    job = student()
    assert job_key(stored(job, tmp_path / "t")) == job_key(job)
    assert job_key(student(distillation=DistillationConfig(top_k=7))) != job_key(job)
    assert job_key(student(distillation=DistillationConfig(top_k=7))) != job_key(
        student(distillation=DistillationConfig(top_k=8))
    )


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
        {"distillation": DistillationConfig(top_k=7)},
        {"distillation": DistillationConfig(start_step=1)},
    ):
        assert key(**other) != usual, other
    coarse = [key(distillation=DistillationConfig(top_k=7, temperature=t)) for t in (1.0, 2.0)]
    assert coarse[0] != coarse[1]


def test_hidden_states_and_jobs_without_a_teacher_have_no_cache(student: MakeStudent) -> None:
    for more in (
        {"distillation": DistillationConfig(hidden_weight=0.1)},
        {"distillation": DistillationConfig(kl_weight=0.0)},
        {"objective": "cross_entropy", "teacher_folder": None},
    ):
        assert cache_plan(student(**more)) is None


@pytest.mark.parametrize("top_k", [None, 7])
def test_an_interrupted_cache_is_completed_and_equals_one_written_at_once(
    student: MakeStudent, tmp_path: Path, top_k: int | None
) -> None:
    job = student(distillation=DistillationConfig(top_k=top_k))
    plan = plan_of(job)
    whole = write_cache(plan, tmp_path / "whole", teacher_outputs_by_step(job))
    outputs, calls = teacher_outputs_by_step(job), []

    def crashing(step: int) -> Any:
        calls.append(step)
        if step == 3 and calls.count(3) == 1:
            raise KeyboardInterrupt
        return outputs(step)

    with pytest.raises(KeyboardInterrupt):
        write_cache(plan, tmp_path / "cut", crashing)
    assert open_cache(tmp_path / "cut" / plan.key, plan) is None
    (left,) = (tmp_path / "cut").glob(".writing-*")
    with (left / "tokens.bin").open("ab") as file:
        file.write(b"half a row")  # As a kill within a step leaves it.
    cut = write_cache(plan, tmp_path / "cut", crashing)
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in cut.iterdir()} == names
    for name in names - {VERIFIED_NAME}:  # That one holds times.
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert sum(p.stat().st_size for p in cut.glob("*.bin")) == plan.num_bytes


def test_a_damaged_cache_is_reported_and_written_again_and_never_read(
    student: MakeStudent, tmp_path: Path
) -> None:
    job = stored(student(), tmp_path / "t")
    folder, plan = Path(str(job.teacher_cache)), cache_plan(job)
    assert plan
    logits = folder / "logits.bin"
    good = logits.read_bytes()
    notes = Notes()
    for bad in (good[:-4], good[:-4] + b"\0\1\2\3"):
        logits.write_bytes(bad)
        assert find_cache_damage(folder, plan)
        assert (
            write_cache(plan, tmp_path / "t", teacher_outputs_by_step(job), progress=notes)
            == folder
        )
        assert logits.read_bytes() == good
    assert [note.partition("(")[2].partition(")")[0] for note in notes.notes] == [
        "logits.bin is incomplete",
        "logits.bin was changed after writing",
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
    assert "other outputs" in str(find_cache_damage(Path(str(job.teacher_cache)), other))


def test_auto_stores_for_two_students_and_not_for_one(
    student: MakeStudent, tmp_path: Path, tiny_model: dict[str, Any]
) -> None:
    one = student("a")
    two = student("b", model={**tiny_model, "schedule": [0, 0]})
    plain = student("c", objective="cross_entropy", teacher_folder=None)
    notes = Notes()
    alone = store_teacher_outputs(
        [one, plain], DistillationSettings(), tmp_path / "t", progress=notes
    )
    assert alone == [one, plain]
    assert not (tmp_path / "t").exists()
    shared = store_teacher_outputs(
        [one, plain, two], DistillationSettings(), tmp_path / "t", progress=notes
    )
    assert [bool(job.teacher_cache) for job in shared] == [True, False, True]
    assert shared[0].teacher_cache == shared[2].teacher_cache
    again = store_teacher_outputs([one], DistillationSettings(), tmp_path / "t", progress=notes)
    assert again[0].teacher_cache == shared[0].teacher_cache, "the existing cache is used"
    assert ["runs in each" in notes.notes[0], "stored once" in notes.notes[1]] == [True, True]
    assert "there already" in notes.notes[2]
    assert store_teacher_outputs([plain], DistillationSettings(), tmp_path / "t") == [plain]


def test_the_teacher_runs_on_the_device_it_is_given_and_only_if_outputs_are_missing(
    student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def outputs(job: TrainingJob, *, device: str) -> Any:
        devices.append(device)
        return teacher_outputs_by_step(job)

    monkeypatch.setattr(teacher_cache_policy, "teacher_outputs_by_step", outputs)
    jobs = [student("a"), student("b")]

    def store() -> None:
        store_teacher_outputs(
            jobs,
            DistillationSettings(),
            tmp_path / "t",
            on_device=lambda work, progress: work("cuda", progress),
        )

    store()
    store()
    assert devices == ["cuda"]
    [logits] = (tmp_path / "t").glob("*/logits.bin")
    content = bytearray(logits.read_bytes())
    content[-1] ^= 1
    logits.write_bytes(content)
    store()
    assert devices == ["cuda", "cuda"], "a damaged cache is written again"


def work_of(
    jobs: Sequence[TrainingJob], settings: DistillationSettings, parent: Path
) -> TeacherWork:
    trainings = list(map(Estimate.of, jobs))
    tokens = [training.num_teacher_tokens for training in trainings]
    caches = [training.cache for training in trainings]
    return estimate_teacher_work(caches, tokens, settings.teacher_cache, parent)


def test_the_estimate_counts_a_shared_teacher_once(student: MakeStudent, tmp_path: Path) -> None:
    jobs = [student("a"), student("b"), student("c", objective="cross_entropy")]
    own = RECIPE["num_steps"] * RECIPE["num_tokens_per_step"]
    live, shared = (DistillationSettings(teacher_cache=mode) for mode in ("live", "exact"))
    assert work_of(jobs, live, tmp_path / "t").num_tokens == 2 * own
    assert work_of(jobs, shared, tmp_path / "t").num_tokens == own
    store_teacher_outputs(jobs, shared, tmp_path / "t")
    assert work_of(jobs, shared, tmp_path / "t").num_tokens == 0


def test_auto_deletes_its_cache_and_a_later_job_runs_the_teacher(
    student: MakeStudent, tmp_path: Path
) -> None:
    jobs = [student("a"), student("b")]
    shared = store_teacher_outputs(jobs, DistillationSettings(), tmp_path / "t")
    delete_teacher_caches(shared, DistillationSettings(teacher_cache="exact"))
    assert Path(str(shared[0].teacher_cache)).is_dir(), "a requested cache is kept"
    delete_teacher_caches(shared, DistillationSettings())
    assert not Path(str(shared[0].teacher_cache)).exists()
    assert isinstance(load_teacher(shared[0], World()), Decoder)


def test_auto_reads_a_requested_cache_and_keeps_it(student: MakeStudent, tmp_path: Path) -> None:
    jobs = [student("a"), student("b")]
    exact, auto = (DistillationSettings(teacher_cache=mode) for mode in ("exact", "auto"))
    [named, _] = store_teacher_outputs(jobs, exact, tmp_path / "t")
    shared = store_teacher_outputs(jobs, auto, tmp_path / "t")
    assert shared[0] == named
    delete_teacher_caches(shared, auto)
    assert opened(shared[0])


def test_auto_respects_the_free_disk_space_and_reports_it(
    student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [student("a"), student("b")]
    plan = plan_of(jobs[0])
    for free, is_stored in ((10 * plan.num_bytes + 10, True), (10 * plan.num_bytes - 10, False)):
        monkeypatch.setattr(teacher_cache_policy, "free_disk", lambda _, free=free: free)
        notes, parent = Notes(), tmp_path / str(free)
        shared = store_teacher_outputs(jobs, DistillationSettings(), parent, progress=notes)
        assert [bool(job.teacher_cache) for job in shared] == [is_stored] * 2
        assert len(notes.notes) == 1
    assert "10% of the free disk" in notes.notes[0]
    monkeypatch.setattr(teacher_cache_policy, "free_disk", lambda _: plan.num_bytes - 1)
    with pytest.raises(UserError, match=r"distillation\.teacher_cache=exact needs"):
        store_teacher_outputs(jobs, DistillationSettings(teacher_cache="exact"), tmp_path / "t")


def test_bytes_that_are_written_already_are_not_needed_again(
    student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [student("a"), student("b")]
    plan = plan_of(jobs[0])
    outputs = teacher_outputs_by_step(jobs[0])

    def full_after_half(number: int) -> Any:
        if number == plan.num_steps // 2:
            raise OSError(28, "No space left on device")
        return outputs(number)

    with pytest.raises(OSError, match="No space"):
        write_cache(plan, tmp_path / "t", full_after_half)
    left = bytes_to_write(plan, tmp_path / "t")
    assert left == plan.num_bytes - plan.num_steps // 2 * (plan.num_bytes // plan.num_steps)
    monkeypatch.setattr(teacher_cache_policy, "free_disk", lambda _: left + 1)
    exact = DistillationSettings(teacher_cache="exact")
    assert work_of(jobs, exact, tmp_path / "t").num_bytes == left
    shared = store_teacher_outputs(jobs, exact, tmp_path / "t")
    assert opened(shared[0])
    assert bytes_to_write(plan, tmp_path / "t") == 0


def test_the_limit_of_auto_holds_for_all_seeds_together(
    student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [student(f"{name}{seed}", recipe={"seed": seed}) for seed in range(3) for name in "ab"]
    plan = plan_of(jobs[0])
    monkeypatch.setattr(teacher_cache_policy, "MAX_BYTES", int(2.5 * plan.num_bytes))
    auto, own = DistillationSettings(), plan.num_tokens
    work = work_of(jobs, auto, tmp_path / "t")
    assert (work.num_stored_tokens, work.num_tokens) == (2 * own, 4 * own)
    shared = store_teacher_outputs(jobs, auto, tmp_path / "t")
    assert [bool(job.teacher_cache) for job in shared] == [True] * 4 + [False] * 2


def test_bytes_of_an_earlier_cache_are_not_subtracted_twice(
    student: MakeStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [student(f"{seed}", recipe={"seed": seed}) for seed in range(3)]
    size = plan_of(jobs[0]).num_bytes

    def free_bytes(parent: Path) -> int:
        written = sum(path.stat().st_size for path in parent.rglob("*.bin"))
        return 3 * size - written

    monkeypatch.setattr(teacher_cache_policy, "free_disk", free_bytes)
    exact = DistillationSettings(teacher_cache="exact")
    shared = store_teacher_outputs(jobs, exact, tmp_path / "t")
    assert all(job.teacher_cache for job in shared)


def test_the_logits_of_one_pass_only_are_in_memory(
    student: MakeStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def watched(logits: Logits, *args: Any, **more: Any) -> Any:
        sizes.append(logits.shape[0])
        return coarsen(logits, *args, **more)

    monkeypatch.setattr(teacher_cache, "coarsen", watched)
    coarse = DistillationConfig(top_k=3)
    job = student(recipe={"num_sequences_per_pass": 3}, distillation=coarse)
    sequences, output = teacher_outputs_by_step(job)(0)
    assert isinstance(output, CoarseDistribution)
    assert max(sizes) == 3
    assert sum(sizes) == len(sequences) == len(output.ids)


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


def test_live_and_hidden_states_store_nothing(student: MakeStudent, tmp_path: Path) -> None:
    jobs, notes = [student("a"), student("b")], Notes()
    live = DistillationSettings(teacher_cache="live")
    assert store_teacher_outputs(jobs, live, tmp_path / "t", progress=notes) == jobs
    assert notes.notes == []
    jobs = [
        j.model_copy(update={"distillation": DistillationConfig(hidden_weight=0.5)}) for j in jobs
    ]
    auto = DistillationSettings(hidden_weight=0.5)
    assert store_teacher_outputs(jobs, auto, tmp_path / "t", progress=notes) == jobs
    assert "hidden_weight" in notes.notes[0]
