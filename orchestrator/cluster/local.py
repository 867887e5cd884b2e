"""Training jobs in this process, without Ray, for debuggers and profilers.

The loop runs in the main thread with as many PyTorch threads as the single Ray worker would have,
so losses are bitwise the same. Ctrl-C and SIGTERM ask to save and stop; a second one ends at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

from orchestrator.evaluation.decode_timing import threads
from orchestrator.planning.estimate import out_of_memory_explained
from orchestrator.planning.machine import local_resources
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import ClusterSettings
from orchestrator.terminal.stop import (
    POLL_SECONDS,
    interruption_text,
    note_saved_state,
    stop_on_signals,
    stop_requested,
)
from orchestrator.training.devices import World
from orchestrator.training.trainer import run_job
from orchestrator.training.watching import describe_saved_state, jobs_to_train
from orchestrator.workspace.errors import Interrupted


def run_local_jobs(
    jobs: Sequence[TrainingJob],
    cluster: ClusterSettings | None = None,
    *,
    watch: Callable[[], None] | None = None,
    note: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,  # noqa: ARG001 - nothing has to be started here
) -> list[TrainingOutcome]:
    """Run jobs one after the other in this process, the first GPU or the CPU; as `run_train_jobs`.

    Raises:
        UserError: If a job cannot run as described, or a GPU's memory is too small for it.
        Diverged: If a loss is not finite.
        Interrupted: After Ctrl-C or SIGTERM; says at which step the state is saved.
        Exception: What a job raised, also after a signal; then it says what is saved, too.
    """
    world = World(device="cuda:0" if cluster and cluster.num_gpus else "cpu")
    outcomes: dict[str, TrainingOutcome] = {}
    with closing(jobs_to_train(jobs, outcomes, watch=watch, note=note)) as parts:
        for ours in parts:
            cpus = local_resources(count_gpus=False).cpus
            with _saving_on_signals(ours, watch) as should_stop, threads(cpus):
                for job in ours:
                    with out_of_memory_explained(job, world):
                        outcome = run_job(job, world=world, should_stop=should_stop)
                    if watch:
                        watch()
                    if not outcome.finished:
                        break
    return [outcomes[job.run_folder] for job in jobs]


@contextmanager
def _saving_on_signals(
    jobs: Sequence[TrainingJob], watch: Callable[[], None] | None
) -> Iterator[Callable[[], bool]]:
    """Yield a function that shows progress and returns whether to save and stop."""
    watched_at = time.monotonic()

    def should_stop() -> bool:
        nonlocal watched_at
        if watch and time.monotonic() - watched_at > POLL_SECONDS:
            watch()
            watched_at = time.monotonic()
        return stop_requested()

    def saved() -> str:
        return describe_saved_state({job.folder.name: job for job in jobs})

    with stop_on_signals(second_ends=True):
        try:
            yield should_stop
        except KeyboardInterrupt:
            raise Interrupted(interruption_text(saved(), in_time=False)) from None
        except Exception as error:
            if stop_requested():
                note_saved_state(error, saved())
            raise
        if stop_requested():
            raise Interrupted(interruption_text(saved()))
