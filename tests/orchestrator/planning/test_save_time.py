"""How long a driver waits for its jobs to save follows from their bytes and their own journals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.planning.save_time import LEAST_SECONDS, WRITE_BYTES_PER_SECOND, seconds_to_save
from orchestrator.records.training import TrainingJob
from orchestrator.training.run import run_job
from orchestrator.workspace.journal import Journal, read_journal
from orchestrator.workspace.layout import DONE_NAME

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def large(tiny_job: MakeJob) -> TrainingJob:
    """A job of 340 million parameters: 4 GB for each checkpoint."""
    job = tiny_job("large", num_steps=100, num_tokens_per_step=2**19, num_validation_tokens=2**18)
    model = {
        **job.model.to_dict(), "vocab_size": 32_000, "dim": 1024, "num_layers": 24, "num_heads": 8,
        "num_kv_heads": 8, "ffn_dim": 2752, "schedule": [0] * 24,
    }  # fmt: skip
    return TrainingJob.model_validate({**job.model_dump(), "model": model})


def test_a_large_model_gets_more_time_than_a_small_one(
    large: TrainingJob, tiny_job: MakeJob
) -> None:
    notes: list[str] = []
    assert seconds_to_save([tiny_job()], notes.append) < LEAST_SECONDS + 0.1
    seconds = seconds_to_save([large], notes.append)
    assert seconds > LEAST_SECONDS + 2 * 4e9 / WRITE_BYTES_PER_SECOND, "one more may be written"
    assert notes[-1] == "saving 3.76 GiB, at most 31 s"
    assert seconds_to_save([large, large]) == pytest.approx(2 * seconds - LEAST_SECONDS)
    (large.folder / DONE_NAME).parent.mkdir()
    (large.folder / DONE_NAME).touch()
    assert seconds_to_save([large], notes.append) == LEAST_SECONDS
    assert len(notes) == 2, "nothing is saved"


def test_what_the_run_has_measured_counts(large: TrainingJob) -> None:
    stored = large.model_copy(update={"storage": "s3://bucket"})
    assert seconds_to_save([stored]) > 3 * seconds_to_save([large]), "an upload is slower"
    journal = Journal(large.folder)
    journal.event("checkpoint", step=10, path="step_00000010", seconds=90.5)
    journal.event("uploaded", step=10, seconds=100.25)
    journal.metrics(11, {"train/tokens_per_second": 2.0**17})
    journal.close()
    assert seconds_to_save([large]) == LEAST_SECONDS + 2 * 90.5 + 4 + 2
    assert seconds_to_save([stored]) == LEAST_SECONDS + 2 * (90.5 + 100.25) + 4 + 2


def test_a_run_measures_its_checkpoints_and_their_uploads(
    tiny_job: MakeJob, tmp_path: Path
) -> None:
    job = tiny_job(num_steps=4, checkpoint_every_steps=2)
    job = job.model_copy(update={"storage": str(tmp_path / "store")})
    run_job(job)
    for name in ("checkpoint", "uploaded"):
        saved = [r["seconds"] for r in read_journal(job.folder)[0] if r.get("name") == name]
        assert len(saved) == 2
        assert min(saved) > 0.0
