"""Two processes with one job: one trains and the other waits, and takes over if the first dies."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from commands import Started
from same_run import events, in_folder

from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.training.job import finished_outcome
from orchestrator.training.run_locks import jobs_to_train
from orchestrator.training.trainer import run_job
from orchestrator.workspace.layout import find_checkpoints

# With the argument `hold`, the program pauses after its first checkpoint until its standard input
# is closed.
DRIVER = """
import json, sys
from orchestrator.cluster import task
from orchestrator.planning.machine import Node, Resources
from orchestrator.records.training import TrainingJob
from orchestrator.workspace.errors import Interrupted
from orchestrator.workspace.layout import find_checkpoints

jobs = [TrainingJob.model_validate(value) for value in json.loads(sys.argv[1])]
task.POLL_SECONDS = 0.0
task.local_resources = lambda **_: Resources((Node(1),))

def watch():
    if sys.argv[2] == "hold" and find_checkpoints(jobs[0].folder):
        sys.stdin.read()

def note(text):
    print(text, flush=True)

try:
    outcomes = task.run_local_jobs(jobs, watch=watch, note=note)
except Interrupted as error:
    print(error, flush=True)
    sys.exit(130)
print(json.dumps([outcome.model_dump() for outcome in outcomes]), flush=True)
"""


WAITING = "waiting for another process, which trains run\n"


@pytest.fixture
def job(tiny_job) -> TrainingJob:
    return tiny_job(num_steps=40, validate_every_steps=40, checkpoint_every_steps=10)


Start = Callable[..., Started]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a script on jobs; processes that still run are killed after the test."""
    started = []

    def start(*jobs: TrainingJob, hold: bool = False, script: str = DRIVER) -> Any:
        jobs_text = json.dumps([job.model_dump(mode="json") for job in jobs])
        process = Started(jobs_text, "hold" if hold else "", code=script)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def holding(start: Start, job: TrainingJob) -> Started:
    """Return a process that trains the job and pauses after its first checkpoint."""
    process = start(job, hold=True)
    process.wait_for(lambda: find_checkpoints(job.folder))
    return process


def waiting(start: Start, job: TrainingJob, **options: Any) -> Started:
    """Return a process that waits for another one."""
    process = start(job, **options)
    assert line(process) == WAITING
    return process


def num_starts(job: TrainingJob) -> int:
    return len(events(job, "started")) + len(events(job, "resumed"))


def line(process: Started) -> str:
    return process.stdout.readline()


def result(process: Started) -> list[dict[str, Any]]:
    """Return the outcomes that a process prints; it prints nothing else."""
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    outcomes: list[dict[str, Any]] = json.loads(printed)
    return outcomes


@pytest.mark.slow
def test_all_return_the_outcome_of_one_training_and_may_stop_waiting(job, start):
    trainer = holding(start, job)
    waiter, *impatient = [waiting(start, job) for _ in range(3)]
    for process, number in zip(impatient, (signal.SIGINT, signal.SIGTERM), strict=True):
        process.send_signal(number)
        assert "interrupted while waiting;" in line(process)
        assert process.wait(timeout=60) == 130
    assert not finished_outcome(job)
    trainer.stdin.close()
    assert result(trainer) == result(waiter)
    assert num_starts(job) == 1


@pytest.mark.slow
def test_who_waits_takes_over_from_who_is_killed(job, start):
    trainer = holding(start, job)
    waiter = waiting(start, job)
    trainer.kill()
    [outcome] = result(waiter)
    assert outcome["finished"]
    [resumed] = events(job, "resumed")
    assert resumed["pid"] == waiter.pid
    assert resumed["step"] >= 10


@pytest.mark.slow
def test_jobs_in_opposite_orders_or_named_twice_are_each_trained_once(job, start):
    jobs = [in_folder(job, f"run-{name}") for name in "abc"]
    first = start(*jobs[:2], hold=True)
    first.wait_for(lambda: find_checkpoints(jobs[0].folder))
    second = start(*reversed(jobs))
    assert line(second) == WAITING.replace("run", "run-b, run-a")
    assert finished_outcome(jobs[2]), "it trained what was free"
    first.stdin.close()
    assert result(second)[::-1][:2] == result(first)
    assert [num_starts(job_of_name) for job_of_name in jobs] == [1, 1, 1]
    outcomes: dict[str, TrainingOutcome] = {}
    for chosen in jobs_to_train([job, job], outcomes):
        assert chosen == [job]
        run_job(job)
    assert outcomes[job.run_folder].finished
