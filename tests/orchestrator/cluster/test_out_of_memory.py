"""A worker that runs out of a GPU's memory ends its job at once, with the setting to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.cluster.local import run_local_jobs
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.settings import ClusterSettings, SweepSettings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import read_journal

MakeJob = Callable[..., TrainingJob]
PROPOSAL = r"ran out of memory on cpu \(no space\).* --set training\.num_sequences_per_pass="


def num_starts(job: TrainingJob) -> int:
    return sum(record.get("name") == "started" for record in read_journal(job.folder)[0])


def test_in_this_process(tiny_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no space")

    monkeypatch.setattr(torch.autograd, "backward", run_out)
    with pytest.raises(UserError, match=PROPOSAL):
        run_local_jobs([tiny_job(num_tokens_per_step=2**15)])


@pytest.mark.slow
def test_one_of_two_workers_takes_the_other_along_and_neither_is_started_again(
    ray_session: None, tiny_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.cluster import ray_train

    def train(config: dict[str, Any]) -> dict[str, Any]:
        import ray.train

        from orchestrator.cluster.ray_train import _train_worker

        def run_out(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("no space")

        if ray.train.get_context().get_world_rank() == 1:
            torch.autograd.backward = run_out  # The other worker waits for its gradients.
        return _train_worker(config)

    monkeypatch.setattr(ray_train, "_train_worker", train)
    job = tiny_job(num_tokens_per_step=2**15)
    with pytest.raises(UserError, match=PROPOSAL):
        ray_train.run_train_jobs([job], ClusterSettings(num_workers=2, max_failures=5))
    assert num_starts(job) == 1


@pytest.mark.slow
def test_a_trial_is_not_tried_again(ray_session: None, tiny_job: MakeJob, tmp_path: Path) -> None:
    from list_queue import ListQueue, run_queue

    def train(trial: Trial, place: Any) -> Trial | None:
        def run_out(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("no space")

        backward = torch.autograd.backward
        torch.autograd.backward = run_out
        try:
            assert trial.job
            place.train(trial.job)
        finally:
            torch.autograd.backward = backward  # Other trials use this process.
        return None

    job = tiny_job(num_tokens_per_step=2**15)
    trial = Trial(
        key="x", role="trial", model=job.model, folder=job.run_folder, job=job,
        suite=TrialSuite(tokens_folder=job.tokens_folder),
    )  # fmt: skip
    ended = run_queue(ListQueue([trial]), train, tmp_path, SweepSettings(max_failures_per_trial=5))
    assert "--set training.num_sequences_per_pass=" in ended["x"][1]
    assert num_starts(job) == 1
