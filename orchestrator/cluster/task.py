"""Choose where training jobs run and text is tokenized: under Ray, or in this process.

In this process, for debuggers and profilers, a job has bitwise the losses of one worker under Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.cluster.placement import alive_nodes
from orchestrator.cluster.ray import ray_cluster, ray_environment
from orchestrator.data.text_parts import OpenRunner, PartRunner, ReportTokens
from orchestrator.planning.machine import Resources, local_resources
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import ClusterSettings
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import (
    POLL_SECONDS,
    interruption_text,
    note_saved_state,
    stop_on_signals,
    stop_requested,
)
from orchestrator.workspace.errors import (
    Interrupted,
    RunFailed,
    UserError,
    first_line,
    joint_error,
)

T = TypeVar("T")
AnswerT = TypeVar("AnswerT")

END_SECONDS = 3.0
"""Longest wait for the end of cancelled tasks."""


@contextmanager
def joined_cluster(
    cluster: ClusterSettings, folder: Path, check: Callable[[Resources], None], progress: Progress
) -> Iterator[None]:
    """Join the cluster that the settings name for a block of code, and check it first.

    The block may prepare data for hours, so a mistake must show before. A local Ray starts later,
    with the first jobs.

    Args:
        folder: The workspace.
        check: Raises `UserError` if the nodes have too few CPUs or GPUs.

    Raises:
        UserError: If the cluster cannot be joined, or its nodes cannot be used.
    """
    if cluster.ray_address == LOCAL:
        with ray_environment(LOCAL):  # What the block imports may import Ray.
            yield
        return
    with ray_cluster(cluster, folder=folder, say=progress.start) as resources:
        check(resources)
        yield


def lack_of_resources(
    cluster: ClusterSettings, check: Callable[[Resources | None], None]
) -> str | None:
    """Return which resources the cluster of the settings, or this machine, lacks; None if none.

    A cluster is joined for it, as in a run, but nothing is written to the workspace.

    Args:
        check: Raises `UserError` if there are too few CPUs or GPUs; gets None for this machine.
    """
    try:
        if cluster.ray_address == LOCAL:
            check(None)
        else:
            with ray_cluster(cluster) as resources:
                check(resources)
    except (UserError, RunFailed) as error:
        return str(error)
    return None


# Parts of text


def part_runner(cluster: ClusterSettings) -> OpenRunner | None:
    """Return the runner that tokenizes parts on all nodes of a cluster, which must be joined while
    it runs; None for a single machine, which uses threads without Ray."""
    return None if cluster.ray_address == LOCAL else _part_tasks


@contextmanager
def _part_tasks() -> Iterator[PartRunner]:
    tasks = _PartTasks(sum(node.cpus for node in alive_nodes()))
    try:
        yield tasks
    finally:
        tasks.end()


class _PartTasks:
    """Runs work on parts as Ray tasks of one CPU each; a task reports when it ends."""

    def __init__(self, num_cpus: int) -> None:
        import ray

        self.num_at_once = num_cpus
        # A task has one CPU; the tokenizer would start a thread for each CPU of the node.
        environment = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
        self._task: Any = ray.remote(num_cpus=1, runtime_env=environment)(_call)
        self._at_work: set[Any] = set()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Start a task; if its node is lost, Ray starts it again on another one."""
        return self._start(work, lambda result: result)

    def submit_reporting(
        self, work: Callable[[ReportTokens], T], report: ReportTokens
    ) -> Future[T]:
        """Start a task; at its end, call `report` once with the sums of its reports."""

        def report_sums(answer: tuple[T, int, int]) -> T:
            result, num_tokens, num_bytes = answer
            report(num_tokens, num_bytes)
            return result

        return self._start(partial(with_reported, work), report_sums)

    def _start(self, work: Callable[[], AnswerT], to_result: Callable[[AnswerT], T]) -> Future[T]:
        import ray.exceptions

        reference = self._task.remote(work)
        self._at_work.add(reference)
        result: Future[T] = Future()

        def take_result(task: Future[AnswerT]) -> None:
            self._at_work.discard(reference)
            try:
                result.set_result(to_result(task.result()))
            except ray.exceptions.RayTaskError as error:
                result.set_exception(error.cause)
            except ray.exceptions.RayError as error:
                reason = first_line(error, with_type=True)
                result.set_exception(
                    RunFailed(f"a task on a node failed ({reason}); run the same command again")
                )
            except Exception as error:  # `report` raises after an error in another part.
                result.set_exception(error)

        reference.future().add_done_callback(take_result)
        return result

    def end(self) -> None:
        """Cancel running tasks after an error or Ctrl-C; unfinished parts are written again
        later."""
        import ray

        running = list(self._at_work)
        for reference in running:
            ray.cancel(reference, force=True)
        if running:
            ray.wait(running, num_returns=len(running), timeout=END_SECONDS)


