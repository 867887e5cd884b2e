"""Ray Train runs the same jobs with the same results, whatever happens to its workers."""

from __future__ import annotations

import itertools
import math
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended_cluster import LOOPBACK, listening_addresses
from pretended_ray import begin_workers_with, idle_ray, train_here
from refusals import assert_names, refused
from same_run import curve, events, state_of, steps_of, workers

from orchestrator.cluster import train
from orchestrator.cluster.placement import Placement
from orchestrator.cluster.task import run_local_jobs
from orchestrator.cluster.train import MAX_FAILED_STARTS, JobRun, run_train_jobs
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import checkpoint_name, find_checkpoints, step_of

RECIPE = {
    "num_steps": 12, "learning_rate": 1e-2, "warmup_steps": 2, "validate_every_steps": 6,
    "num_validation_tokens": 320, "checkpoint_every_steps": 6, "iterate_from_fraction": 0.5,
}  # fmt: skip


def test_finished_jobs_start_nothing(make_job, monkeypatch):
    outcome = run_job(make_job("done"))
    monkeypatch.setattr("ray.init", pytest.fail)
    monkeypatch.setattr("ray.nodes", pytest.fail)  # Asked where a Ray runs already.
    assert run_train_jobs([make_job("done")]) == [outcome]


@pytest.mark.long
def test_one_worker_trains_to_the_last_bit_what_is_trained_without_ray(
    ray_session, make_job, monkeypatch
):
    # As many threads as the one worker of the session's Ray.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    under_ray = make_job("under-ray")
    without_ray = make_job("without-ray")
    [expected] = run_local_jobs([without_ray])
    [outcome] = run_train_jobs([under_ray])
    assert curve(under_ray) == curve(without_ray)
    assert state_of(outcome) == state_of(expected)


@pytest.mark.slow
def test_two_workers_one_of_them_killed_go_on_from_their_newest_checkpoint_bit_for_bit(
    ray_session, tmp_path, make_job, monkeypatch
):
    long = {"num_steps": 18, "checkpoint_every_steps": 6, "validate_every_steps": 18}
    job, undisturbed = (
        make_job(name, num_sequences_per_pass=1, **long) for name in ("killed", "whole")
    )
    listening = dict[int, set[str]]()
    saved = tmp_path / "saved"
    looked = tmp_path / "looked"
    first_checkpoint = job.folder / checkpoint_name(6)

    def die_once_it_is_written() -> None:
        import ray.train

        def wait_for(path: Path) -> None:
            give_up = time.monotonic() + 60
            while not path.exists():
                assert time.monotonic() < give_up, f"there is no {path}"
                time.sleep(0.01)

        step = torch.optim.AdamW.step
        steps = itertools.count(1)

        def step_or_die(*arguments: Any, **named: Any) -> Any:
            # The first update of all tries the largest step, and changes nothing.
            if next(steps) == 8 and not saved.exists():
                wait_for(first_checkpoint)
                saved.write_text(str(os.getpid()))
                wait_for(looked)
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **named)

        if ray.train.get_context().get_world_rank() == 0:
            torch.optim.AdamW.step = step_or_die

    def watch() -> None:
        if saved.exists() and not looked.exists():
            listening.update(listening_addresses())
            looked.touch()

    begin_workers_with(monkeypatch, die_once_it_is_written)
    cluster = ClusterSettings(num_workers=2, parallel="fsdp", max_failures=1)
    (outcome,) = run_train_jobs([job], cluster, watch=watch)
    assert int(saved.read_text()) in listening
    assert set().union(*listening.values()) <= LOOPBACK
    assert not (job.folder / "ray").exists(), "where they met is gone"
    [started] = events(job, "started")
    [resumed] = events(job, "resumed")
    assert (started["num_workers"], started["num_threads"]) == (2, 1)
    assert (started["parallel"], resumed["num_workers"]) == ("fsdp", 2)
    assert resumed["step"] == 6
    assert outcome.finished
    workers(2, "fsdp")(undisturbed)  # Without Ray.
    assert curve(job) == curve(undisturbed)
    assert state_of(outcome) == state_of(run_job(undisturbed))


@pytest.fixture
def attempts(monkeypatch) -> Callable[[Callable[[], None]], None]:
    """A function that sets what an attempt of Ray Train does; its workers find a place at once."""

    def install(fit: Callable[[], None]) -> None:
        idle_ray(monkeypatch)
        train_here(monkeypatch, lambda _: fit())

    return install


