"""Exclusive lock on a run folder: one driver or trial at a time trains in it.

The others wait, then use the result, or take over if the process died: the system releases a dead
process's lock. The workers take another lock (`run.py`), because they outlive a killed driver by
seconds. The folder must be on a file system that supports locks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.terminal.render import join_names
from orchestrator.terminal.stop import interruption_text, stop_requested, wait_interruptibly
from orchestrator.training.job import finished_outcome
from orchestrator.training.resume_point import describe_saved_state
from orchestrator.workspace.errors import Interrupted
from orchestrator.workspace.layout import DONE_NAME, RUN_LOCK_NAME
from orchestrator.workspace.locks import is_locked, lock_file


def lock_run_folder(folder: Path, *, wait: bool = False) -> AbstractContextManager[bool]:
    """Hold a run folder's lock in a `with` block; it yields whether the lock was acquired.

    With `wait`, wait for another process that holds it, until a stop is requested.
    """
    seconds = None if wait else 0.0
    return lock_file(folder / RUN_LOCK_NAME, seconds=seconds, should_stop=stop_requested)


def is_run_locked(folder: Path) -> bool:
    """Return whether a process holds a run folder's lock."""
    return is_locked(folder / RUN_LOCK_NAME)


def jobs_to_train(
    jobs: Sequence[TrainingJob],
    outcomes: dict[str, TrainingOutcome],
    *,
    watch: Callable[[], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Generator[list[TrainingJob], None, None]:
    """Yield the unfinished jobs that this process must train, until all jobs are finished.

    Their folders are locked until the next iteration, or until the generator is closed (use
    `contextlib.closing`). While another process trains the remaining jobs, this waits.

    Args:
        jobs: What to train, each in its own folder; finished ones take no time.
        outcomes: Filled with the outcome of each finished job, by its run folder.
        watch: Called a few times a second while waiting, to show progress.
        note: Called once with a sentence if another process is waited for.

    Raises:
        Interrupted: If a yielded job is unfinished at the next iteration, or after Ctrl-C or
            SIGTERM while waiting.
    """
    while left := [job for job in jobs if not _note_finished(job, outcomes)]:
        stamps = [_done_stamp(job) for job in left]
        with ExitStack() as stack:
            locked = [job for job in left if stack.enter_context(lock_run_folder(job.folder))]
            # Ask again: the process that held the lock before may have finished the job.
            unfinished = [job for job in locked if not _note_finished(job, outcomes)]
            if unfinished:
                yield unfinished
                if not all(_note_finished(job, outcomes) for job in unfinished):
                    named = {job.folder.name: job for job in unfinished}
                    raise Interrupted(interruption_text(describe_saved_state(named)))
        if not locked:
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
    def is_over() -> bool:
        return any(
            _done_stamp(job) != stamp or not is_run_locked(job.folder)
            for job, stamp in zip(jobs, stamps, strict=True)
        )

    def begin() -> None:
        if note:
            note(waiting_text([job.folder.name for job in jobs]))

    wait_interruptibly(is_over, begin=begin, watch=watch)


def waiting_text(names: Sequence[str]) -> str:
    """Return the sentence that announces the wait for runs of another process."""
    return f"waiting for another process, which trains {join_names(names)}"


def _done_stamp(job: TrainingJob) -> int | None:
    # `finished_outcome` verifies the checksums of a checkpoint: too slow to call twice a second.
    path = job.folder / DONE_NAME
    return path.stat().st_mtime_ns if path.exists() else None
