"""Stage `pretrain`: one model or several from fresh weights, through Ray Train or in this process.

A run's folder is named after what it is and the hash of all that determines its result, so the same
settings find the same run: finished, it returns at once; interrupted, it goes on. Several models of
one shape share the machine side by side. The workers write only journals; this process follows them
for the progress bar and copies them into MLflow, so that a tracking server can neither slow
training nor stop it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from iiet.methods import METHODS
from orchestrator.cluster.launch import check_jobs, run_jobs
from orchestrator.data.tokens import open_tokens
from orchestrator.planning.preflight import check_jobs_fit
from orchestrator.settings import Settings, flatten, to_yaml
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import Tracking
from orchestrator.training.first_stage import with_common_first_stages
from orchestrator.training.job import TrainingJob, finished_outcome, job_key
from orchestrator.training.model_config import model_config
from orchestrator.training.monitor import JournalFollower
from orchestrator.workspace.files import write_text
from orchestrator.workspace.folders import Workspace

KEY_CHARACTERS = 8


def plan_pretraining(
    settings: Settings, workspace: Workspace, tokens: Path, name: str | None = None
) -> TrainingJob:
    """Return the job that pretrains the model of these settings.

    Args:
        settings: Sections `model` and `training` count.
        workspace: Where the run lives.
        tokens: Folder of prepared tokens.
        name: Name of the run's folder; made from method, schedule and content when unset.

    Raises:
        UserError: If the model's sizes do not go together.
    """
    config = model_config(settings.model, vocab_size=open_tokens(tokens).vocab_size)
    job = TrainingJob(
        run_folder="",
        tokens_folder=str(tokens),
        model=config.to_dict(),
        recipe=settings.training,
        first_stages=str(workspace.first_stages),
        storage=settings.cluster.storage,
    )
    if name is None:
        counts = sorted(set(config.corrections))
        schedule = f"-r{counts[0]}" if len(counts) == 1 else "-ragged"
        middle = schedule if METHODS[config.method].has_corrections else ""
        name = f"{config.method}{middle}-{job_key(job)[:KEY_CHARACTERS]}"
    return replace(job, run_folder=str(workspace.runs / name))


def pretrain(
    variants: Mapping[str, Settings],
    workspace: Workspace,
    tokens: Path,
    *,
    tracking: Tracking,
    name: str | None = None,
    local: bool = False,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Train every model that is not finished, and return their checkpoints.

    Args:
        variants: Label to settings; section `cluster` of the first says on what they run.
        workspace: Where the runs live.
        tokens: Folder of prepared tokens.
        tracking: Where the runs are shown.
        name: Name of the run, for a single model.
        local: Train in this process, without Ray.
        progress: Told what is going on.

    Returns:
        Label to the folder of the last checkpoint.

    Raises:
        UserError: If something does not go together; nothing is started then.
        Interrupted: After Ctrl-C; says at which step the state is saved.
        RunFailed: If a run failed or diverged.
    """
    progress = progress or Progress()
    planned = [plan_pretraining(own, workspace, tokens, name) for own in variants.values()]
    jobs = dict(zip(variants, with_common_first_stages(planned), strict=True))
    cluster = next(iter(variants.values())).cluster
    check_jobs(list(jobs.values()), cluster, local=local)
    check_jobs_fit(list(jobs.values()), cluster, settings=list(variants.values()))
    was_finished = all(finished_outcome(job) for job in jobs.values())
    for label, job in jobs.items():
        write_text(job.folder / "settings.yaml", to_yaml(variants[label]))
    follower = JournalFollower(jobs, tracking, progress)
    runs = follower.open_runs("pretrain", {label: flatten(s) for label, s in variants.items()})
    progress.start("pretrain", sum(job.recipe.num_steps for job in jobs.values()))
    with follower:
        outcomes = run_jobs(
            list(jobs.values()),
            cluster,
            local=local,
            watch=follower.look,
            note=progress.note,
            say=partial(progress.advance, 0),
        )
    losses = []
    checkpoints = {}
    for (label, run), outcome in zip(runs.items(), outcomes, strict=True):
        run.set_tags({"iiet.checkpoint": str(outcome.checkpoint)})
        if not math.isnan(outcome.validation_loss):
            losses.append(f"{label} {outcome.validation_loss:.3f}")
        checkpoints[label] = Path(str(outcome.checkpoint))
    found = ", found again" if was_finished else ""
    progress.finish(f"validation loss {', '.join(losses)}{found}")
    return checkpoints
