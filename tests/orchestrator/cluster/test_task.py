"""Jobs in this process: the losses of Ray Train, and Ctrl-C."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable

import pytest

from orchestrator.cluster import task
from orchestrator.cluster.task import run_local_jobs
from orchestrator.cluster.train import run_train_jobs
from orchestrator.models.folder import weights_key
from orchestrator.planning.machine import Node, Resources
from orchestrator.records.training import TrainingJob
from orchestrator.training.checkpoint import CheckpointWriteFailed
from orchestrator.workspace.errors import Interrupted
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints, step_of


@pytest.fixture
def job(tiny_job) -> TrainingJob:
    return tiny_job(
        num_steps=30, validate_every_steps=15, checkpoint_every_steps=10, iterate_from_fraction=0.5
    )


def journal_values(job: TrainingJob) -> list[tuple[int, str, float]]:
    """Return all that a journal says about losses, gradients and FLOPs."""
    return [
        (record["step"], name, value)
        for record in read_journal(job.folder)[0]
        for name, value in record.get("values", {}).items()
        if name in ("train/loss", "train/gradient_norm", "train/flops", "validation/loss")
    ]


def weights(job: TrainingJob) -> str:
    return weights_key(find_checkpoints(job.folder)[-1])


def at_step(job: TrainingJob, step: int, act: Callable[[], None]) -> Callable[[], None]:
    """Return a watch that acts once, when the journal has come to a step."""
    done: list[bool] = []

    def watch() -> None:
        steps = [r["step"] for r in read_journal(job.folder)[0] if r["kind"] == "metrics"]
        if steps and steps[-1] >= step and not done:
            done.append(True)
            act()

    return watch


@pytest.mark.long
def test_losses_and_weights_are_those_of_ray_to_the_last_bit(ray_session, job, monkeypatch):
    # As many threads as the one worker of the session's Ray.
    monkeypatch.setattr(task, "local_resources", lambda **_: Resources((Node(2),)))
    under_ray = job.model_copy(update={"run_folder": f"{job.run_folder}-ray"})
    (expected,) = run_train_jobs([under_ray])
    (outcome,) = run_local_jobs([job])
    assert journal_values(job) == journal_values(under_ray)
    assert weights(job) == weights(under_ray)
    assert outcome.validation_loss == expected.validation_loss


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_call_goes_on(job, monkeypatch):
    monkeypatch.setattr(task, "POLL_SECONDS", 0.0)
    before = signal.getsignal(signal.SIGINT)
    interrupt = at_step(job, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted) as caught:
        run_local_jobs([job], watch=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    stopped = find_checkpoints(job.folder)[-1]
    assert f"saved at step {step_of(stopped)}; " in str(caught.value)
    assert "00000007" <= stopped.name.removeprefix("step_") < "00000010"
    looks: list[int] = []
    (outcome,) = run_local_jobs([job], watch=lambda: looks.append(1))
    assert outcome.finished
    assert len(looks) > 10, "progress is shown between steps"

    uninterrupted = job.model_copy(update={"run_folder": f"{job.run_folder}-whole"})

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="nothing was saved"):
        run_local_jobs([uninterrupted], watch=at_step(uninterrupted, 3, twice))
    shutil.rmtree(uninterrupted.folder)
    run_local_jobs([uninterrupted])
    assert journal_values(job) == journal_values(uninterrupted)
    assert weights(job) == weights(uninterrupted)


@pytest.mark.parametrize(
    ("num_saved", "saved"), [(0, "nothing was saved"), (1, "saved at step [36]0")]
)
def test_after_ctrl_c_an_error_is_reported_with_what_was_saved_before_it(
    num_saved, saved, tiny_job, monkeypatch
):
    # The second checkpoint is so late that the first is seen before it, also on a busy machine.
    job = tiny_job(num_steps=90, validate_every_steps=90, checkpoint_every_steps=30)
    monkeypatch.setattr(task, "POLL_SECONDS", 0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def interrupt_and_refuse_to_save() -> None:
        if len(find_checkpoints(job.folder)) >= num_saved:
            # The system refuses to write more into one file, as a full disk does.
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
            os.kill(os.getpid(), signal.SIGINT)

    # The first checkpoint is written beside the steps after it.
    at_once = interrupt_and_refuse_to_save
    watch = at_once if num_saved else at_step(job, 3, at_once)
    try:
        with pytest.raises(CheckpointWriteFailed, match=f"{saved}$"):
            run_local_jobs([job], watch=watch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
