"""A profile holds the steps that were asked for and changes nothing about the run."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.models.folder import weights_key
from orchestrator.records.training import TrainingJob
from orchestrator.training.job import job_key
from orchestrator.training.monitor import STEPS_BEFORE, StepProfiler
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import read_journal

RECIPE = {"num_steps": 8, "learning_rate": 1e-2, "checkpoint_every_steps": 2}

MakeJob = Callable[..., TrainingJob]


def texts(job: TrainingJob, name: str) -> list[str]:
    return [r["text"] for r in read_journal(job.folder)[0] if r.get("name") == name]


def names_in_trace(folder: Path) -> list[str]:
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


@pytest.mark.slow
def test_a_profile_holds_its_steps_and_changes_no_result(tiny_job: MakeJob) -> None:
    plain, profiled = tiny_job("plain", **RECIPE), tiny_job("p", **RECIPE, profile_steps=2)
    assert job_key(plain) == job_key(profiled)
    keys = [weights_key(Path(str(run_job(job).checkpoint))) for job in (plain, profiled)]
    assert keys[0] == keys[1]
    folder = profiled.folder / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["memory.txt", "trace.json.gz"]
    names = names_in_trace(folder)
    steps = {name for name in names if name.startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{STEPS_BEFORE}", f"ProfilerStep#{STEPS_BEFORE + 1}"}
    assert any("Optimizer.step" in name for name in names)
    assert "aten::" in (folder / "memory.txt").read_text()
    assert texts(profiled, "profiled") == ["profile of 2 steps"]
    assert not (plain.folder / "profile").exists()


@pytest.mark.slow
def test_a_run_that_ends_early_leaves_a_shorter_profile_or_none(tiny_job: MakeJob) -> None:
    job = tiny_job("run", **RECIPE, profile_steps=100)
    calls = iter([False, False, True])
    run_job(job, should_stop=lambda: next(calls))
    assert not (job.folder / "profile").exists()
    assert texts(job, "not profiled") == [
        "no profile: it begins after 3 steps, and the run ended before"
    ]
    run_job(job)
    assert texts(job, "profiled") == ["profile of 3 steps"]


def test_on_a_gpu_the_memory_of_the_same_steps_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        torch.cuda.memory,
        "_record_memory_history",
        lambda enabled="all", **_: calls.append((profiler._num_done, enabled)),
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot")
    )
    profiler = StepProfiler(tmp_path, 2, "cuda:0", lambda *_, **__: None)
    for _ in range(STEPS_BEFORE + 4):
        torch.ones(2).sum()
        profiler.end_step()
    profiler.close()
    assert calls == [(STEPS_BEFORE, "all"), (STEPS_BEFORE + 2, None)]
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == [
        "memory.pickle",
        "trace.json.gz",
    ]
