"""Training jobs under Ray Train, which starts a job's workers anew when one dies.

Ray keeps no state that is read again: a job goes on from its own folder, so Ray's records of
checkpoints, which a crash can damage, are deleted. A mistake of the user's or a diverged loss comes
back as an answer instead of an exception, because starting the workers again would not help.
`trial_runner.py` runs sweeps.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from orchestrator.cluster.process_group import PrivateTorchConfig
from orchestrator.cluster.start import ray_cluster
from orchestrator.planning.resources import Resources, check_resources
from orchestrator.terminal.signals import run_interruptibly
from orchestrator.training.checkpoint_writer import CheckpointWriteFailed
from orchestrator.training.distributed import World
from orchestrator.training.job import (
    TrainingJob,
    TrainingOutcome,
    check_job,
    clear_stop_request,
    is_stop_requested,
    request_stop,
)
from orchestrator.training.loop import Diverged
from orchestrator.training.resume_point import describe_saved_state
from orchestrator.training.run import run_job
from orchestrator.training.run_lock import run_each_once
from orchestrator.workspace.credentials import mask_secrets
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.journal import JOURNAL_NAME

# isort: split
# Behind our own modules, because `orchestrator.cluster.start` sets the environment that Ray reads.
import ray.exceptions
import ray.train.torch

ray_train: Any = ray.train  # what type checkers see there is the API before version 2

RAY_FOLDER = "ray"
CONTROLLER_FAILURES = 3  # unlimited by default: a job that finds no place would wait for ever
FINAL_ERRORS: dict[str, type[Exception]] = {
    "UserError": UserError,
    "Diverged": Diverged,
    "CheckpointWriteFailed": CheckpointWriteFailed,
}
ANSWERED_ERRORS = {**FINAL_ERRORS, "RunFailed": RunFailed}

Watch = Callable[[], None]


def run_train_jobs(
    jobs: Sequence[TrainingJob],
    *,
    num_workers: int = 1,
    num_gpus: int = 0,
    parallel: str = "ddp",
    max_failures: int = 2,
    watch: Watch | None = None,
    note: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[TrainingOutcome]:
    """Run jobs under Ray Train, side by side as far as there is room; finished ones take no time.

    What another process is at is waited for.

    Args:
        jobs: What to train, each in a folder of its own.
        num_workers: Data-parallel workers of each job.
        num_gpus: GPUs of each job, one for each worker; 0 trains on CPUs.
        parallel: `ddp`, each worker has the whole model, or `fsdp`, they share it.
        max_failures: How often a job whose worker died starts again from its newest checkpoint.
        watch: Called a few times a second, to show progress.
        note: Told if another process is waited for.
        say: Told that Ray starts.

    Returns:
        The outcome of each job, in their order.

    Raises:
        UserError: If a job cannot run as described; nothing is started then.
        Diverged: If a loss is no number any more.
        RunFailed: If a job failed more often than it may. The others have ended before.
        Interrupted: After Ctrl-C or SIGTERM.
    """
    num_workers = check_train_jobs(jobs, num_workers=num_workers, num_gpus=num_gpus)
    run = partial(
        _run_held,
        num_workers=num_workers,
        num_gpus=num_gpus,
        parallel=parallel,
        max_failures=max_failures,
        watch=watch,
        say=say,
    )
    return run_each_once(jobs, run, watch=watch, note=note)


def _run_held(
    jobs: Sequence[TrainingJob],
    *,
    num_workers: int,
    num_gpus: int,
    parallel: str,
    max_failures: int,
    watch: Watch | None,
    say: Callable[[str], None] | None,
) -> None:
    """Run jobs whose folders are held until all have ended; as `run_train_jobs`."""
    for job in jobs:
        clear_stop_request(job.folder)
    before = [_journal_bytes(job) for job in jobs]
    with ray_cluster(say=say) as cluster:
        check_resources(num_workers, num_gpus, cluster.resources)
        plan = _plan(
            cluster.resources,
            num_workers,
            use_gpu=num_gpus > 0,
            num_jobs=len(jobs),
            max_failures=max_failures,
        )
        plan = replace(plan, parallel=parallel)
        run_interruptibly(
            lambda: _fit_all(jobs, plan),
            ask_to_stop=lambda: _ask_all_to_stop(jobs, before),
            saved=lambda: describe_saved_state({job.folder.name: job for job in jobs}),
            watch=watch,
        )


def check_train_jobs(
    jobs: Sequence[TrainingJob], *, num_workers: int = 1, num_gpus: int = 0
) -> int:
    """Find in a moment, before anything is written or started, what would make jobs fail.

    Returns:
        The number of workers of each job.

    Raises:
        UserError: If there are too few CPUs or GPUs, or a job cannot run as described.
    """
    num_workers = check_resources(num_workers, num_gpus)
    for job in jobs:
        check_job(job, num_workers=num_workers)
    return num_workers


def run_train_job(
    job: TrainingJob,
    *,
    num_workers: int = 1,
    num_gpus: int = 0,
    parallel: str = "ddp",
    max_failures: int = 2,
    watch: Watch | None = None,
) -> TrainingOutcome:
    """Run one job under Ray Train; see `run_train_jobs`."""
    outcomes = run_train_jobs(
        [job],
        num_workers=num_workers,
        num_gpus=num_gpus,
        parallel=parallel,
        max_failures=max_failures,
        watch=watch,
    )
    return outcomes[0]


def fit_job(
    job: TrainingJob,
    *,
    num_workers: int,
    cpus_per_worker: int,
    use_gpu: bool,
    max_failures: int = 0,
) -> None:
    """Run one job under Ray Train in the Ray that runs already, from the driver or inside a trial.

    The caller watches for signals, and asks for the outcome, which lies on disk.

    Raises:
        UserError: If the job cannot run as described.
        Diverged: If a loss is no number any more.
        RunFailed: If it failed more often than it may.
    """
    _fit(job, _scaled(num_workers, cpus_per_worker, use_gpu=use_gpu, max_failures=max_failures))


@dataclass(frozen=True, kw_only=True)
class _Plan:
    at_once: int
    scaling: Any
    failures: Any
    num_threads: int
    parallel: str = "ddp"


def _plan(
    resources: Resources, num_workers: int, *, use_gpu: bool, num_jobs: int, max_failures: int
) -> _Plan:
    """Share the CPUs evenly among the workers that run at the same time."""
    places = resources.gpus if use_gpu else resources.cpus
    at_once = max(1, min(num_jobs, places // num_workers))
    cpus = max(1, resources.cpus // (at_once * num_workers))
    return _scaled(num_workers, cpus, use_gpu=use_gpu, max_failures=max_failures, at_once=at_once)


def _scaled(
    num_workers: int, cpus: int, *, use_gpu: bool, max_failures: int, at_once: int = 1
) -> _Plan:
    scaling = ray_train.ScalingConfig(
        num_workers=num_workers,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus},
    )
    failures = ray_train.FailureConfig(
        max_failures=max_failures, controller_failure_limit=CONTROLLER_FAILURES
    )
    return _Plan(at_once=at_once, scaling=scaling, failures=failures, num_threads=cpus)


def _fit_all(jobs: Sequence[TrainingJob], plan: _Plan) -> None:
    with ThreadPoolExecutor(plan.at_once) as pool:
        futures = [pool.submit(_fit, job, plan) for job in jobs]
    for future in futures:
        future.result()


def _fit(job: TrainingJob, plan: _Plan) -> None:
    if is_stop_requested(job.folder):
        return
    storage = job.folder / RAY_FOLDER
    shutil.rmtree(storage, ignore_errors=True)
    backend = "nccl" if plan.scaling.use_gpu else "gloo"
    trainer = ray_train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={
            "job": job.to_dict(),
            "num_threads": plan.num_threads,
            "parallel": plan.parallel,
        },
        scaling_config=plan.scaling,
        torch_config=PrivateTorchConfig(backend=backend),
        run_config=ray_train.RunConfig(
            name="train",
            storage_path=str(storage),
            failure_config=plan.failures,
            logging_config=ray_train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        answer = trainer.fit().return_value
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise RunFailed(f"training in {job.folder} failed: {failure_reason(error)}") from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    if "error" in answer:
        raise ANSWERED_ERRORS[answer["error"]](answer["text"])


def _train_worker(config: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(config["num_threads"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=str(device),
        parallel=config["parallel"],
    )
    job = TrainingJob.from_dict(config["job"])
    return answer_of(
        lambda: run_job(job, world=world).to_dict(),
        # One of several workers that fails alone must die: the others wait for it for ever.
        is_stopping=lambda: world.size == 1 and is_stop_requested(job.folder),
    )


def answer_of(
    work: Callable[[], dict[str, Any]], *, is_stopping: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Return `{"result": ...}`; or `{"error": kind, "text": ...}` if trying again cannot help.

    Args:
        work: What is run.
        is_stopping: Whether a stop was asked for: nothing is tried again then, so that any error
            is an answer.
    """
    try:
        return {"result": work()}
    except tuple(FINAL_ERRORS.values()) as error:
        name = next(name for name, kind in FINAL_ERRORS.items() if isinstance(error, kind))
        return {"error": name, "text": str(error)}
    except Exception as error:
        if not is_stopping():
            raise
        is_ours = isinstance(error, RunFailed)
        text = str(error) if is_ours else f"{type(error).__name__}: {error}"
        return {"error": "RunFailed", "text": text}


def _ask_all_to_stop(jobs: Sequence[TrainingJob], before: Sequence[int]) -> bool:
    for job in jobs:
        request_stop(job.folder)
    # A job that has written nothing since it was started has nothing to save.
    return any(_journal_bytes(job) > size for job, size in zip(jobs, before, strict=True))


def _journal_bytes(job: TrainingJob) -> int:
    path = job.folder / JOURNAL_NAME
    return path.stat().st_size if path.exists() else 0


def failure_reason(error: BaseException) -> str:
    """Say in one line what went wrong in a worker; the line is stored with the results."""
    if isinstance(error, ray.train.WorkerGroupError) and error.worker_failures:
        error = next(iter(error.worker_failures.values()))
    if isinstance(error, ray.train.ControllerError):
        error = error.controller_failure
    cause = getattr(error, "cause", None) or error
    first = next((line for line in str(cause).splitlines() if line.strip()), "no message")
    return mask_secrets(f"{type(cause).__name__}: {first}")
