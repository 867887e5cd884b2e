"""Dry runs of one training: what it would do and take. Nothing is started, measured or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from iiet.schedule import IterationSchedule
from orchestrator.data.preparation import ExpectedTokens, expected_tokens, find_prepared
from orchestrator.pipelines.context import open_context
from orchestrator.pipelines.hub_imports import local_model
from orchestrator.planning.fit import check_fit, find_problems
from orchestrator.planning.planned_training import PlannedTraining, planned_training
from orchestrator.planning.price import PlannedWork, Price, pretraining_group
from orchestrator.planning.resources import check_run_resources
from orchestrator.records.training import TrainingJob
from orchestrator.reporting.price_table import price_rows, training_rows
from orchestrator.settings import Settings
from orchestrator.sweeping.student_plans import distillation_job
from orchestrator.training.continuing import continue_job, continued_settings
from orchestrator.training.job import finished_outcome
from orchestrator.training.model_lookup import resolve_teacher, tokens_folder_of
from orchestrator.training.pretraining_job import pretraining_job
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.read_only import read_only

UNPREPARED = (
    "the tokens are not prepared, so no finished training can be found; their number is that of "
    "the settings"
)


@dataclass(frozen=True, kw_only=True)
class TrainingDryRun:
    """What one training would do, and what it takes."""

    training: PlannedTraining
    """The training, on the devices of the settings."""
    tokens: ExpectedTokens | None
    """Tokens of a pretraining, prepared or not."""
    state: str
    """Whether it is finished, or where it begins."""
    price: Price
    """Tokens, FLOPs, hours, memory and disk of what is left."""
    problems: Mapping[str, str | None]
    """Place -> why the training does not fit there; None if it does. The first is this machine."""

    @property
    def rows(self) -> list[tuple[str, str]]:
        """All of it in words, as name and text."""
        return [
            *training_rows(self.training, self.tokens),
            ("state", self.state),
            *price_rows(self.price, self.problems),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the model, the state, the price, and what does not fit, as JSON values."""
        config = self.training.config
        return {
            "method": config.method,
            "schedule": list(config.corrections),
            "state": self.state,
            "price": self.price.model_dump(mode="json"),
            "problems": dict(self.problems),
        }

    def shown(self) -> Any:
        """Return the plan and its price."""
        from orchestrator.reporting.price_table import two_column_table
        from orchestrator.terminal.render import format_count

        training = self.training
        workers = format_count(training.num_workers, "GPU" if training.on_gpus else "CPU worker")
        yield two_column_table(f"Plan: {training.config.method}, {workers}", self.rows)

    def raise_failures(self) -> None:
        """Nothing that can be printed has failed."""


@read_only()
def plan_pretrain(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    continued: Path | str | None = None,
    name: str | None = None,
    mfu: float | None = None,
) -> TrainingDryRun:
    """Return what `pretrain` would do with the same arguments, and what that takes.

    Args:
        mfu: Share of the peak FLOP/s that training is assumed to reach; a usual range if unset.

    Raises:
        UserError: If the settings do not go together on any machine.
    """
    space = open_context(workspace).workspace
    if continued is None:
        prepared = find_prepared(settings.data, space.tokens)
        job = pretraining_job(settings, space, prepared, name)
    else:
        settings, earlier = continued_settings(settings, space, Path(continued))
        prepared = Path(earlier.tokens_folder)
        longer = pretraining_job(settings, space, prepared, name)
        job = continue_job(earlier, longer, note=lambda _: None)
    tokens = expected_tokens(settings.data, prepared)
    return _dry_run(job, settings, space, tokens=tokens, mfu=mfu)


@read_only()
def plan_distill(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    schedule: str | IterationSchedule,
    teacher: Path | str | None = None,
) -> TrainingDryRun:
    """Return what `distill` would do with the same arguments, and what that takes.

    Raises:
        UserError: As `distill`.
    """
    context = open_context(workspace)
    space = context.workspace
    checkpoint = resolve_teacher(space, local_model(context, teacher))
    tokens = tokens_folder_of(checkpoint, space)
    job = distillation_job(settings, space, checkpoint, str(schedule), tokens)
    return _dry_run(job, settings, space)


def check_pretraining(settings: Settings, workspace: Workspace) -> None:
    """Refuse a pretraining whose memory or disk this machine lacks, before its text is read.

    If its tokens are prepared, `check_trainings` decides.

    Raises:
        UserError: If it does not fit, or no machine could run it; says what would fit.
    """
    if find_prepared(settings.data, workspace.tokens) is None:
        job = pretraining_job(settings, workspace, None)
        check_fit(_work(job, settings, workspace, expected_tokens(settings.data, None)))


def _work(
    job: TrainingJob, settings: Settings, workspace: Workspace, tokens: ExpectedTokens | None
) -> PlannedWork:
    model = settings.model if job.objective == "pretrain" else None
    training = replace(planned_training(job), model=model)
    return PlannedWork(
        groups=[pretraining_group([training], settings.cluster)],
        folder=workspace.root,
        new_token_bytes=tokens.new_bytes if tokens else 0,
        address=settings.cluster.ray_address,
    )


def _dry_run(
    job: TrainingJob,
    settings: Settings,
    workspace: Workspace,
    *,
    tokens: ExpectedTokens | None = None,
    mfu: float | None = None,
) -> TrainingDryRun:
    work = _work(job, settings, workspace, tokens)
    (training,) = work.trainings
    damaged: list[str] = []
    if not job.tokens_folder:
        state = UNPREPARED
    elif finished_outcome(job, damaged.append):
        state, work = f"finished: {job.folder}", replace(work, groups=[])
    else:
        state = f"from step {training.steps_done:,}" if training.steps_done else "not begun"
        state = "; ".join([*damaged, state])
    return TrainingDryRun(
        training=training,
        tokens=tokens,
        state=state,
        price=work.price(mfu),
        problems=find_problems(work, partial(check_run_resources, settings.cluster)),
    )
