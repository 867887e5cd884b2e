"""SIGTERM while checkpoints are written slowly: the wait follows from their bytes, and the run
resumes from the step that it was stopped at."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.planning import estimate
from orchestrator.records.training import TrainingJob
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import Interrupted
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints


def with_slow_writer(
    train_worker: Callable[[dict[str, Any]], dict[str, Any]], gate: Path
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a worker function whose checkpoints are written once a file exists."""

    def worker(config: dict[str, Any]) -> dict[str, Any]:
        import time

        from orchestrator.training import checkpoint

        save = checkpoint.save_checkpoint

        def save_slowly(*args: Any, **named: Any) -> Any:
            while not gate.exists():
                time.sleep(0.01)
            return save(*args, **named)

        checkpoint.save_checkpoint = save_slowly
        return train_worker(config)

    return worker


@pytest.mark.slow
def test_sigterm_waits_for_a_slow_writer(
    ray_session: None,
    tmp_path: Path,
    tiny_job: Callable[..., TrainingJob],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from orchestrator.cluster import ray_train

    job = tiny_job(num_steps=100_000, checkpoint_every_steps=100_000)
    gate = tmp_path / "gate"
    slow = with_slow_writer(ray_train._train_worker, gate)
    monkeypatch.setattr(ray_train, "_train_worker", slow)
    # The driver looks at its workers more often than that before the checkpoint is written.
    monkeypatch.setattr(estimate, "LEAST_SECONDS", 0.5)
    monkeypatch.setattr(estimate, "WRITE_BYTES_PER_SECOND", 1000.0)  # 100 kB
    notes: list[str] = []
    looks: list[int] = []

    def watch() -> None:
        steps = [r["step"] for r in read_journal(job.folder)[0] if r["kind"] == "metrics"]
        if looks:
            looks.append(len(looks))
            if len(looks) == 10:
                gate.touch()
        elif steps:
            looks.append(0)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        ray_train.run_train_jobs([job], watch=watch, note=notes.append)
    [checkpoint] = find_checkpoints(job.folder)
    step = int(checkpoint.name.removeprefix("step_"))
    assert str(caught.value).startswith(f"interrupted; saved at step {step};")
    assert notes[0].startswith("saving 1")
    run_job(job, should_stop=lambda: True)
    [resumed] = [r for r in read_journal(job.folder)[0] if r.get("name") == "resumed"]
    assert resumed["step"] == step
