"""The same jobs in this process and without Ray, for debuggers and profilers.

Breakpoints stop where they stand, `print` prints, and a profiler sees everything. The loop runs in
the main thread with as many threads of PyTorch as the one worker of Ray would have, so losses are
the same to the last bit. Ctrl-C and SIGTERM are a request to save and stop, as elsewhere; a second
one ends at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from orchestrator.planning.resources import check_resources, local_resources
from orchestrator.terminal.signals import (
    POLL_SECONDS,
    SIGNALS,
    interruption_text,
    note_saved_state,
    signal_handlers,
)
from orchestrator.training.distributed import World
from orchestrator.training.job import TrainingJob, TrainingOutcome, check_job, clear_stop_request
from orchestrator.training.resume_point import describe_saved_state
from orchestrator.training.run import run_job
from orchestrator.training.run_lock import run_each_once
from orchestrator.workspace.errors import Interrupted, UserError


def check_local(num_workers: int, num_gpus: int) -> None:
    """Refuse what one process cannot do.

    Raises:
        UserError: If more than one worker is asked for, or a GPU that is not there.
    """
    if max(num_workers, num_gpus) > 1:
        asked = f"--gpus {num_gpus}" if num_gpus > 1 else f"--workers {num_workers}"
        raise UserError(
            f"--local trains in this process alone, and {asked} asks for several (cluster.num_gpus "
            "and cluster.num_workers in the settings); leave out --local, or type "
            "--set cluster.num_workers=1" + (" --set cluster.num_gpus=1" if num_gpus else "")
        )
    check_resources(num_workers, num_gpus)


def run_local_jobs(
    jobs: Sequence[TrainingJob],
    *,
    num_gpus: int = 0,
    watch: Callable[[], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[TrainingOutcome]:
    """Run jobs one after the other in this process; finished ones take no time.

    What another process is at is waited for.

    Args:
        jobs: What to train, each in a folder of its own.
        num_gpus: 1 trains on the first GPU, 0 on the CPU.
        watch: Called a few times a second between steps, to show progress.
        note: Told if another process is waited for.

    Returns:
        The outcome of each job, in their order.

    Raises:
        UserError: If a job cannot run as described.
        Diverged: If a loss is no number any more.
        Interrupted: After Ctrl-C or SIGTERM; says at which step the state is saved.
        Exception: What a job raised, also after a signal; then it says what is saved, too.
    """
    for job in jobs:
        check_job(job)
    world = World(device="cuda:0" if num_gpus else "cpu")
    return run_each_once(jobs, partial(_run_here, world=world, watch=watch), watch=watch, note=note)


def _run_here(jobs: Sequence[TrainingJob], world: World, watch: Callable[[], None] | None) -> None:
    """Run jobs whose folders are held; as `run_local_jobs`."""
    signals: list[int] = []
    looked_at = time.monotonic()

    def on_signal(number: int, frame: Any) -> None:
        signals.append(number)
        if len(signals) > 1:
            signal.default_int_handler(number, frame)

    def should_stop() -> bool:
        nonlocal looked_at
        if watch and time.monotonic() - looked_at > POLL_SECONDS:
            watch()
            looked_at = time.monotonic()
        return bool(signals)

    def saved() -> str:
        return describe_saved_state({job.folder.name: job for job in jobs})

    try:
        with signal_handlers(SIGNALS, on_signal), _threads(local_resources(count_gpus=False).cpus):
            for job in jobs:
                clear_stop_request(job.folder)
                outcome = run_job(job, world=world, should_stop=should_stop)
                if watch:
                    watch()
                if not outcome.finished:
                    break
    except KeyboardInterrupt:
        raise Interrupted(interruption_text(saved(), in_time=False)) from None
    except Exception as error:
        if signals:
            note_saved_state(error, saved())
        raise
    if signals:
        raise Interrupted(interruption_text(saved()))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
