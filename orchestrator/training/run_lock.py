"""Who is at a run's folder: one process at a time, from before it touches anything there.

Whoever trains in a folder holds its lock: a driver of training jobs, and a trial of a sweep, which
may come to the same job. The others wait, hold nothing meanwhile that anybody could wait for, take
what was made, or take over from a process that died, since the system drops a dead one's lock. The
workers inside take a lock of their own (`run.py`): they outlive a driver that was killed by
seconds. The folder must lie on a file system that locks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.terminal.signals import interruption_text, wait_interruptibly
from orchestrator.training.job import DONE_NAME, TrainingJob, TrainingOutcome, finished_outcome
from orchestrator.training.resume_point import describe_saved_state
from orchestrator.workspace.errors import Interrupted

RUN_LOCK_NAME = "trial.lock"
"""Of the folder, not of the trial: trials that put other tasks to the same weights share it."""
POLL_SECONDS = 0.5
"""How long one who waits goes without asking whether to stop."""


@contextmanager
def lock_run_folder(
    folder: Path, *, wait: bool = False, should_stop: Callable[[], bool] | None = None
) -> Iterator[bool]:
    """Hold a folder in the block; False if another process has it, or a stop was asked for.

    Args:
        folder: The run's; made if it is missing.
        wait: Whether to wait for the other process.
        should_stop: Asked a few times a second while waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / RUN_LOCK_NAME, timeout=POLL_SECONDS if wait else 0)
    while not lock.is_locked:
        try:
            lock.acquire()
        except Timeout:
            if not wait or (should_stop and should_stop()):
                break
    try:
        yield lock.is_locked
    finally:
        lock.release()


def is_run_locked(folder: Path) -> bool:
    """Return whether a process is at a folder at this moment."""
    path = folder / RUN_LOCK_NAME
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def jobs_to_train(
    jobs: Sequence[TrainingJob],
    outcomes: dict[str, TrainingOutcome],
    *,
    watch: Callable[[], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Generator[list[TrainingJob], None, None]:
    """Yield the unfinished jobs that this process is to train, until all jobs are finished.

    Their folders are locked until the next jobs are asked for or the generator is closed (use
    `contextlib.closing`). Jobs that another process trains are waited for.

    Args:
        jobs: What to train, each in a folder of its own; finished ones take no time.
        outcomes: Filled with the outcome of each finished job, by its run folder.
        watch: Called a few times a second while waiting, to show progress.
        note: Called once with a sentence if another process is waited for.

    Raises:
        Interrupted: If a job that was yielded is not finished when the next is asked for, or after
            Ctrl-C or SIGTERM while waiting.
    """
    while left := [job for job in jobs if not _note_finished(job, outcomes)]:
        stamps = [_done_stamp(job) for job in left]
        with ExitStack() as stack:
            ours = [job for job in left if stack.enter_context(lock_run_folder(job.folder))]
            # Once more: the process that had the lock before may have finished it.
            unfinished = [job for job in ours if not _note_finished(job, outcomes)]
            if unfinished:
                yield unfinished
                if not all(_note_finished(job, outcomes) for job in unfinished):
                    named = {job.folder.name: job for job in unfinished}
                    raise Interrupted(interruption_text(describe_saved_state(named)))
        if not ours:
            _wait_for_one(left, stamps, watch, note)
            note = None


def _note_finished(job: TrainingJob, outcomes: dict[str, TrainingOutcome]) -> bool:
    if job.run_folder not in outcomes and (outcome := finished_outcome(job)):
        outcomes[job.run_folder] = outcome
    return job.run_folder in outcomes


def _wait_for_one(
    jobs: Sequence[TrainingJob],
    stamps: Sequence[int | None],
    watch: Callable[[], None] | None,
    note: Callable[[str], None] | None,
) -> None:
    """Wait until nobody is at one of the jobs any more, or it has been finished."""

    def is_over() -> bool:
        return any(
            _done_stamp(job) != stamp or not is_run_locked(job.folder)
            for job, stamp in zip(jobs, stamps, strict=True)
        )

    def say() -> None:
        if note:
            names = ", ".join(job.folder.name for job in jobs)
            note(f"waiting for another process, which is at: {names}")

    wait_interruptibly(is_over, begin=say, watch=watch)


def _done_stamp(job: TrainingJob) -> int | None:
    # Reading the outcome compares checksums of whole checkpoints: nothing to do twice a second.
    path = job.folder / DONE_NAME
    return path.stat().st_mtime_ns if path.exists() else None
