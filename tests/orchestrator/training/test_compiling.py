"""Compiled fields: the losses of plain ones, and one graph for all schedules."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import UserError
from orchestrator.journal import read_journal
from orchestrator.settings import TrainingSettings
from orchestrator.training.job import TrainingJob, job_key
from orchestrator.training.run import run_job


@pytest.fixture
def jobs(tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]) -> list[TrainingJob]:
    """The same run plain and compiled: one step without corrections, then a ramp to all."""
    recipe = {
        "num_steps": 6,
        "num_tokens_per_step": 64,
        "num_validation_tokens": 64,
        "learning_rate": 1e-2,
        "iterate_from_fraction": 0.2,
        "iterate_ramp_fraction": 0.5,
    }
    return [
        TrainingJob(
            run_folder=str(tmp_path / f"compile-{compiled}"),
            tokens_folder=str(tiny_tokens),
            model={**tiny_model, "schedule": [2, 1]},
            recipe=TrainingSettings(**recipe, compile=compiled),
        )
        for compiled in (False, True)
    ]


def losses(job: TrainingJob) -> list[float]:
    values = [record.get("values", {}) for record in read_journal(job.folder)[0]]
    return [v[name] for v in values for name in ("train/loss", "validation/loss") if name in v]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # The compiler warns of itself.
def test_compiled_fields_have_the_losses_of_plain_ones(jobs: list[TrainingJob]) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for job in jobs:
        run_job(job)
    assert losses(jobs[1]) == pytest.approx(losses(jobs[0]), abs=1e-5)
    # Of training and of validation; each serves every layer, evaluation and schedule.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_without_a_compiler_a_run_does_not_start(
    jobs: list[TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job_key(jobs[0]) == job_key(jobs[1])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "")
    with pytest.raises(UserError, match=r"training.compile=true needs a C\+\+ compiler"):
        run_job(jobs[1])
    assert not jobs[1].folder.exists()
