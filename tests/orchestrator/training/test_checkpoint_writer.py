"""Checkpoints written in the background are complete or absent, whatever happens meanwhile."""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.models.folder import check_checkpoint
from orchestrator.records.training import TrainingJob
from orchestrator.training import checkpoint as writer_module
from orchestrator.training import trainer as run_module
from orchestrator.training.checkpoint import best_checkpoint, load_training_state
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.journal import VALIDATION_METRIC, read_journal
from orchestrator.workspace.layout import find_checkpoints

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def make_job(tiny_job: MakeJob) -> MakeJob:
    def make(name: str = "run", **recipe: Any) -> TrainingJob:
        values = {
            "num_steps": 8,
            "num_tokens_per_step": 32,
            "num_validation_tokens": 32,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "checkpoint_every_steps": 2,
        }
        return tiny_job(name, **{**values, **recipe})

    return make


def losses(job: TrainingJob) -> dict[int, float]:
    values = {r["step"]: r["values"] for r in read_journal(job.folder)[0] if "values" in r
              and "train/loss" in r["values"]}  # fmt: skip
    return {step: found["train/loss"] for step, found in values.items()}


def names(job: TrainingJob) -> list[str]:
    return [folder.name for folder in find_checkpoints(job.folder)]


def test_training_continues_while_a_checkpoint_is_written(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(make_job("plain"))
    write, may_write = writer_module.save_checkpoint, threading.Event()
    steps: list[int] = []

    def slow(folder: Path, step: int, **parts: Any) -> Path:
        assert threading.current_thread() is not threading.main_thread()
        assert may_write.wait(60)
        return write(folder, step, **parts)

    def report(step: int, numbers: Any) -> None:
        if "train/loss" in numbers:
            steps.append(step)
        if step == 4:  # The checkpoint of step 2 is delayed until here; the next one waits.
            assert names(job) == []
            may_write.set()

    monkeypatch.setattr(writer_module, "save_checkpoint", slow)
    job = make_job("slow")
    run_job(job, report=report)
    assert steps == list(range(1, 9))
    for name in names(job):
        check_checkpoint(job.folder / name)
        for file in ("model.safetensors", "training_state.pt"):
            plain, delayed = (load(make_job(run).folder / name / file) for run in ("plain", "slow"))
            assert plain == delayed, "a checkpoint must hold the state of its own step"


def load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return path.read_bytes()
    state = load_training_state(path.parent)["optimizer"]["state"]
    return {key: [t.tolist() for t in moments.values()] for key, moments in state.items()}


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Limit the size of files, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_with_a_message_and_keeps_earlier_checkpoints(
    make_job: MakeJob,
) -> None:
    run_job(make_job("whole"))
    job = make_job()
    run_job(job, should_stop=iter([False] * 3 + [True]).__next__)
    assert names(job) == ["step_00000002", "step_00000003"]
    with largest_file(20_000), pytest.raises(RunFailed) as caught:
        run_job(job)
    text = str(caught.value)
    assert f"after step 4 could not be written to {job.folder}" in text
    assert "free disk space" in text
    assert text.endswith(str(job.folder / "step_00000003"))
    assert names(job) == ["step_00000002", "step_00000003"]
    assert not list(job.folder.glob(".*.iiet-temporary"))
    run_job(job)
    assert losses(job) == losses(make_job("whole"))


def test_a_checkpoint_is_also_written_after_some_minutes(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    seldom = {"checkpoint_every_steps": 100, "num_checkpoints_kept": 9}
    clock = iter(range(0, 10**6, 45))  # Seconds; read before each step and when saving.
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: float(next(clock)))
    run_job(make_job("timed", checkpoint_every_minutes=1.5, **seldom))
    assert names(make_job("timed")) == [f"step_{n:08d}" for n in (1, 3, 5, 7, 8)]


def test_the_best_checkpoint_is_kept_in_addition_to_the_newest(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = {2: math.nan, 4: 1.0, 6: 2.0, 8: 1.5}  # NaN: there was no target.
    monkeypatch.setattr(
        run_module.Trainer,
        "validate",
        lambda self: {VALIDATION_METRIC: validation[self.position.step]},
    )
    recipe = {"validate_every_steps": 2, "num_checkpoints_kept": 1, "keep_best": True}
    job = make_job(**recipe)
    run_job(job, should_stop=iter([False] * 5 + [True]).__next__)
    run_job(job)
    assert names(job) == ["step_00000004", "step_00000008"]
    best = best_checkpoint(job.folder)
    assert best == job.folder / "step_00000004"
    check_checkpoint(best)
    assert json.loads((job.folder / "best.json").read_text())["validation_loss"] == 1.0
    for name in ("../teacher", ".", None):
        (job.folder / "best.json").write_text(json.dumps({"checkpoint": name}))
        assert best_checkpoint(job.folder) is None
    plain = make_job("plain", **{**recipe, "keep_best": False})
    run_job(plain)
    assert names(plain) == ["step_00000008"]
    assert best_checkpoint(plain.folder) is None


KILLED = """
import json, pathlib, sys, time
from orchestrator.records.training import TrainingJob
from orchestrator.training.trainer import run_job
from orchestrator.workspace import files

flush = files.flush_to_disk

def hang(path):
    if "step_00000004" in str(path):
        pathlib.Path(sys.argv[2]).touch()
        time.sleep(600)
    flush(path)

files.flush_to_disk = hang
run_job(TrainingJob.model_validate(json.loads(pathlib.Path(sys.argv[1]).read_text())))
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_write_leaves_a_folder_that_the_next_start_removes(
    make_job: MakeJob, tmp_path: Path
) -> None:
    job, marker = make_job(), tmp_path / "writing"
    (tmp_path / "job.json").write_text(json.dumps(job.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "job.json"), str(marker)]
    )
    try:
        while not marker.exists():
            assert process.poll() is None
            signal.sigtimedwait([], 0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(job) == ["step_00000002"]
    assert len(list(job.folder.glob(".step_00000004.*.iiet-temporary"))) == 1
    run_job(job)
    assert not list(job.folder.glob(".*.iiet-temporary"))
    run_job(make_job("whole"))
    assert losses(job) == losses(make_job("whole"))
    resumed = [r for r in read_journal(job.folder)[0] if r.get("name") == "resumed"]
    assert [r["step"] for r in resumed] == [2]
