"""Ray Train runs the same jobs with the same results, whatever happens to its workers."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.planning.fit import check_trainings
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings
from orchestrator.training.checkpoint_writer import CheckpointWriteFailed
from orchestrator.training.loop import Diverged
from orchestrator.training.run import run_job
from orchestrator.workspace.checkpoint_names import find_checkpoints
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.scratch import PREFIX

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def make_job(tiny_job: MakeJob) -> MakeJob:
    def make(name: str, **recipe: Any) -> TrainingJob:
        values = {
            "num_steps": 12,
            "num_tokens_per_step": 64,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "validate_every_steps": 6,
            "num_validation_tokens": 320,
            "checkpoint_every_steps": 6,
            "iterate_from_fraction": 0.5,
        }
        return tiny_job(name, **{**values, **recipe})

    return make


def metric(job: TrainingJob, name: str = "train/loss") -> list[float]:
    values = {
        record["step"]: record["values"][name]
        for record in read_journal(job.folder)[0]
        if name in record.get("values", {})
    }
    return [values[step] for step in sorted(values)]


def events(job: TrainingJob, name: str) -> list[dict[str, Any]]:
    return [r for r in read_journal(job.folder)[0] if r.get("name") == name]


class Listeners:
    """Watches the addresses that this process and its children listen on."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.found: set[str] = set()
        self.workers: set[int] = set()
        """Processes of the job that were looked at while it trained."""

    def watch(self) -> None:
        trains = {record["pid"] for record in events(self.job, "started")}
        if self.workers or not trains:
            return  # One look while it trains is enough.
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                connections = process.net_connections(kind="inet")
            except psutil.NoSuchProcess:
                continue
            self.found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
            self.workers |= trains & {process.pid}

    def are_local(self) -> bool:
        assert self.workers, "nobody looked while it trained"
        return self.found <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.slow
def test_two_workers_train_on_the_same_global_batch(ray_session: None, make_job: MakeJob) -> None:
    from orchestrator.cluster.ray_train import run_train_jobs

    alone = run_job(make_job("alone"))
    listeners = Listeners(make_job("shared"))
    stores = set(Path(tempfile.gettempdir()).glob(f"{PREFIX}*/store"))  # Others may have theirs.
    (shared,) = run_train_jobs(
        [make_job("shared", num_sequences_per_pass=1)],
        ClusterSettings(num_workers=2, parallel="fsdp"),
        watch=listeners.watch,
    )
    assert listeners.are_local(), listeners.found
    found = set(Path(tempfile.gettempdir()).glob(f"{PREFIX}*/store"))
    assert found <= stores, "where they met is gone"
    assert metric(make_job("shared")) == pytest.approx(metric(make_job("alone")), abs=1e-5)
    assert shared.validation_loss == pytest.approx(alone.validation_loss, abs=1e-5)
    assert (shared.num_tokens, shared.training_flops) == (alone.num_tokens, alone.training_flops)
    (started,) = events(make_job("shared"), "started")
    assert (started["num_workers"], started["num_threads"]) == (2, 1)
    assert started["parallel"] == "fsdp"


