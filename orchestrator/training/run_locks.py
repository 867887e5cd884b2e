"""Locks of run folders, so that one process trains in a folder, and what it has saved there.

A driver or a trial holds the lock while it trains. Others wait and use the result, or take over if
the process died, which releases its lock. Workers hold another lock (`trainer.py`), because they
outlive a killed driver by seconds. The file system must support locks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.records.training_state import Training
from orchestrator.terminal.render import join_names
from orchestrator.terminal.stop import interruption_text, stop_requested, wait_interruptibly
from orchestrator.training.continuing import first_step
from orchestrator.training.job import finished_outcome
from orchestrator.workspace.errors import Interrupted
from orchestrator.workspace.layout import RUN_LOCK_NAME
from orchestrator.workspace.locks import is_locked, lock_file


def lock_run_folder(folder: Path, *, wait: bool = False) -> AbstractContextManager[bool]:
    """Hold a run folder's lock in a `with` block; yields whether it was acquired.

    With `wait`, wait for a process that holds it, unless a stop is requested.
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
    """Yield unfinished jobs that this process must train, until all jobs are finished.

    Their folders are locked until the next iteration, or until the generator is closed (use
    `contextlib.closing`). While other processes train the remaining jobs, this waits for them.

    Args:
        jobs: What to train, each in its own folder; finished jobs take no time.
        outcomes: Filled with the outcome of each finished job, by its run folder.
        watch: Called a few times a second while waiting, to show progress.
        note: Called once with a sentence if this waits for another process.

    Raises:
        Interrupted: If a yielded job is unfinished at the next iteration, or after Ctrl-C or
            SIGTERM while waiting.
    """

    def is_finished(job: TrainingJob) -> bool:
        if job.run_folder not in outcomes and (outcome := finished_outcome(job)):
            outcomes[job.run_folder] = outcome
        return job.run_folder in outcomes

    while remaining := [job for job in jobs if not is_finished(job)]:
        with ExitStack() as stack:
            locked = [job for job in remaining if stack.enter_context(lock_run_folder(job.folder))]
            # Check again: an earlier holder of the lock may have finished the job.
            if unfinished := [job for job in locked if not is_finished(job)]:
                yield unfinished
                if not all(map(is_finished, unfinished)):
                    named = {job.folder.name: job for job in unfinished}
                    raise Interrupted(interruption_text(describe_saved_state(named)))
        if not locked:
            names = [job.folder.name for job in remaining]
            begin = partial(note, waiting_text(names)) if note else None
            folders = [job.folder for job in remaining]
            wait_interruptibly(
                partial(_is_one_unlocked, folders),
                begin=begin,
                watch=watch,
            )
            note = None


def _is_one_unlocked(folders: Sequence[Path]) -> bool:
    return not all(map(is_run_locked, folders))


def waiting_text(names: Sequence[str]) -> str:
    """Return the sentence that announces a wait for runs of another process."""
    return f"waiting for another process, which trains {join_names(names)}"


def describe_saved_state(jobs: Mapping[str, TrainingJob], *, named: bool = False) -> str:
    """Return what each run has saved, as text; with `named`, a single run is named, too.

    Checkpoints are not verified: that takes minutes, and users wait for this text after Ctrl-C.
    """
    texts = []
    for name, job in jobs.items():
        training = Training(job.folder)
        step = first_step(job, training.saved_step)
        if training.outcome:
            text = "the training is finished"
        elif step:
            text = f"saved at step {step}"
        else:
            text = "nothing was saved" if training.records else "not started yet"
        texts.append(f"{name}: {text}" if named or len(jobs) > 1 else text)
    return "; ".join(texts)
