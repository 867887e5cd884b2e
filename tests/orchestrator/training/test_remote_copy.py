"""Remote copies of checkpoints are complete or absent, and their failure never stops training."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from orchestrator.models.folder import weights_key
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.devices import World
from orchestrator.training.job import job_key
from orchestrator.training.remote_copy import RemoteCopy
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import PROVENANCE, find_checkpoints

RECIPE = {
    "num_steps": 6, "num_tokens_per_step": 64, "warmup_steps": 2, "num_validation_tokens": 64,
    "checkpoint_every_steps": 2, "num_checkpoints_kept": 2, "iterate_from_fraction": 0.0,
}  # fmt: skip
Make = Callable[..., TrainingJob]


@pytest.fixture
def make_job(tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]) -> Make:
    def make(machine: str, *, storage: str | None = None, **recipe: Any) -> TrainingJob:
        return TrainingJob(
            run_folder=str(tmp_path / machine / "run"),
            tokens_folder=str(tiny_tokens),
            model=tiny_model,
            recipe=TrainingSettings(**{**RECIPE, **recipe}),  # type: ignore[arg-type]
            storage=storage,
        )

    return make


def store_of(job: TrainingJob) -> Path:
    """Return the folder of a job's copies."""
    return job.folder.parents[1] / "store" / f"run-{job_key(job)}"


def stop_after(steps: int) -> Callable[[], bool]:
    calls = iter(range(10**6))
    return lambda: next(calls) == steps


def notes(job: TrainingJob, name: str) -> list[str]:
    return [r["text"] for r in read_journal(job.folder)[0] if r.get("name") == name]


def test_another_machine_resumes_from_the_copies(make_job: Make, tmp_path: Path) -> None:
    whole = run_job(make_job("whole"))
    uri = (tmp_path / "store").as_uri()
    run_job(make_job("lost", storage=uri), should_stop=stop_after(4))
    store = store_of(make_job("lost"))
    copies = [path.name for path in find_checkpoints(store)]
    assert copies == ["step_00000002", "step_00000004"]
    outcome = run_job(make_job("new", storage=uri))
    steps = [r["step"] for r in read_journal(make_job("new").folder)[0] if r["kind"] == "metrics"]
    assert min(steps) == 5, "the run resumes after the newest copy"
    assert weights_key(Path(whole.checkpoint or "")) == weights_key(Path(outcome.checkpoint or ""))
    copies = [path.name for path in find_checkpoints(store)]
    assert copies == ["step_00000004", "step_00000006"], "copies of pruned checkpoints are deleted"
    assert job_key(make_job("a", storage=uri)) == job_key(make_job("a"))


def test_an_incomplete_or_damaged_copy_is_skipped(make_job: Make, tmp_path: Path) -> None:
    uri, copies = str(tmp_path / "store"), store_of(make_job("lost"))
    run_job(make_job("lost", storage=uri))
    (copies / "step_00000006" / "model.safetensors").write_bytes(b"spoilt")
    half = copies / "step_00000008"
    shutil.copytree(copies / "step_00000004", half)
    (half / PROVENANCE).unlink()
    job = make_job("new", storage=uri)
    run_job(job)
    resumed = [r["step"] for r in read_journal(job.folder)[0] if r.get("name") == "resumed"]
    assert resumed == [4]
    assert "earlier copy" in notes(job, "damaged")[0]


def test_runs_of_one_name_share_a_storage_and_take_only_their_own_copies(
    make_job: Make, tmp_path: Path
) -> None:
    uri = str(tmp_path / "store")
    one, other = (make_job(f"seed {n}", storage=uri, seed=n) for n in (0, 1))
    run_job(one)
    before = sorted((tmp_path / "store").rglob("*"))
    run_job(other)
    assert not [r for r in read_journal(other.folder)[0] if r.get("name") == "resumed"]
    assert set(before) <= set((tmp_path / "store").rglob("*")), "nothing of the other is deleted"

    shutil.rmtree(store_of(other))
    store_of(one).rename(store_of(other))  # By hand.
    again = make_job("new", storage=uri, seed=1)
    run_job(again)
    assert not [r for r in read_journal(again.folder)[0] if r.get("name") == "resumed"]
    assert "belongs to another training" in notes(again, "damaged")[0]


def test_a_storage_that_refuses_does_not_stop_training(make_job: Make, tmp_path: Path) -> None:
    job = make_job("run", storage=str(tmp_path / "store"))
    store = store_of(job)
    store.parent.mkdir()
    store.write_text("a file where the folder would be")
    with pytest.raises(RunFailed, match="does not answer"):
        run_job(job)
    store.unlink()

    def in_the_way(step: int, numbers: object) -> None:
        if step == 1:
            store.write_text("in the way")

    outcome = run_job(job, report=in_the_way)
    assert outcome.finished
    assert "training continues" in notes(job, "not copied")[0]


def run_with_slow_storage(rank: int, folder: str, job: dict[str, Any]) -> None:
    """Run a job as one of two workers; started by `mp.spawn`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=5)  # Less than an upload takes.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=limit
    )
    upload = RemoteCopy.upload

    def upload_slowly(copy: RemoteCopy) -> None:
        time.sleep(8)
        upload(copy)

    RemoteCopy.upload = upload_slowly  # type: ignore[method-assign]
    run_job(TrainingJob.model_validate(job), world=World(rank=rank, size=2))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_uploads_may_take_longer_than_workers_wait_for_each_other(
    make_job: Make, tmp_path: Path
) -> None:
    job = make_job("slow", storage=str(tmp_path / "store"), num_steps=4)
    mp.spawn(run_with_slow_storage, (str(tmp_path), job.model_dump(mode="json")), nprocs=2)
    assert len(find_checkpoints(store_of(job))) == 2


def test_an_unusable_uri_is_a_user_error(make_job: Make) -> None:
    with pytest.raises(UserError, match=r"cluster\.storage: 'nowhere://x' names no storage"):
        run_job(make_job("run", storage="nowhere://x"))
