"""Looks at a pretraining before it begins: what it will take, and whether there is room for it.

The tokens need not be prepared, and no GPU need be there: what is not known yet is assumed, and
said. A dry run shows what comes out; a real run is refused here, in a moment, before text is read
or a process is started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.data.preparation import ExpectedTokens, expected_tokens, find_prepared
from orchestrator.planning.fit import ResourceRequest, check_fit, needed_memory
from orchestrator.planning.resources import (
    FreeBytes,
    check_resources,
    local_free_bytes,
    local_resources,
)
from orchestrator.planning.training_estimate import TrainingEstimate
from orchestrator.settings import ClusterSettings, Settings, SweepSettings
from orchestrator.terminal.formatting import format_bytes
from orchestrator.training.checkpoint import load_config
from orchestrator.training.checkpoint_lookup import find_checkpoints
from orchestrator.training.job import DONE_NAME, TrainingJob, finished_outcome
from orchestrator.training.model_config import build_model_config
from orchestrator.training.peak_flops import ASSUMED_GPU, ASSUMED_GPU_BYTES, installed_gpu
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import Workspace

THIS_MACHINE = "this machine"


@dataclass(frozen=True, kw_only=True)
class PretrainingEstimate:
    """What is known of a pretraining before it begins."""

    settings: Settings
    tokens: ExpectedTokens
    request: ResourceRequest
    estimate: TrainingEstimate
    verdicts: dict[str, str | None]
    """By place, why it does not fit there; None where it does. The first is this machine."""
    is_memory_known: bool
    """Whether this machine's memory counts; it does not where `RAY_ADDRESS` names a cluster."""

    @property
    def num_workers(self) -> int:
        """Data-parallel workers."""
        return self.request.num_workers


def estimate_pretraining(settings: Settings, workspace: Workspace) -> PretrainingEstimate:
    """Look at a pretraining, and start nothing.

    Args:
        settings: The whole tree.
        workspace: Where it would live; it need not exist.

    Raises:
        UserError: If the settings cannot be met anywhere: sizes that do not go together, files that
            are missing.
    """
    tokens = expected_tokens(settings.data, find_prepared(settings.data, workspace.tokens))
    request = pretraining_request(settings, tokens.vocab_size)
    estimate = request.estimate()
    return PretrainingEstimate(
        settings=settings,
        tokens=tokens,
        request=request,
        estimate=estimate,
        verdicts=_verdicts(settings, workspace, request, tokens),
        is_memory_known=local_free_bytes(workspace.root).memory is not None,
    )


def check_pretraining(settings: Settings, workspace: Workspace) -> None:
    """Refuse a pretraining that has no room here, before its text is read.

    Raises:
        UserError: If it does not fit, or cannot be met anywhere; says what would fit.
    """
    found = estimate_pretraining(settings, workspace)
    problem = found.verdicts[THIS_MACHINE]
    # With its tokens there, the run itself is known: what it has on disk counts for it.
    if problem and not found.tokens.num_train_tokens:
        raise UserError(problem)


def pretraining_request(settings: Settings, vocab_size: int) -> ResourceRequest:
    """Return what the settings ask for, for a tokenizer of so many entries."""
    cluster = settings.cluster
    return ResourceRequest(
        config=build_model_config(settings.model, vocab_size=vocab_size),
        recipe=settings.training,
        num_workers=cluster.num_gpus or cluster.num_workers,
        parallel=cluster.parallel,
        on_gpus=cluster.num_gpus > 0,
        model=settings.model,
    )


def check_jobs_fit(
    jobs: Sequence[TrainingJob],
    cluster: ClusterSettings,
    *,
    settings: Sequence[Settings] = (),
) -> None:
    """Refuse jobs that would run out of memory or disk; those that are finished need nothing.

    Args:
        jobs: What will run, side by side as far as there are places.
        cluster: Workers and GPUs of each.
        settings: Of each job, where another size of model would do too.

    Raises:
        UserError: If one does not fit; says what would.
    """
    num_workers = cluster.num_gpus or cluster.num_workers
    waiting = [job for job in jobs if finished_outcome(job) is None]
    # On GPUs, each job has its own; on CPUs, those that run at the same time share the memory.
    places = local_resources(count_gpus=False).cpus // num_workers
    at_once = max(1, min(len(waiting), places))
    requests = []
    for number, job in enumerate(jobs):
        if job not in waiting:
            continue
        request = replace(
            _on(request_of(job), num_workers, on_gpus=cluster.num_gpus > 0),
            parallel=cluster.parallel,
            model=settings[number].model if settings else None,
        )
        free = local_free_bytes(
            job.folder, num_workers=num_workers * at_once, num_gpus=cluster.num_gpus
        )
        check_fit(request, free, present_bytes=_checkpoint_bytes(job.folder))
        requests.append((job.folder, request))
    _check_disk_for_all(requests, at_once=at_once)


