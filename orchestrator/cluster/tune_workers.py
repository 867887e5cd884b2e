"""A trial's training on several data-parallel workers: a Ray Train job from inside the trial.

The trial's own process holds no CPUs while its workers hold theirs, so that trials cannot wait for
each other's places. It reads the journal that the first worker writes, which is how it hears of
losses, and a request to stop reaches the workers as the stop file in the job's folder. A worker
that dies ends the job: the trial fails, and whoever runs trials tries it again, which goes on from
the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait

from orchestrator.cluster.placement import Room
from orchestrator.cluster.train import fit_job
from orchestrator.terminal.signals import POLL_SECONDS
from orchestrator.training.job import (
    TrainingJob,
    TrainingOutcome,
    clear_stop_request,
    finished_outcome,
    request_stop,
)
from orchestrator.training.monitor import JournalReader


def train_with_workers(
    job: TrainingJob,
    room: Room,
    *,
    should_stop: Callable[[], bool],
    report: Callable[[int, Mapping[str, float]], None] | None = None,
) -> TrainingOutcome:
    """Train a job on a trial's workers, until its end or a stop.

    Args:
        job: What to train; a finished one takes no time.
        room: How many workers, and what each gets.
        should_stop: Asked a few times a second.
        report: Told the training step and its numbers.

    Raises:
        UserError: If the job cannot run as described.
        Diverged: If a loss is no number any more.
        RunFailed: If a worker failed.
    """
    outcome = finished_outcome(job)
    if outcome:
        return outcome
    tail = JournalReader(job.folder)
    tail.read()  # What it says already was heard by who goes on with it.
    clear_stop_request(job.folder)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(
            fit_job,
            job,
            num_workers=room.workers,
            cpus_per_worker=room.cpus,
            use_gpu=room.use_gpu,
        )
        while not training.done():
            wait((training,), timeout=POLL_SECONDS)
            _tell(tail, report)
            if should_stop():
                request_stop(job.folder)
    clear_stop_request(job.folder)
    training.result()
    return finished_outcome(job) or TrainingOutcome(checkpoint=None, step=tail.step, finished=False)


def _tell(tail: JournalReader, report: Callable[[int, Mapping[str, float]], None] | None) -> None:
    for record in tail.read():
        if report and record["kind"] == "metrics":
            report(record["step"], record["values"])
