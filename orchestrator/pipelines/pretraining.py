"""Pretrain one model or several from fresh weights, under Ray Train or in this process.

A run's folder is named after the model and the hash of all that determines the result, so the same
settings find the same run: a finished one returns at once, an interrupted one resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from orchestrator.cluster.launch import job_runner, joined_cluster
from orchestrator.data.preparation import prepare as prepare_tokens
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.training_dry_runs import check_pretraining
from orchestrator.planning.fit import check_trainings
from orchestrator.planning.resources import check_on_cluster, check_run_resources
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import SETTINGS_NAME, ClusterSettings, Settings, to_yaml
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import TrackedRun
from orchestrator.training.continuing import continue_job, continued_settings
from orchestrator.training.first_stage import share_first_stages
from orchestrator.training.job import finished_outcome
from orchestrator.training.monitor import RunMonitor
from orchestrator.training.pretraining_job import pretraining_job
from orchestrator.workspace.files import write_text
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import Workspace


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """A finished training."""

    checkpoint: Path
    """Folder of the last checkpoint."""
    validation_loss: float
    """Nats per token at the last step; NaN if it was not measured."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row per logged training step."""
        rows: dict[int, dict[str, float]] = {}
        for record in read_journal(self.checkpoint.parent)[0]:
            if record["kind"] == "metrics":
                rows.setdefault(record["step"], {}).update(record["values"])
        return pandas.DataFrame([{"step": step, **rows[step]} for step in sorted(rows)])

    def to_json(self) -> dict[str, Any]:
        """Return checkpoint and loss as JSON values."""
        return {"checkpoint": str(self.checkpoint), "validation_loss": self.validation_loss}

    def shown(self) -> Any:
        """Return the checkpoint."""
        yield f"checkpoint: {self.checkpoint}"

    def raise_failures(self) -> None:
        """Nothing that can be printed has failed."""


def pretrain(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    continued: Path | str | None = None,
    name: str | None = None,
    local: bool = False,
    progress: Progress | None = None,
) -> PretrainResult:
    """Pretrain one model, tokens included; a finished run is found again.

    Args:
        settings: Sections `data`, `model`, `training` and `cluster`.
        continued: Finished run to continue, by path or name; the settings are those in its
            `settings.yaml`, with more steps. The result is bitwise that of one longer training.
        name: Name of the run's folder; made from method, schedule and content when unset.
        local: Train in this process, without Ray.

    Raises:
        UserError: If the settings do not go together or do not fit this machine.
        Interrupted: After Ctrl-C; says at which step the state is saved.
        RunFailed: If the run failed or diverged.
    """
    check_run_resources(settings.cluster, local=local)
    context = open_context(workspace, progress, loggers=settings.tracking.loggers)
    return pretrain_in_context(settings, context, continued=continued, name=name, local=local)


def pretrain_in_context(
    settings: Settings,
    context: Context,
    *,
    continued: Path | str | None = None,
    name: str | None = None,
    local: bool = False,
) -> PretrainResult:
    """Pretrain one model in an open workspace; as `pretrain`, after `check_run_resources`."""
    method, cluster = settings.model.method, settings.cluster
    check = partial(check_on_cluster, cluster)
    joined = joined_cluster(cluster, context.workspace.root, check, context.progress)
    earlier = None
    with nullcontext() if local else joined:
        if continued is None:
            check_pretraining(settings, context.workspace)
            tokens = prepare_tokens(settings.data, context.workspace, context.progress)
        else:
            settings, earlier = continued_settings(settings, context.workspace, Path(continued))
            tokens = Path(earlier.tokens_folder)
        models = {method: settings}
        trained = pretrain_models(models, context, tokens, earlier=earlier, name=name, local=local)
    return trained[method]


def pretrain_models(
    models: Mapping[str, Settings],
    context: Context,
    tokens: Path,
    *,
    earlier: TrainingJob | None = None,
    name: str | None = None,
    local: bool = False,
) -> dict[str, PretrainResult]:
    """Train every model that is not finished; models of one shape share the machine.

    Args:
        models: Label to settings; section `cluster` of the first says where all of them run.
        tokens: Folder of prepared tokens.
        earlier: Finished run that they continue.
        name: Name of the run, for a single model.

    Raises:
        UserError, Interrupted, RunFailed: As `pretrain`; nothing is started after a `UserError`.
    """
    planned = [pretraining_job(own, context.workspace, tokens, name) for own in models.values()]
    if earlier:
        planned = [continue_job(earlier, job, context.progress.note) for job in planned]
    jobs = dict(zip(models, share_first_stages(planned), strict=True))
    cluster = next(iter(models.values())).cluster
    check_trainings(list(jobs.values()), cluster, settings=list(models.values()))
    was_finished = all(finished_outcome(job) for job in jobs.values())
    for label, job in jobs.items():
        write_text(job.folder / SETTINGS_NAME, to_yaml(models[label]))
    with tracked_jobs("pretrain", jobs, models, cluster, context, local=local) as (run_jobs, runs):
        outcomes = dict(zip(runs, run_jobs(), strict=True))
        for label, outcome in outcomes.items():
            runs[label].set_tags(checkpoint_tags(jobs[label], outcome))
    results = {
        label: PretrainResult(
            checkpoint=Path(str(outcome.checkpoint)), validation_loss=outcome.validation_loss
        )
        for label, outcome in outcomes.items()
    }
    losses = [
        f"{label} {result.validation_loss:.3f}"
        for label, result in results.items()
        if not math.isnan(result.validation_loss)
    ]
    found = ", found again" if was_finished else ""
    context.progress.finish(f"validation loss {', '.join(losses)}{found}")
    return results


def checkpoint_tags(job: TrainingJob, outcome: TrainingOutcome) -> dict[str, str]:
    """Return the tags of a finished training's MLflow run: its checkpoint, and its origin."""
    origin = job.continued_from
    tags = {"iiet.continued_from": origin} if origin else {}
    return {"iiet.checkpoint": str(outcome.checkpoint), **tags}


@contextmanager
def tracked_jobs(
    kind: str,
    jobs: Mapping[str, TrainingJob],
    settings: Mapping[str, Settings],
    cluster: ClusterSettings,
    context: Context,
    *,
    local: bool,
) -> Iterator[tuple[Callable[[], list[TrainingOutcome]], dict[str, TrackedRun]]]:
    """Follow jobs with the progress display and in MLflow for the length of a `with` block.

    Yields:
        A function that runs the jobs, to be called once, and the MLflow run of each label.
    """
    progress = context.progress
    monitor = RunMonitor(jobs, context.tracking, progress)
    runs = monitor.open_runs(kind, settings)
    if any(job.recipe.profile_steps and finished_outcome(job) for job in jobs.values()):
        progress.note("no profile of a run that is finished: no step is trained")
    progress.start(kind, sum(job.recipe.num_steps for job in jobs.values()))
    # A `partial` adds no call of this repository to the path that a debugger shows.
    run_jobs = partial(job_runner(local=local), list(jobs.values()), cluster, watch=monitor.poll)
    with monitor:
        yield partial(run_jobs, note=progress.note, say=partial(progress.advance, 0)), runs
