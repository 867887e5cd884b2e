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
from orchestrator.planning.memory import Wish, check_fit, needed_memory
from orchestrator.planning.resources import Room, check_resources, local_resources, local_room
from orchestrator.planning.training_cost import TrainingEstimate
from orchestrator.settings import ClusterSettings, Settings, SweepSettings
from orchestrator.terminal.formatting import format_bytes
from orchestrator.training.checkpoint import find_checkpoints, load_config
from orchestrator.training.job import DONE_NAME, TrainingJob, finished_outcome
from orchestrator.training.model_config import model_config
from orchestrator.training.speed import ASSUMED_GPU, ASSUMED_GPU_BYTES, installed_gpu
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import Workspace

HERE = "this machine"


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What is known of a pretraining before it begins."""

    settings: Settings
    tokens: ExpectedTokens
    wish: Wish
    estimate: TrainingEstimate
    verdicts: dict[str, str | None]
    """By place, why it does not fit there; None where it does. The first is this machine."""
    is_memory_known: bool
    """Whether this machine's memory counts; it does not where `RAY_ADDRESS` names a cluster."""

    @property
    def num_workers(self) -> int:
        """Data-parallel workers."""
        return self.wish.num_workers


def preflight(settings: Settings, workspace: Workspace) -> Preflight:
    """Look at a pretraining, and start nothing.

    Args:
        settings: The whole tree.
        workspace: Where it would live; it need not exist.

    Raises:
        UserError: If the settings cannot be met anywhere: sizes that do not go together, files that
            are missing.
    """
    tokens = expected_tokens(settings.data, find_prepared(settings.data, workspace.tokens))
    wish = pretraining_wish(settings, tokens.vocab_size)
    estimate = wish.estimate()
    return Preflight(
        settings=settings,
        tokens=tokens,
        wish=wish,
        estimate=estimate,
        verdicts=_verdicts(settings, workspace, wish, tokens),
        is_memory_known=local_room(workspace.root).memory is not None,
    )


def check_preflight(settings: Settings, workspace: Workspace) -> None:
    """Refuse a pretraining that has no room here, before its text is read.

    Raises:
        UserError: If it does not fit, or cannot be met anywhere; says what would fit.
    """
    found = preflight(settings, workspace)
    problem = found.verdicts[HERE]
    # With its tokens there, the run itself is known: what it has on disk counts for it.
    if problem and not found.tokens.num_train_tokens:
        raise UserError(problem)