def _call(work: Callable[[], T]) -> T:
    return work()


def with_reported(work: Callable[[ReportTokens], T]) -> tuple[T, int, int]:
    """Return the result of work, and the sums of the tokens and bytes that it reports."""
    reports: list[tuple[int, int]] = []
    result = work(lambda num_tokens, num_bytes: reports.append((num_tokens, num_bytes)))
    return result, sum(tokens for tokens, _ in reports), sum(size for _, size in reports)


# Training jobs


def job_runner(
    *, local: bool, say: Callable[[str], None] | None = None
) -> Callable[..., list[TrainingOutcome]]:
    """Return the function that runs jobs: `run_local_jobs`, or `run_train_jobs` under Ray.

    Args:
        say: Called with a sentence when Ray starts, which takes seconds.
    """
    if local:
        return run_local_jobs
    from orchestrator.cluster.train import run_train_jobs

    return partial(run_train_jobs, say=say)


def run_local_jobs(
    jobs: Sequence[TrainingJob],
    cluster: ClusterSettings | None = None,
    *,
    watch: Callable[[], None] | None = None,
    note: Callable[[str], None] | None = None,
    failed: Callable[[TrainingJob, Exception], None] | None = None,
) -> list[TrainingOutcome]:
    """Run jobs one after the other in this process, on the first GPU or the CPU.

    Arguments are those of `run_train_jobs`. The loop runs in the main thread, with as many PyTorch
    threads as a single Ray worker would have. Ctrl-C and SIGTERM make it save and stop; a second
    one ends it at once.

    Raises:
        UserError: If a job cannot run as described, or a GPU's memory is too small for it.
        Diverged: If a loss is not finite.
        Interrupted: After Ctrl-C or SIGTERM; says at which step the state is saved.
        Exception: What a job raised, or one error for several, when all have ended. After a
            signal, its text also says what is saved.
    """
    from orchestrator.evaluation.decode_timing import torch_threads
    from orchestrator.planning.fit import out_of_memory_explained, sequences_if_uncompiled
    from orchestrator.training.run_locks import describe_saved_state, jobs_to_train
    from orchestrator.training.trainer import run_job
    from orchestrator.training.world import World

    world = World(device="cuda:0" if cluster and cluster.num_gpus else "cpu")
    outcomes: dict[str, TrainingOutcome] = {}
    watched_at = time.monotonic()

    def should_stop() -> bool:
        nonlocal watched_at
        if watch and time.monotonic() - watched_at > POLL_SECONDS:
            watch()
            watched_at = time.monotonic()
        return stop_requested()

    with closing(jobs_to_train(jobs, outcomes, watch=watch, note=note)) as parts:
        for jobs_of_part in parts:
            saved = partial(describe_saved_state, {job.folder.name: job for job in jobs_of_part})
            errors: dict[str, Exception] = {}
            cpus = local_resources(count_gpus=False).cpus
            with stop_on_signals(second_ends=True), torch_threads(cpus):
                for job in jobs_of_part:
                    try:
                        with out_of_memory_explained(job, world):
                            outcome = run_job(
                                job,
                                world=world,
                                should_stop=should_stop,
                                sequences_if_uncompiled=sequences_if_uncompiled(job, world),
                            )
                    except KeyboardInterrupt:
                        raise Interrupted(interruption_text(saved(), in_time=False)) from None
                    except Exception as error:
                        if failed:
                            failed(job, error)
                        if stop_requested():
                            note_saved_state(error, saved())
                            raise
                        errors[job.folder.name] = error
                        continue
                    if watch:
                        watch()
                    if not outcome.finished:
                        break
                if stop_requested():
                    raise Interrupted(interruption_text(saved()))
                if errors:
                    raise joint_error(errors)
    return [outcomes[job.run_folder] for job in jobs]
