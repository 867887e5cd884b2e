"""Choose a model from a sweep's front, export it and register it in MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from iiet.schedule import IterationSchedule
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.exporting import export_checkpoint, model_card
from orchestrator.pipelines.result import Result
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.trial import Trial
from orchestrator.reporting.drafts import draft_sentence, draft_targets
from orchestrator.reporting.findings import describe_point
from orchestrator.reporting.front_axes import parse_axes
from orchestrator.reporting.mlflow_report import run_name
from orchestrator.reporting.model_card import ModelCard
from orchestrator.reporting.pareto import FrontPoint
from orchestrator.reporting.pick_rules import PickRule, pick_from_front
from orchestrator.reporting.results import (
    StoredSweep,
    load_item_values,
    load_sweep_results,
    lowest_seed,
    newest_sweep,
)
from orchestrator.reporting.sweep_report import sweep_front
from orchestrator.terminal.progress import Progress
from orchestrator.training.model_config import model_family
from orchestrator.training.model_loading import load_model
from orchestrator.training.model_lookup import Picked, resolve_checkpoint
from orchestrator.training.tracked_models import trial_model
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import resolve_path
from orchestrator.workspace.layout import Workspace


class PickResult(Result):
    """The model that was picked from a sweep."""

    alias: str
    """The rule."""
    point: FrontPoint
    """The model with its place on the front."""
    model: Trial
    """The one whose weights are used: of several seeds the lowest, of a draft its full model."""
    sentence: str
    """Its schedule, quality and cost, and how certain they are."""
    folder: Path | None
    """Where it was exported to; None if it was not."""
    version: str | None
    """Its address in MLflow's registry, as `models:/iiet-tiny@knee`; None if it was not exported.

    The name is that of method and preset, and the alias that of the rule. So another pick by the
    same rule, also from another sweep, moves the alias to its own version.
    """

    def rows(self) -> list[dict[str, Any]]:
        """Return one row: the model's parameters and metrics."""
        result = self.point.result
        return [{"name": result.name, **result.params(), **result.metrics()}]

    def to_json(self) -> dict[str, Any]:
        """Return the model, its numbers, and where it was exported and registered."""
        result = self.point.result
        return {
            "name": result.name,
            "method": result.method,
            "schedule": result.schedule,
            "sentence": self.sentence,
            "metrics": result.metrics(),
            "checkpoint": result.checkpoint,
            "folder": self.folder and str(self.folder),
            "version": self.version,
        }

    def shown(self) -> Iterator[str]:
        """Return the choice, and where it is."""
        yield f"{self.alias}: {self.sentence}"
        if self.folder is None:
            yield f"checkpoint: {self.point.result.checkpoint}"
        else:
            yield f"exported: {self.folder}"
            yield f"registered: {self.version}"


def pick(
    *,
    workspace: Workspace | Path | str,
    sweep: str | None = None,
    rule: PickRule | None = None,
    cost: str | None = None,
    quality: str | None = None,
    to: Path | str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PickResult:
    """Choose a model from a sweep's front; export and register it.

    `generate` then takes it by default, until a model is trained or imported.

    Args:
        sweep: Name of the sweep; the newest when unset.
        rule: How to choose; the cheapest that keeps 99% of the quality when unset.
        cost, quality: Axes of the front, as in `report`.
        to: Folder to export to; under the workspace when unset.
        force: Replace an export of another model there.
        dry_run: Choose only; export and register nothing.

    Raises:
        UserError: If there is no such sweep, no model meets the rule, its weights are gone, or the
            folder cannot be used.
    """
    if dry_run and to is not None:
        raise UserError("--dry-run exports nothing, and --to says where to; leave one out")
    rule = rule or PickRule(name="keep")
    axes = parse_axes(cost, quality)
    context = open_context(workspace, progress)
    found = load_sweep_results(context.workspace, sweep or newest_sweep(context.workspace))
    front, notes = sweep_front(context.workspace, found, axes, kept_share=rule.share)
    for line in notes:
        context.progress.note(line)
    point = pick_from_front(front, rule)
    sentence = describe_point(front, point, kept_share=rule.share)
    seeds = front.seeds_of(point)
    result = lowest_seed(seeds)
    if rule.name == "draft":
        full = draft_targets(found.results)[result.key]
        sentence += f"; {draft_sentence(point.result, full.name)}"
        # A cheaper schedule of the same weights is no model of its own: the full one is exported.
        result = full if full.checkpoint == result.checkpoint else result
    if len(seeds) > 1:
        number = f"{len(seeds)} seeds, its checkpoint is that of seed {result.seed}"
        sentence += f"; its numbers are means over {number}"
    if dry_run:
        return PickResult(
            alias=rule.alias,
            point=point,
            model=result,
            sentence=sentence,
            folder=None,
            version=None,
        )
    items = load_item_values(context.workspace, [result])
    folder = resolve_path(to) if to else context.workspace.exports / found.name / rule.alias
    chosen = f"`{rule.alias}` of the sweep `{found.name}`: {sentence}."
    replaces = force or to is None  # The workspace's own folder is that of the rule.
    card = _export(found, result, items.get(result.key), folder, chosen, context, replaces)
    name = model_family(card.config)
    model = trial_model(result)
    assert model is not None  # Its checkpoint was read a moment ago.
    sweep_run = context.tracking.handle(found.key, name=found.name, kind="sweep")
    run = context.tracking.handle(
        result.key, name=run_name(result), kind=result.role, parent=sweep_run
    )
    tags = {"sweep": found.name, "schedule": result.schedule_text}
    tags |= {axis: f"{result.value(axis):.6g}" for axis in (front.axes.cost, front.axes.quality)}
    run.register(
        name,
        folder,
        model=model,
        alias=rule.alias,
        note=sentence,
        tags={tag: text for tag, text in tags.items() if text},
        example=card.prompt,
    )
    run.finish()
    assert result.checkpoint is not None
    Picked(
        sweep=found.name,
        checkpoint=str(resolve_checkpoint(Path(result.checkpoint))),
        schedule=result.schedule,
        time=time.time(),
    ).write(context.workspace.picked)
    return PickResult(
        alias=rule.alias,
        point=point,
        model=result,
        sentence=sentence,
        folder=folder,
        version=f"models:/{name}@{rule.alias}",
    )


def _export(
    sweep: StoredSweep,
    result: Trial,
    evaluation: EvaluationResult | None,
    folder: Path,
    chosen: str,
    context: Context,
    replaces: bool,
) -> ModelCard:
    if result.checkpoint is None:
        raise UserError(f"the sweep {sweep.name} has no weights of {result.name}")
    checkpoint = resolve_checkpoint(Path(result.checkpoint))
    schedule = None if result.schedule is None else IterationSchedule(result.schedule)
    decoder = load_model(checkpoint, schedule=schedule)
    card = model_card(context, checkpoint, decoder.config, evaluation, influence=sweep.influence)
    card = replace(card, chosen=chosen)
    export_checkpoint(
        checkpoint, folder, decoder=decoder, card=card, replaces=replaces, progress=context.progress
    )
    return card