def pretraining_wish(settings: Settings, vocab_size: int) -> Wish:
    """Return what the settings ask for, for a tokenizer of so many entries."""
    cluster = settings.cluster
    return Wish(
        config=model_config(settings.model, vocab_size=vocab_size),
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
    wishes = []
    for number, job in enumerate(jobs):
        if job not in waiting:
            continue
        wish = replace(
            _on(wish_of(job), num_workers, on_gpus=cluster.num_gpus > 0),
            parallel=cluster.parallel,
            model=settings[number].model if settings else None,
        )
        room = local_room(job.folder, num_workers=num_workers * at_once, num_gpus=cluster.num_gpus)
        check_fit(wish, room, present_bytes=_checkpoint_bytes(job.folder))
        wishes.append((job.folder, wish))
    _check_disk_for_all(wishes, at_once=at_once)


def place_trials(settings: Settings, wishes: Sequence[Wish] = ()) -> Settings:
    """Return the settings with the GPUs of a sweep's trials filled in.

    On a run that has GPUs, a trial takes the fewest on which every trial fits, and no more trials
    run side by side than the run's GPUs have room for.

    Args:
        settings: The whole tree.
        wishes: Of the trials that wait; a trial takes one GPU as long as they are not known.

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
        own = sweep.workers_per_trial if several else _fewest_gpus(wishes, num_gpus)
    if own > num_gpus:
        raise UserError(
            f"a trial asks for {own} GPUs (sweep.gpus_per_trial, sweep.workers_per_trial), and the "
            f"run has {num_gpus} (cluster.num_gpus); lower the one or raise the other"
        )
    at_once = min(sweep.trials_at_once or num_gpus, num_gpus // own)
    return _with_sweep(settings, gpus_per_trial=own, trials_at_once=at_once)


def _with_sweep(settings: Settings, **changes: int) -> Settings:
    return settings.model_copy(update={"sweep": settings.sweep.model_copy(update=changes)})


def _fewest_gpus(wishes: Sequence[Wish], most: int) -> int:
    """Return the fewest GPUs on which each trial fits; all if none are enough."""
    free = local_room(Path.cwd(), num_gpus=1).memory or ASSUMED_GPU_BYTES
    return next((n for n in range(1, most) if all(_fits(wish, n, free) for wish in wishes)), most)


def _fits(wish: Wish, num_gpus: int, free: int) -> bool:
    try:
        return needed_memory(_on(wish, num_gpus, on_gpus=True).estimate()) <= free
    except UserError:
        return False  # So many workers cannot share a step evenly.


def _on(wish: Wish, num_workers: int, *, on_gpus: bool) -> Wish:
    return replace(wish, num_workers=num_workers, on_gpus=on_gpus)


def wish_of(job: TrainingJob) -> Wish:
    """Return what a training asks for, before it is known on what it runs."""
    return Wish(
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
    wishes = []
    for job in jobs:
        wish = _on(wish_of(job), workers, on_gpus=gpus > 0)
        alone = local_room(job.folder, num_workers=workers, num_gpus=gpus)
        check_fit(wish, alone, present_bytes=_checkpoint_bytes(job.folder))
        if not (job.folder / DONE_NAME).is_file():  # Trained, and only measured now.
            wishes.append((job.folder, wish))
        if alone.memory is None or gpus:
            continue
        needed = needed_memory(wish.estimate())
        most = alone.memory // needed
        if most < at_once:
            raise UserError(
                f"{at_once} trials at once would take about "
                f"{format_bytes(at_once * workers * needed)} of "
                f"memory, and this machine has {format_bytes(workers * alone.memory)} free; the "
                f"nearest setting that fits: --set sweep.trials_at_once={most}"
            )
    _check_disk_for_all(wishes, at_once=at_once, teacher_bytes=teacher_bytes)


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
    wish = Wish(
        config=teacher,
        recipe=distillation.training,
        section="distillation.training",
        teacher=teacher if distillation.control == "distill" else None,
    )
    gpus, workers, at_once = _places(place_trials(settings, [wish]).sweep, most)
    student = _on(wish, workers, on_gpus=gpus > 0)
    folder = jobs[0].folder.parent  # Where no run has checkpoints.
    check_fit(student, local_room(folder, num_workers=workers, num_gpus=gpus))
    pretrained = [(job.folder, wish_of(job)) for job in jobs if finished_outcome(job) is None]
    _check_disk_for_all([*pretrained, *[(folder, student)] * most], at_once=at_once)


def _check_disk_for_all(
    wishes: Sequence[tuple[Path, Wish]], *, at_once: int, teacher_bytes: int = 0
) -> None:
    """Refuse trainings that find room on the disk one by one, and not together.

    Args:
        wishes: Folder and wish of each.
        at_once: How many run, and so write a checkpoint, at the same time.
        teacher_bytes: Of the teacher's answers that will be stored for them.
    """
    disk = local_room(wishes[0][0]).disk if wishes else None
    if disk is None:
        return

    def checkpoint_bytes(num_kept: int | None = None) -> int:
        estimates = []
        for folder, own in wishes:
            kept = own.recipe.num_checkpoints_kept
            number = min(kept, num_kept or kept)
            estimates.append((folder, own.estimate(num_checkpoints_kept=number)))
        left = [max(0, e.kept_bytes - _checkpoint_bytes(folder)) for folder, e in estimates]
        in_writing = sorted((e.disk_bytes - e.kept_bytes for _, e in estimates), reverse=True)
        return sum(left) + sum(in_writing[:at_once])

    checkpoints = checkpoint_bytes()
    if checkpoints + teacher_bytes <= disk:
        return
    sections = dict.fromkeys(wish.section for _, wish in wishes)
    most = max(wish.recipe.num_checkpoints_kept for _, wish in wishes)
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
        f"{len(wishes)} trainings would write about {format_bytes(checkpoints + teacher_bytes)} "
        f"together (checkpoints {format_bytes(checkpoints)}{answers}), and the workspace's disk "
        f"has {format_bytes(disk)} free; {way_out}make room, or choose another place with "
        "--workspace"
    )


def _verdicts(
    settings: Settings, workspace: Workspace, wish: Wish, tokens: ExpectedTokens
) -> dict[str, str | None]:
    cluster = settings.cluster

    def here() -> None:
        check_resources(cluster.num_workers, cluster.num_gpus)
        room = local_room(workspace.root, num_workers=wish.num_workers, num_gpus=cluster.num_gpus)
        check_fit(wish, room, new_bytes=tokens.new_bytes)

    verdicts = {HERE: _problem(here)}
    if cluster.num_gpus and installed_gpu() is None:
        place = f"an {ASSUMED_GPU}"
        elsewhere = Room(memory=ASSUMED_GPU_BYTES, disk=None, place=place)
        verdicts[place] = _problem(lambda: check_fit(wish, elsewhere))
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
