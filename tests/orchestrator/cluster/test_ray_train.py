"""Ray Train runs the same jobs with the same results, whatever happens to its workers."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings
from orchestrator.training.checkpoint import CheckpointWriteFailed
from orchestrator.training.trainer import Diverged, run_job
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import SCRATCH_NAME
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import checkpoint_name, find_checkpoints

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
    stores = set(
        Path(tempfile.gettempdir()).glob(f".{SCRATCH_NAME}.*/store")
    )  # Others may have theirs.
    (shared,) = run_train_jobs(
        [make_job("shared", num_sequences_per_pass=1)],
        ClusterSettings(num_workers=2, parallel="fsdp"),
        watch=listeners.watch,
    )
    assert listeners.are_local(), listeners.found
    found = set(Path(tempfile.gettempdir()).glob(f".{SCRATCH_NAME}.*/store"))
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


def kill_first_worker(
    job: TrainingJob, times: int, *, after_checkpoint: bool
) -> Callable[[], None]:
    """Return a watch that kills the job's first worker after each of its starts, `times` times.

    With `after_checkpoint`, it does so once the worker has written a checkpoint.
    """
    killed: list[int] = []

    def watch() -> None:
        starts = [*events(job, "started"), *events(job, "resumed")]
        if len(starts) > len(killed) < times:
            start = starts[len(killed)]
            saved = find_checkpoints(job.folder)
            if not after_checkpoint or (saved and str(saved[-1]) != start.get("path")):
                killed.append(start["pid"])
                os.kill(killed[-1], signal.SIGKILL)

    return watch


LONG = {"num_steps": 200, "checkpoint_every_steps": 20, "validate_every_steps": 200}


@pytest.mark.slow
def test_two_workers_one_of_them_killed_go_on_from_their_newest_checkpoint_bit_for_bit(
    ray_session: None, make_job: MakeJob
) -> None:
    from orchestrator.cluster.ray_train import run_train_jobs

    killed, whole = make_job("killed", **LONG), make_job("whole", **LONG)
    outcomes = run_train_jobs(
        [killed, whole],
        ClusterSettings(num_workers=2, max_failures=1),
        watch=kill_first_worker(killed, 2, after_checkpoint=True),
    )
    first, second = events(killed, "resumed")
    assert 20 <= first["step"] < second["step"], "a new checkpoint renews the number of failures"
    assert first["num_workers"] == 2
    assert not events(whole, "resumed")
    assert metric(killed) == metric(whole)
    assert outcomes[0].validation_loss == outcomes[1].validation_loss
    assert [outcome.finished for outcome in outcomes] == [True, True]
    folders = [Path(outcome.checkpoint or "").parent for outcome in outcomes]
    assert folders == [killed.folder, whole.folder], "in the order of the jobs"


@pytest.mark.parametrize(
    ("failures", "num_starts"),
    [
        ("fail fail fail", 2),
        ("fail save fail save fail fail fail", 4),  # A new checkpoint renews the number.
        ("fail lost lost lost fail", 5),  # A loss that was announced is no failure.
        ("mistake", 1),
        ("stop fail", 1),
    ],
)
def test_when_a_job_is_started_again(failures: str, num_starts: int, tmp_path: Path) -> None:
    from ray.exceptions import RayActorError

    from orchestrator.cluster.ray_train import FailureLimit

    words = failures.split()
    limit = FailureLimit(tmp_path, lambda: words[0] == "stop", max_failures=1)
    lost: Any = RuntimeError("a worker died")
    lost.health_check_failure = RayActorError(preempted=True)
    errors = {"fail": OSError("no"), "mistake": UserError("type x"), "lost": lost}
    starts = 1
    for number, word in enumerate(words):
        if word == "save":
            (tmp_path / checkpoint_name(number)).mkdir()
        elif word in errors:
            try:
                limit.after_exception(None, {1: errors[word]})
            except (OSError, UserError):
                break
            starts += 1
    assert starts == num_starts


@pytest.mark.slow
def test_a_worker_that_dies_too_often_fails_the_stage(ray_session: None, make_job: MakeJob) -> None:
    from orchestrator.cluster.ray_train import run_train_jobs

    job = make_job("killed", num_steps=100_000, checkpoint_every_steps=100_000)
    kill = kill_first_worker(job, 9, after_checkpoint=False)
    with pytest.raises(RunFailed, match=rf"{job.folder} failed: .*died"):
        run_train_jobs([job], ClusterSettings(max_failures=1), watch=kill)
    assert len(events(job, "started")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        ("error", UserError, "^a mistake$"),
        # With NCCL, the end of a group may wait for ever for a worker that has failed.
        ("error, and the group never ends", UserError, "^a mistake$"),
        ("silence", RunFailed, "failed: .*([Tt]imed out|timeout)"),
    ],
)
def test_a_worker_that_fails_alone_ends_the_job_within_a_minute(
    fault: str, error: type[Exception], sentence: str,
    ray_session: None, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from orchestrator.cluster import ray_train

    train = ray_train._train_worker

    def train_with_fault(config: dict[str, Any]) -> Any:
        import ray.train
        import torch

        def wait(*_: Any, **__: Any) -> None:
            time.sleep(1000)

        def fail(*_: Any, **__: Any) -> None:
            raise UserError("a mistake")

        if ray.train.get_context().get_world_rank() == 1:
            torch.autograd.backward = wait if fault == "silence" else fail
        elif fault.endswith("never ends"):
            torch.distributed.destroy_process_group = wait
        return train(config)

    job, begun = make_job("failing"), []

    def watch() -> None:
        if not begun and events(job, "started"):
            begun.append(time.monotonic())

    monkeypatch.setattr(ray_train, "_train_worker", train_with_fault)
    retries = 0 if fault == "silence" else 5
    cluster = ClusterSettings(num_workers=2, max_failures=retries, collective_timeout_seconds=10)
    with pytest.raises(error, match=sentence):
        ray_train.run_train_jobs([job], cluster, watch=watch)
    assert time.monotonic() - begun[0] < 60
    assert len(events(job, "started")) == 1, "trying again cannot help"


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