@pytest.fixture
def first_worker_here(attempts, monkeypatch) -> Callable[..., None]:
    """A function that lets the first of `size` workers run in this process, without the others."""

    class TrainerOfTheFirst:
        def __init__(self, work: Callable[..., None], train_loop_config: Any, **_: Any) -> None:
            self.work = work
            self.config = train_loop_config

        def fit(self) -> None:
            self.work(self.config)

    def install(size: int) -> None:
        import ray.train.torch

        ranks = {"rank": 0, "size": size}
        context = {f"get_world_{name}": lambda value=value: value for name, value in ranks.items()}
        context["get_local_world_size"] = lambda: size
        attempts(pytest.fail)
        monkeypatch.setattr(ray.train.torch, "TorchTrainer", TrainerOfTheFirst)
        monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(**context))
        monkeypatch.setenv(train.WATCHER_SWITCH, "0")

    return install


NOT_STOPPED: Any = SimpleNamespace(is_sent=lambda: False)
"""In the place of a signal, which only a Ray that runs can send."""


@pytest.mark.parametrize(
    ("ends", "num_starts"),
    [
        ("fail fail fail", 2),
        ("fail save,fail save,fail fail fail", 4),  # A new checkpoint renews the number.
        ("fail lost lost notice fail", 5),  # A loss that was announced is no failure.
        ("mistake", 1),
        ("unplaced " * 9, 1 + MAX_FAILED_STARTS),
        ("unplaced run,unplaced " * 3 + "done", 7),
        ("controller", 1),
    ],
)
def test_when_a_job_is_started_again(ends, num_starts, make_job, attempts):
    import ray.exceptions
    import ray.train

    api: Any = ray.train
    job = make_job("run")
    starts = []
    lost: Any = RuntimeError("a worker died")
    lost.health_check_failure = ray.exceptions.RayActorError(preempted=True)
    failures = {"fail": OSError("no"), "mistake": UserError("type x"), "lost": lost}
    errors = {
        **{word: api.WorkerGroupError("", {1: error}) for word, error in failures.items()},
        "notice": api.PreemptionError(api.PreemptionInfo(None, {})),
        "unplaced": api.ControllerError(TimeoutError("no place")),
        "controller": ray.exceptions.ActorDiedError(),
    }

    def fit() -> None:
        starts.append(1)
        for word in ends.split()[len(starts) - 1].split(","):
            if word == "save":
                (job.folder / checkpoint_name(len(starts))).mkdir(parents=True)
            elif word == "run":
                start_and_lose(job)
            elif word != "done":
                raise errors[word]

    attempts(fit)
    placement = Placement(jobs_at_once=1, workers=1, cpus=1)
    pattern = {
        "mistake": "^type x$",
        "unplaced": "failed: the workers did not start: TimeoutError: no place$",
        "controller": "; not started yet; run the same command again to resume$",
    }.get(ends.split()[0], "run failed: OSError: no$")
    is_done = ends.endswith("done")
    expected = nullcontext() if is_done else pytest.raises((UserError, RunFailed), match=pattern)
    with expected:
        JobRun(job, placement, ClusterSettings(max_failures=1), NOT_STOPPED).fit()
    assert len(starts) == num_starts


def test_a_job_that_is_stopped_before_its_turn_asks_ray_for_nothing(
    make_job, attempts, monkeypatch
):
    stopped: Any = SimpleNamespace(is_sent=lambda: True)
    attempts(pytest.fail)
    # It would start a Ray if none runs.
    placement_group = sys.modules["ray.util.placement_group"]
    monkeypatch.setattr(placement_group, "placement_group", pytest.fail)
    placement = Placement(jobs_at_once=1, workers=1, cpus=1)
    JobRun(make_job("run"), placement, ClusterSettings(), stopped).fit()