def assign_trial_gpus(settings: Settings, requests: Sequence[ResourceRequest] = ()) -> Settings:
    """Return the settings with the GPUs of a sweep's trials filled in.

    On a run that has GPUs, a trial takes the fewest on which every trial fits, and no more trials
    run side by side than the run's GPUs have room for.

    Args:
        settings: The whole tree.
        requests: Of the trials that wait; a trial takes one GPU as long as they are not known.

    Raises:
        UserError: If trials are sent to CPUs though the run has GPUs, or ask for more than it has.
    """
    num_gpus, sweep = settings.cluster.num_gpus, settings.sweep
    own = sweep.gpus_per_trial
    if not num_gpus:
        return _with_sweep(settings, gpus_per_trial=own or 0)
    if own == 0:
        raise UserError(
            f"sweep.gpus_per_trial=0 trains trials on CPUs, and cluster.num_gpus={num_gpus} names "
            "GPUs; leave sweep.gpus_per_trial out, or set cluster.num_gpus=0 to train everything "
            "on CPUs"
        )
    if own is None:
        several = sweep.workers_per_trial > 1
        own = sweep.workers_per_trial if several else _fewest_gpus(requests, num_gpus)
    if own > num_gpus:
        raise UserError(
            f"a trial asks for {own} GPUs (sweep.gpus_per_trial, sweep.workers_per_trial), and the "
            f"run has {num_gpus} (cluster.num_gpus); lower the one or raise the other"
        )
    at_once = min(sweep.trials_at_once or num_gpus, num_gpus // own)
    return _with_sweep(settings, gpus_per_trial=own, trials_at_once=at_once)


def _with_sweep(settings: Settings, **changes: int) -> Settings:
    return settings.model_copy(update={"sweep": settings.sweep.model_copy(update=changes)})


def _fewest_gpus(requests: Sequence[ResourceRequest], most: int) -> int:
    """Return the fewest GPUs on which each trial fits; all if none are enough."""
    free = local_free_bytes(Path.cwd(), num_gpus=1).memory or ASSUMED_GPU_BYTES
    return next(
        (n for n in range(1, most) if all(_fits(request, n, free) for request in requests)), most
    )


def _fits(request: ResourceRequest, num_gpus: int, free: int) -> bool:
    try:
        return needed_memory(_on(request, num_gpus, on_gpus=True).estimate()) <= free
    except UserError:
        return False  # So many workers cannot share a step evenly.


def _on(request: ResourceRequest, num_workers: int, *, on_gpus: bool) -> ResourceRequest:
    return replace(request, num_workers=num_workers, on_gpus=on_gpus)


def request_of(job: TrainingJob) -> ResourceRequest:
    """Return what a training asks for, before it is known on what it runs."""
    return ResourceRequest(
        config=job.config(),
        recipe=job.recipe,
        section=job.section,
        teacher=load_config(Path(job.teacher_folder)) if job.teacher_folder else None,
    )


def check_trials_fit(
    jobs: Sequence[TrainingJob], sweep: SweepSettings, *, teacher_bytes: int = 0
) -> None:
    """Refuse a sweep's trials that would run out of this machine's memory, each by its own needs,
    or of disk, all together.

    Args:
        jobs: Of the trials that wait.
        sweep: How many run at once, with how many workers or GPUs each.
        teacher_bytes: Of the teacher's answers that will be stored for them.

    Raises:
        UserError: If one does not fit, or not all; says what would.
    """
    gpus, workers, at_once = _places(sweep, len(jobs))
    requests = []
    for job in jobs:
        request = _on(request_of(job), workers, on_gpus=gpus > 0)
        alone = local_free_bytes(job.folder, num_workers=workers, num_gpus=gpus)
        check_fit(request, alone, present_bytes=_checkpoint_bytes(job.folder))
        if not (job.folder / DONE_NAME).is_file():  # Trained, and only measured now.
            requests.append((job.folder, request))
        if alone.memory is None or gpus:
            continue
        needed = needed_memory(request.estimate())
        most = alone.memory // needed
        if most < at_once:
            raise UserError(
                f"{at_once} trials at once would take about "
                f"{format_bytes(at_once * workers * needed)} of "
                f"memory, and this machine has {format_bytes(workers * alone.memory)} free; the "
                f"nearest setting that fits: --set sweep.trials_at_once={most}"
            )
    _check_disk_for_all(requests, at_once=at_once, teacher_bytes=teacher_bytes)


def _places(sweep: SweepSettings, num_trials: int) -> tuple[int, int, int]:
    """Return the GPUs of a trial, its workers, and how many trials run side by side."""
    gpus = sweep.gpus_per_trial or 0
    workers = gpus or sweep.workers_per_trial
    places = max(1, local_resources(count_gpus=False).cpus // workers)
    return gpus, workers, min(sweep.trials_at_once or places, places, num_trials)


def check_students_fit(settings: Settings, jobs: Sequence[TrainingJob], most: int) -> None:
    """Refuse students that will have no room, before their teacher is trained.

    Args:
        settings: The whole tree; none of the students is there yet.
        jobs: The teacher first, and what is pretrained beside it.
        most: How many students there may be.

    Raises:
        UserError: If one does not fit, or not all beside what is pretrained; says what would.
    """
    teacher, distillation = jobs[0].config(), settings.distillation
    request = ResourceRequest(
        config=teacher,
        recipe=distillation.training,
        section="distillation.training",
        teacher=teacher if distillation.control == "distill" else None,
    )
    gpus, workers, at_once = _places(assign_trial_gpus(settings, [request]).sweep, most)
    student = _on(request, workers, on_gpus=gpus > 0)
    folder = jobs[0].folder.parent  # Where no run has checkpoints.
    check_fit(student, local_free_bytes(folder, num_workers=workers, num_gpus=gpus))
    pretrained = [(job.folder, request_of(job)) for job in jobs if finished_outcome(job) is None]
    _check_disk_for_all([*pretrained, *[(folder, student)] * most], at_once=at_once)


def _check_disk_for_all(
    requests: Sequence[tuple[Path, ResourceRequest]], *, at_once: int, teacher_bytes: int = 0
) -> None:
    """Refuse trainings that find room on the disk one by one, and not together.

    Args:
        requests: Folder and request of each.
        at_once: How many run, and so write a checkpoint, at the same time.
        teacher_bytes: Of the teacher's answers that will be stored for them.
    """
    disk = local_free_bytes(requests[0][0]).disk if requests else None
    if disk is None:
        return

    def checkpoint_bytes(num_kept: int | None = None) -> int:
        estimates = []
        for folder, own in requests:
            kept = own.recipe.num_checkpoints_kept
            number = min(kept, num_kept or kept)
            estimates.append((folder, own.estimate(num_checkpoints_kept=number)))
        left = [max(0, e.kept_bytes - _checkpoint_bytes(folder)) for folder, e in estimates]
        in_writing = sorted((e.disk_bytes - e.kept_bytes for _, e in estimates), reverse=True)
        return sum(left) + sum(in_writing[:at_once])

    checkpoints = checkpoint_bytes()
    if checkpoints + teacher_bytes <= disk:
        return
    sections = dict.fromkeys(request.section for _, request in requests)
    most = max(request.recipe.num_checkpoints_kept for _, request in requests)
    settings = [
        " ".join(f"--set {section}.num_checkpoints_kept={number}" for section in sections)
        for number in range(most - 1, 0, -1)
        if checkpoint_bytes(number) + teacher_bytes <= disk
    ]
    if checkpoints <= disk:
        settings.append("--set distillation.teacher_cache=live")
    way_out = f"the nearest setting that fits: {settings[0]}; or " if settings else ""
    answers = f" and the teacher's answers {format_bytes(teacher_bytes)}" if teacher_bytes else ""
    raise UserError(
        f"{len(requests)} trainings would write about "
        f"{format_bytes(checkpoints + teacher_bytes)} together (checkpoints "
        f"{format_bytes(checkpoints)}{answers}), and the workspace's disk has "
        f"{format_bytes(disk)} free; {way_out}make room, or choose another place with --workspace"
    )


def _verdicts(
    settings: Settings, workspace: Workspace, request: ResourceRequest, tokens: ExpectedTokens
) -> dict[str, str | None]:
    cluster = settings.cluster

    def here() -> None:
        check_resources(cluster.num_workers, cluster.num_gpus)
        free = local_free_bytes(
            workspace.root, num_workers=request.num_workers, num_gpus=cluster.num_gpus
        )
        check_fit(request, free, new_bytes=tokens.new_bytes)

    verdicts = {THIS_MACHINE: _problem(here)}
    if cluster.num_gpus and installed_gpu() is None:
        place = f"an {ASSUMED_GPU}"
        elsewhere = FreeBytes(memory=ASSUMED_GPU_BYTES, disk=None, place=place)
        verdicts[place] = _problem(lambda: check_fit(request, elsewhere))
    return verdicts


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None


def _checkpoint_bytes(folder: Path) -> int:
    return sum(
        path.stat().st_size
        for checkpoint in find_checkpoints(folder)
        for path in checkpoint.iterdir()
        if path.is_file()
    )