def test_finished_jobs_start_nothing(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.cluster import ray_train as worker

    outcome = run_job(make_job("done"))
    monkeypatch.setattr(worker, "ray_cluster", None)
    assert worker.run_train_jobs([make_job("done")]) == [outcome]


def kill_worker_once(job: TrainingJob) -> Callable[[], None]:
    """Return a watch that kills the job's worker after its first checkpoint."""
    killed: list[int] = []

    def watch() -> None:
        if not killed and find_checkpoints(job.folder):
            killed.append(events(job, "started")[0]["pid"])
            os.kill(killed[0], signal.SIGKILL)

    return watch


LONG = {"num_steps": 200, "checkpoint_every_steps": 20, "validate_every_steps": 200}


@pytest.mark.slow
def test_two_workers_one_of_them_killed_go_on_from_their_newest_checkpoint_bit_for_bit(
    ray_session: None, make_job: MakeJob
) -> None:
    from orchestrator.cluster.ray_train import run_train_jobs

    killed, whole = make_job("killed", **LONG), make_job("whole", **LONG)
    outcomes = run_train_jobs(
        [killed, whole], ClusterSettings(num_workers=2), watch=kill_worker_once(killed)
    )
    (resumed,) = events(killed, "resumed")
    assert resumed["step"] >= 20
    assert resumed["num_workers"] == 2
    assert not events(whole, "resumed")
    assert metric(killed) == metric(whole)
    assert outcomes[0].validation_loss == outcomes[1].validation_loss
    assert [outcome.finished for outcome in outcomes] == [True, True]
    folders = [Path(outcome.checkpoint or "").parent for outcome in outcomes]
    assert folders == [killed.folder, whole.folder], "in the order of the jobs"


@pytest.mark.slow
def test_a_worker_that_dies_too_often_fails_the_stage(ray_session: None, make_job: MakeJob) -> None:
    from orchestrator.cluster.ray_train import run_train_jobs

    job = make_job("killed", **LONG)
    with pytest.raises(RunFailed, match=str(job.folder)):
        run_train_jobs([job], ClusterSettings(max_failures=0), watch=kill_worker_once(job))
    assert find_checkpoints(job.folder)


@pytest.mark.slow
def test_a_disk_that_is_full_at_ctrl_c_is_the_error_and_nothing_is_called_saved(
    ray_session: None, make_job: MakeJob
) -> None:

    from orchestrator.cluster.ray_train import run_train_jobs

    job = make_job("full", num_steps=4000, checkpoint_every_steps=4000)
    pressed: list[int] = []

    def watch() -> None:
        if not pressed and metric(job):
            pressed.append(events(job, "started")[0]["pid"])
            # The system refuses to write more into one file of the worker, as a full disk does.
            psutil.Process(pressed[0]).rlimit(psutil.RLIMIT_FSIZE, (15_000, 15_000))
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(CheckpointWriteFailed, match=r"run was stopping; nothing was saved$"):
        run_train_jobs([job], watch=watch)
    assert pressed
    assert not find_checkpoints(job.folder)


def test_after_a_stop_any_error_is_an_answer() -> None:
    from orchestrator.cluster.ray_train import final_answer

    error = OSError("no space left")
    with pytest.raises(OSError, match="no space left"):
        final_answer(error, is_stopping=False)
    expected = {"error": "RunFailed", "text": "OSError: no space left"}
    assert final_answer(error, is_stopping=True) == expected


def test_after_the_death_of_rays_controller_the_same_command_resumes(make_job: MakeJob) -> None:
    import ray.exceptions

    from orchestrator.cluster.ray_train import _failures_of

    job = make_job("run")
    run_job(job, should_stop=iter([False] * 6 + [True] * 9).__next__)
    with pytest.raises(RunFailed) as caught, _failures_of(job):
        raise ray.exceptions.ActorDiedError
    words = "saved at step 6; run the same command again to resume"
    assert str(caught.value).endswith(words)


@pytest.mark.slow
def test_what_trying_again_cannot_help_is_not_tried_again(
    ray_session: None, make_job: MakeJob
) -> None:
    from orchestrator.cluster.ray_train import run_train_jobs

    diverging, fine = make_job("diverging", learning_rate=1e30), make_job("fine")
    listeners = Listeners(fine)
    with pytest.raises(Diverged, match="diverged at step"):
        run_train_jobs([diverging, fine], ClusterSettings(max_failures=5), watch=listeners.watch)
    assert events(fine, "finished"), "one job's end must not take the others along"
    assert listeners.are_local(), listeners.found
    for job in (diverging, fine):
        (started,) = events(job, "started")
        assert started["num_threads"] == 1, "they run side by side"
        assert not (job.folder / "ray").exists()


@pytest.mark.parametrize(
    ("recipe", "options", "sentence"),
    [
        ({}, {"num_workers": 3}, "3 workers cannot share"),
        ({"num_tokens_per_step": 65}, {}, "multiple of the context length"),
    ],
)
def test_mistakes_are_found_before_ray_starts(
    make_job: MakeJob, recipe: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        check_trainings([make_job("x", **recipe)], ClusterSettings(**options))
    assert not make_job("x").folder.exists()


def test_a_folder_of_another_job_is_refused_before_ray_starts(make_job: MakeJob) -> None:
    run_job(make_job("taken"))
    with pytest.raises(UserError, match=r"recipe\.seed was 0, is 5"):
        check_trainings([make_job("taken", seed=5)], ClusterSettings())