def test_the_stacks_of_workers_that_hang_on_gpus_are_taken_in_time_and_kept(
    make_job, attempts, monkeypatch
):
    import ray.train
    from ray.train.v2._internal import constants

    api: Any = ray.train
    job = make_job("run")
    detector_variables = list[tuple[str | None, str | None]]()
    names = ("RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR", "RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S")
    assert names[0] == constants.ENABLE_NCCL_HANG_DETECTOR_ENV_VAR
    assert names[1] == constants.NCCL_RAS_CONFIRM_DURATION_S_ENV_VAR
    assert constants.HANG_DETECTOR_DIRNAME == train.HANG_FOLDER
    for name in names:
        monkeypatch.setenv(name, "0")  # So that what the job sets is taken back.
        monkeypatch.delenv(name)

    def hang() -> None:
        detector_variables.append((os.environ.get(names[0]), os.environ.get(names[1])))
        stacks = job.folder / "ray" / "train" / train.HANG_FOLDER / "stack_traces"
        stacks.mkdir(parents=True)
        (stacks / "rank_0.log").write_text(f"attempt {len(detector_variables)}")
        raise api.WorkerGroupError("", {0: RuntimeError("collective timed out")})

    attempts(hang)
    placement = Placement(jobs_at_once=1, workers=8, cpus=8, gpus=1.0)
    cluster = ClusterSettings(max_failures=1, collective_timeout_seconds=500)
    with pytest.raises(RunFailed, match="timed out"):
        JobRun(job, placement, cluster, NOT_STOPPED).fit()
    assert detector_variables == [("1", "250.0")] * 2
    assert not (job.folder / "ray").exists()
    stack_trace = job.folder / train.HANG_FOLDER / "stack_traces" / "rank_0.log"
    assert stack_trace.read_text() == "attempt 2"


def test_workers_meet_where_no_other_user_looks_and_wait_for_each_other_as_long_as_set(
    make_job, first_worker_here, monkeypatch
):
    import ray.train.collective

    job = make_job("run")
    met = list[dict[str, Any]]()

    def meet(backend: str, **named: Any) -> None:
        folder = Path(named["init_method"].removeprefix("file://")).parent
        met.append({"backend": backend, "mode": stat.S_IMODE(folder.stat().st_mode), **named})
        raise UserError("met")

    first_worker_here(size=2)
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda address: address)
    monkeypatch.setattr(torch.distributed, "init_process_group", meet)
    for variable in train.INTERFACE_VARIABLES:
        monkeypatch.setenv(variable, "lo")  # So that nothing stays set.
    placement = Placement(jobs_at_once=1, workers=2, cpus=1)
    cluster = ClusterSettings(num_workers=2, collective_timeout_seconds=77)
    with pytest.raises(UserError, match="met"):
        JobRun(job, placement, cluster, NOT_STOPPED).fit()
    [group] = met
    assert group["mode"] == 0o700, "who reads the file could join"
    assert group["timeout"].total_seconds() == 77
    assert (group["backend"], group["rank"], group["world_size"]) == ("gloo", 0, 2)


@pytest.mark.parametrize(
    ("has_begun", "minutes", "waited"),
    [
        (False, 1, train.FIRST_START_SECONDS),  # Somebody sits at the terminal.
        (True, 1, 60.0),
        (True, 0, 0.0),
        (True, None, math.inf),
    ],
)
def test_a_place_is_waited_for_as_long_as_the_setting_says(
    has_begun, minutes, waited, make_job, attempts, monkeypatch
):
    job = make_job("run")
    clock = [0.0]
    if has_begun:
        start_and_lose(job)

    def wait(seconds: float) -> bool:
        """Find a place after an hour."""
        clock[0] += seconds
        return clock[0] > 3600

    idle_ray(monkeypatch, wait=wait)
    train_here(monkeypatch, lambda _: None)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    placement = Placement(jobs_at_once=1, workers=2, cpus=1)
    cluster = ClusterSettings(node_wait_minutes=minutes)
    expected = (
        nullcontext() if waited == math.inf else pytest.raises(RunFailed, match="node_wait_minutes")
    )
    with expected:
        JobRun(job, placement, cluster, NOT_STOPPED).fit()
    longest = 3600 if waited == math.inf else waited
    assert longest <= clock[0] <= longest + 2 * train.PLACEMENT_SECONDS


def test_a_training_that_lacks_memory_is_a_mistake_of_its_settings(make_job, full_memory):
    with refused(UserError, "ran out of memory on cpu", "no space"):
        run_local_jobs([make_job("full")])


