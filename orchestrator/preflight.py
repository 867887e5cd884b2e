"""Looks at a pretraining before it begins: what it will take, and whether there is room for it.

The tokens need not be prepared, and no GPU need be there: what is not known yet is assumed, and
said. A dry run shows what comes out; a real run is refused here, in a moment, before text is read
or a process is started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.prepared import ExpectedTokens, expected_tokens, find_prepared
from orchestrator.errors import UserError
from orchestrator.resources import Room, check_resources, local_resources, local_room
from orchestrator.settings import ClusterSettings, Settings, SweepSettings
from orchestrator.training.checkpoint import find_checkpoints, load_config
from orchestrator.training.estimate import TrainingEstimate
from orchestrator.training.fitting import Wish, check_fit, gib, needed_memory
from orchestrator.training.job import TrainingJob, finished_outcome
from orchestrator.training.shape import model_config
from orchestrator.training.speed import ASSUMED_GPU, ASSUMED_GPU_BYTES, installed_gpu
from orchestrator.workspace import Workspace

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
    section: str = "training",
    settings: Sequence[Settings] = (),
) -> None:
    """Refuse jobs that would run out of memory or disk; those that are finished need nothing.

    Args:
        jobs: What will run, side by side as far as there are places.
        cluster: Workers and GPUs of each.
        section: Where their recipe stands in the settings, for what to type.
        settings: Of each job, where another size of model would do too.

    Raises:
        UserError: If one does not fit; says what would.
    """
    num_workers = cluster.num_gpus or cluster.num_workers
    waiting = [job for job in jobs if finished_outcome(job) is None]
    # On GPUs, each job has its own; on CPUs, those that run at the same time share the memory.
    places = local_resources(count_gpus=False).cpus // num_workers
    at_once = max(1, min(len(waiting), places))
    for number, job in enumerate(jobs):
        if job not in waiting:
            continue
        wish = Wish(
            config=job.config(),
            recipe=job.recipe,
            section=section,
            num_workers=num_workers,
            parallel=cluster.parallel,
            on_gpus=cluster.num_gpus > 0,
            model=settings[number].model if settings else None,
            teacher=load_config(Path(job.teacher_folder)) if job.teacher_folder else None,
        )
        room = local_room(job.folder, num_workers=num_workers * at_once, num_gpus=cluster.num_gpus)
        check_fit(wish, room, present_bytes=_checkpoint_bytes(job.folder))


def check_trials_fit(jobs: Sequence[TrainingJob], sweep: SweepSettings, *, section: str) -> None:
    """Refuse a sweep's trials that would run out of this machine's memory, each by its own needs.

    Args:
        jobs: Of the trials that wait.
        sweep: How many run at once, with how many workers or GPUs each.
        section: Where their recipe stands in the settings, for what to type.

    Raises:
        UserError: If one does not fit; says what would.
    """
    workers, gpus = sweep.gpus_per_trial or sweep.workers_per_trial, sweep.gpus_per_trial
    places = max(1, local_resources(count_gpus=False).cpus // workers)
    at_once = min(sweep.trials_at_once or places, places, len(jobs))
    for job in jobs:
        wish = Wish(
            config=job.config(),
            recipe=job.recipe,
            section=section,
            num_workers=workers,
            on_gpus=gpus > 0,
            teacher=load_config(Path(job.teacher_folder)) if job.teacher_folder else None,
        )
        alone = local_room(job.folder, num_workers=workers, num_gpus=gpus)
        check_fit(wish, alone, present_bytes=_checkpoint_bytes(job.folder))
        if alone.memory is None or gpus:
            continue
        needed = needed_memory(wish.estimate())
        most = alone.memory // needed
        if most < at_once:
            raise UserError(
                f"{at_once} trials at once would take about {gib(at_once * workers * needed)} of "
                f"memory, and this machine has {gib(workers * alone.memory)} free; the nearest "
                f"setting that fits: --set sweep.trials_at_once={most}"
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
