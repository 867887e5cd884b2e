"""Stored answers are complete or absent, and bitwise equal to those of the teacher."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from same_run import curve, state_of
from torch import Tensor

from iiet.batch import Batch
from iiet.config import DistillationConfig
from iiet.decoder import Decoder
from iiet.distillation import distillation_loss
from orchestrator.models.open import load_model
from orchestrator.planning.estimate import Estimate, price_of
from orchestrator.records.training import TrainingJob
from orchestrator.terminal.progress import Progress
from orchestrator.training import teacher_cache
from orchestrator.training.teacher_cache import (
    ANSWERS,
    CachedTeacher,
    CachePlan,
    answers_of,
    cache_plan,
    load_teacher,
    missing_caches,
    open_cache,
    store_answers,
    write_cache,
)
from orchestrator.training.trainer import run_job
from orchestrator.training.world import OnDevice, World, on_cpu
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.journal import read_journal

RECIPE: dict[str, Any] = {
    "num_steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "iterate_from_fraction": 0.0
}  # fmt: skip

MakeStudent = Callable[..., TrainingJob]


@pytest.fixture
def student(tiny_job, tiny_model, save_tiny, tmp_path) -> MakeStudent:
    """Make the job of a student of one teacher: its name, then changes of recipe and job."""
    teacher = str(save_tiny(tmp_path / "teacher"))

    def make(name: str = "student", recipe: dict[str, Any] | None = None, **more: Any):
        job = tiny_job(name, **{**RECIPE, **(recipe or {})})
        taught = {"objective": "distill", "teacher_folder": teacher, "initial_folder": teacher}
        model = {"model": {**tiny_model, "schedule": [1, 0]}}
        return TrainingJob(**{**dict(job), **model, **taught, **more})

    return make


def plan_of(job: TrainingJob) -> CachePlan:
    plan = cache_plan(job)
    assert plan
    return plan


def stored(job: TrainingJob, parent: Path) -> TrainingJob:
    store(parent, job)
    return job.model_copy(update={"teacher_cache": str(parent)})


def store(parent: Path, *jobs: TrainingJob, on_device: OnDevice = on_cpu) -> int:
    """Return the number of tokens that were read."""
    return store_answers(jobs, parent, on_device=on_device, progress=Progress())[0]


@pytest.mark.parametrize(
    ("recipe", "distillation"),
    [
        ({}, {}),
        ({"num_sequences_per_pass": 3}, {"temperature": 2.0}),
        ({"precision": "bf16"}, {}),
        ({}, {"divergence": "reverse", "start_step": 2, "end_step": 5}),
    ],
)
def test_a_run_with_stored_answers_is_bitwise_equal_to_one_with_a_live_teacher(
    student, tmp_path, monkeypatch, recipe, distillation
):
    more = {"distillation": DistillationConfig(**distillation)}
    live, reading = (student(name, recipe, **more) for name in ("live", "reading"))
    expected, reading = run_job(live), stored(reading, tmp_path / "t")
    monkeypatch.setattr(teacher_cache, "load_model", None)  # The teacher is not loaded.
    found = run_job(reading)
    assert len(curve(live)) == 6
    assert curve(reading) == curve(live)
    assert state_of(found) == state_of(expected)
    assert found.training_flops < expected.training_flops, "only a teacher that runs counts"
    started = [read_journal(job.folder)[0][0] for job in (live, reading)]
    assert ['"reads_teacher": true' in json.dumps(event) for event in started] == [False, True]
    shutil.rmtree(str(reading.teacher_cache))
    monkeypatch.undo()
    assert isinstance(load_teacher(reading, World()), Decoder)


def test_any_part_of_a_step_in_any_order_finds_its_answers(student, tmp_path):
    job = stored(student(), tmp_path / "t")
    cache, decoder = load_teacher(job, World()), load_model(Path(str(job.teacher_folder)))
    assert isinstance(cache, CachedTeacher)
    steps = [sequences for sequences, _ in answers_of(job)]
    for num_workers in (1, 2, 4):
        for share in steps[num_workers].flip(0).chunk(num_workers):
            with torch.no_grad():
                torch.testing.assert_close(cache(share), decoder(share))
    with pytest.raises(KeyError, match="no answer"):
        cache(torch.zeros(1, 16, dtype=torch.long))
    # Masked answers do not matter.
    tokens, config = steps[0], DistillationConfig()
    batch = Batch.of_text(tokens, tokens > tokens[:, :1])
    taught, _ = distillation_loss(decoder, decoder, batch, config=config)
    read, _ = distillation_loss(decoder, cache, batch, config=config)
    assert read.item() == pytest.approx(taught.item(), abs=1e-6)
    assert batch.teacher_mask is not None
    spoiled = cache(tokens).masked_fill(~batch.teacher_mask.unsqueeze(-1), math.nan)
    loss, _ = distillation_loss(decoder, lambda _: spoiled, batch, config=config)
    assert loss.item() == read.item()


def test_the_key_of_a_cache_depends_on_what_changes_the_answers(student, tiny_model):
    same = [
        student(),
        student(recipe={"learning_rate": 0.5}),
        student(model={**tiny_model, "schedule": [0, 0]}),
        student(distillation=DistillationConfig(kl_weight=2.0, temperature=3.0)),
    ]
    others = [
        student(recipe={"seed": 1}),
        student(recipe={"num_steps": 7}),
        student(recipe={"precision": "bf16"}),
        student(distillation=DistillationConfig(start_step=1)),
    ]
    assert len({plan_of(job).key for job in same}) == 1
    assert len({plan_of(job).key for job in (same[0], *others)}) == 5
    for without in (
        {"distillation": DistillationConfig(hidden_weight=0.1)},
        {"distillation": DistillationConfig(kl_weight=0.0)},
        {"objective": "cross_entropy", "teacher_folder": None},
    ):
        assert cache_plan(student(**without)) is None


def test_a_damaged_cache_is_written_again_and_never_read(student, tmp_path):
    job, devices = stored(student(), tmp_path / "t"), list[str]()
    plan = plan_of(job)
    folder = tmp_path / "t" / plan.key

    def on_device(work: Any, progress: Progress) -> None:
        devices.append("cpu")
        work("cpu", progress)

    again = partial(store, tmp_path / "t", job, student("b"), on_device=on_device)  # type: ignore[arg-type]
    again()
    assert devices == [], "an intact cache needs no device"
    good = (folder / ANSWERS).read_bytes()
    for bad in (good[:-4], good[:-4] + b"\0\1\2\3"):
        (folder / ANSWERS).write_bytes(bad)
        assert isinstance(load_teacher(job, World()), Decoder), "the teacher runs instead"
        again()
        assert (folder / ANSWERS).read_bytes() == good
    assert len(devices) == 2
    assert open_cache(folder.parent, plan)
    (folder / ANSWERS).unlink()
    assert open_cache(folder.parent, plan) is None


def test_all_students_of_a_teacher_read_one_file_that_is_planned_once(
    student, tmp_path, tiny_model
):
    jobs = [
        student("a"),
        student("plain", objective="cross_entropy", teacher_folder=None),
        student("b", model={**tiny_model, "schedule": [0, 0]}),
        student("hidden", distillation=DistillationConfig(hidden_weight=0.5)),
        student("other seed", recipe={"seed": 1}),
    ]
    num_tokens, size, folder = 6 * 64, plan_of(jobs[0]).num_bytes, tmp_path / "t"
    price = partial(price_of, list(map(Estimate.of, jobs)), tmp_path)
    assert price().num_teacher_tokens == 4 * num_tokens
    assert price(teachers=folder).num_teacher_tokens == 3 * num_tokens, "one is live"
    assert price(teachers=folder).disk["teacher outputs"] == 2 * size
    assert store(folder, *jobs) == 2 * num_tokens
    plans = list(map(cache_plan, jobs))
    assert [bool(plan) for plan in plans] == [True, False, True, False, True]
    assert plans[0] == plans[2] != plans[4]
    sizes = [path.stat().st_size for path in folder.glob(f"*/{ANSWERS}")]
    assert sizes == [size, size]
    assert store(folder, *jobs) == 0
    assert missing_caches(plans, folder) == []
    assert price(teachers=folder).num_teacher_tokens == num_tokens


def test_a_full_disk_leaves_nothing(student, tmp_path):
    job = student()
    plan = plan_of(job)

    def full_after_half(_: str) -> Iterator[tuple[Tensor, Tensor]]:
        yield from islice(answers_of(job), plan.num_steps // 2)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_cache(plan, tmp_path / "t", full_after_half)
    assert [path.name for path in (tmp_path / "t").iterdir()] == [f".{plan.key}.lock"]

    def full(work: Any, progress: Progress) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunFailed, match=r"No space left .* set distillation\.teacher_cache=false"):
        store(tmp_path / "t", job, on_device=full)  # type: ignore[arg-type]


def test_the_logits_of_one_pass_only_are_computed_at_once(student, monkeypatch):
    sizes: list[int] = []
    forward = Decoder.forward

    def watched(self: Decoder, input_ids: Any, **more: Any) -> Any:
        sizes.append(len(input_ids))
        return forward(self, input_ids, **more)

    monkeypatch.setattr(Decoder, "forward", watched)
    sequences, logits = next(answers_of(student(recipe={"num_sequences_per_pass": 3})))
    assert max(sizes) == 3
    assert sum(sizes) == len(sequences) == len(logits)