@pytest.mark.long
def test_a_worker_that_lacks_memory_ends_the_job_at_once(ray_session, make_job, monkeypatch):
    def have_no_memory() -> None:
        # A function of this module could not be sent to a worker.
        def without_memory(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("no space")

        torch.autograd.backward = without_memory

    job = make_job("failing")
    begin_workers_with(monkeypatch, have_no_memory)
    with refused(UserError, "ran out of memory on cpu", "no space"):
        run_train_jobs([job], ClusterSettings(num_workers=1, max_failures=5))
    assert len(events(job, "started")) == 1, "to try again cannot help"


@pytest.mark.long
def test_a_worker_that_falls_silent_ends_the_job(ray_session, make_job, monkeypatch):
    def fall_silent() -> None:
        import ray.train

        if ray.train.get_context().get_world_rank() == 1:
            # The other worker waits for its gradients, until a collective takes too long.
            torch.autograd.backward = lambda *_, **__: time.sleep(1000)

    job = make_job("failing", num_tokens_per_step=2**12)
    begin_workers_with(monkeypatch, fall_silent)
    cluster = ClusterSettings(num_workers=2, max_failures=0, collective_timeout_seconds=10)
    with pytest.raises(RunFailed, match=r"failed: .*([Tt]imed out|timeout)"):
        run_train_jobs([job], cluster)
    assert len(events(job, "started")) == 1


def test_a_worker_that_is_asked_to_stop_saves_and_returns(make_job, first_worker_here):
    job = make_job("asked")
    first_worker_here(size=1)
    asked_after_a_step: Any = SimpleNamespace(is_sent=lambda: bool(curve(job)))
    placement = Placement(jobs_at_once=1, workers=1, cpus=1)
    JobRun(job, placement, ClusterSettings(), asked_after_a_step).fit()
    assert steps_of(job) == [len(curve(job))]
    assert len(curve(job)) < job.recipe.num_steps


@pytest.mark.slow
def test_sigterm_waits_for_what_is_still_written(make_job, first_worker_here, monkeypatch):
    job = make_job("slow", num_steps=100_000, checkpoint_every_steps=100_000)
    may_write = threading.Event()
    save = torch.save  # Writes a part of each checkpoint.

    def save_late(*args: Any, **named: Any) -> None:
        assert may_write.wait(60)
        save(*args, **named)

    monkeypatch.setattr(torch, "save", save_late)
    first_worker_here(size=1)
    notes: list[str] = []
    num_looks = 0

    def watch() -> None:
        nonlocal num_looks
        num_looks += bool(notes)
        if num_looks == 3:
            may_write.set()
        elif curve(job) and not notes:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        run_train_jobs([job], watch=watch, note=notes.append)
    assert f"saved at step {steps_of(job)[-1]};" in str(caught.value)
    assert notes[0].startswith("saving 1")


@pytest.mark.long
def test_sigterm_under_ray_waits_for_a_slow_writer(ray_session, tmp_path, make_job, monkeypatch):
    gate = tmp_path / "gate"

    def write_slowly() -> None:
        save = torch.save

        def save_slowly(*args: Any, **named: Any) -> None:
            while not gate.exists():
                time.sleep(0.01)
            save(*args, **named)

        torch.save = save_slowly

    job = make_job("slow", num_steps=100_000, checkpoint_every_steps=100_000)
    begin_workers_with(monkeypatch, write_slowly)
    notes: list[str] = []
    looks: list[int] = []

    def watch() -> None:
        if looks:
            looks.append(len(looks))
            if len(looks) == 10:
                gate.touch()
        elif curve(job):
            looks.append(0)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        run_train_jobs([job], watch=watch, note=notes.append)
    [checkpoint] = find_checkpoints(job.folder)
    step = step_of(checkpoint)
    assert f"saved at step {step};" in str(caught.value)
    assert notes[0].startswith("saving 1")
    run_job(job, should_stop=lambda: True)
    [resumed] = events(job, "resumed")
    assert resumed["step"] == step


def start_and_lose(job: TrainingJob) -> None:
    """Write the journal of a job that started and whose node was then lost."""
    journal = Journal(job.folder)
    journal.event("started")
    journal.close()


@pytest.mark.slow
def test_a_job_without_a_place_says_so_is_not_waited_for_and_fails_in_time(
    ray_session, make_job, monkeypatch
):
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setattr(train, "PLACEMENT_SECONDS", 0.1)
    job = make_job("run")
    notes = list[str]()

    def press() -> None:
        if notes:
            os.kill(os.getpid(), signal.SIGINT)

    all_cpus = placement_group([{"CPU": 2}])
    try:
        assert all_cpus.wait(60)
        with pytest.raises(Interrupted, match="not started yet"):
            run_train_jobs([job], watch=press, note=notes.append)
        [note] = notes
        assert_names(note, "run", "0 of 2 CPUs")
        with monkeypatch.context() as patch:
            patch.setattr(train, "FIRST_START_SECONDS", 0.0)
            with pytest.raises(RunFailed, match=r"for 0 s \(0 of 2 CPUs"):
                run_train_jobs([job])
        start_and_lose(job)  # One that has run before waits as long as the setting says.
        with pytest.raises(RunFailed, match=r"for 0 s \(0 of 2 CPUs"):
            run_train_jobs([job], ClusterSettings(node_wait_minutes=0))
    finally:
        remove_placement_group(all_cpus)
