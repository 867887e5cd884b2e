"""Where training jobs run: under Ray Train, or in this process.

Ray is imported only where it is used: importing it takes two seconds, and a debugger wants none of
its processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import ClusterSettings


class RunJobs(Protocol):
    """Run jobs to their ends; see `run_train_jobs` and `run_local_jobs`."""

    def __call__(
        self,
        jobs: Sequence[TrainingJob],
        cluster: ClusterSettings | None = None,
        *,
        watch: Callable[[], None] | None = None,
        note: Callable[[str], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> list[TrainingOutcome]: ...


def job_runner(*, local: bool) -> RunJobs:
    """Return the function that runs jobs in this process, or under Ray Train."""
    if local:
        from orchestrator.cluster.local import run_local_jobs

        return run_local_jobs
    from orchestrator.cluster.ray_train import run_train_jobs

    return run_train_jobs
