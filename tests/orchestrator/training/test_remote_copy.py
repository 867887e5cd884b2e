"""Remote copies of checkpoints are complete or absent, and their failure never stops training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.checkpoint import weights_key
from orchestrator.training.job import job_key
from orchestrator.training.run import run_job
from orchestrator.workspace.checkpoint_names import find_checkpoints
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.names import PROVENANCE

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


def stop_after(steps: int) -> Callable[[], bool]:
    calls = iter(range(10**6))
    return lambda: next(calls) == steps


def notes(job: TrainingJob, name: str) -> list[str]:
    return [r["text"] for r in read_journal(job.folder)[0] if r.get("name") == name]


def test_another_machine_resumes_from_the_copies(make_job: Make, tmp_path: Path) -> None:
    whole = run_job(make_job("whole"))
    uri = (tmp_path / "store").as_uri()
    run_job(make_job("lost", storage=uri), should_stop=stop_after(4))
    copies = [path.name for path in find_checkpoints(tmp_path / "store" / "run")]
    assert copies == ["step_00000002", "step_00000004"]
    outcome = run_job(make_job("new", storage=uri))
    steps = [r["step"] for r in read_journal(make_job("new").folder)[0] if r["kind"] == "metrics"]
    assert min(steps) == 5, "the run resumes after the newest copy"
    assert weights_key(Path(whole.checkpoint or "")) == weights_key(Path(outcome.checkpoint or ""))
    copies = [path.name for path in find_checkpoints(tmp_path / "store" / "run")]
    assert copies == ["step_00000004", "step_00000006"], "copies of pruned checkpoints are deleted"
    assert job_key(make_job("a", storage=uri)) == job_key(make_job("a"))


def test_an_incomplete_or_damaged_copy_is_skipped(make_job: Make, tmp_path: Path) -> None:
    uri, copies = str(tmp_path / "store"), tmp_path / "store" / "run"
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


def test_a_storage_that_refuses_does_not_stop_training(make_job: Make, tmp_path: Path) -> None:
    job = make_job("run", storage=str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "run").write_text("a file where the folder would be")
    with pytest.raises(RunFailed, match="does not answer"):
        run_job(job)
    (tmp_path / "store" / "run").unlink()

    def in_the_way(step: int, numbers: object) -> None:
        if step == 1:
            (tmp_path / "store" / "run").write_text("in the way")

    outcome = run_job(job, report=in_the_way)
    assert outcome.finished
    assert "training continues" in notes(job, "not copied")[0]


def test_an_unusable_uri_is_a_user_error(make_job: Make) -> None:
    with pytest.raises(UserError, match=r"cluster\.storage: 'nowhere://x' names no storage"):
        run_job(make_job("run", storage="nowhere://x"))
