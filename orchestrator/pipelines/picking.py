"""From a checkpoint or a front to a model that others load: chosen, measured, described, exported,
registered.

The card's numbers are those of the very weights and schedule that are exported: stored results are
found again, missing ones are measured first. What cannot be measured here (an imported model
without tokens, for example) is said, and the export goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from iiet.config import ModelConfig
from iiet.influence import InfluenceTable
from iiet.schedule import IterationSchedule
from orchestrator.pipelines.context import Desk
from orchestrator.pipelines.evaluating import evaluate
from orchestrator.pipelines.exporting import check_target, export
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.reporting.findings import describe_point
from orchestrator.reporting.front_axes import FrontAxes
from orchestrator.reporting.model_card import ModelCard
from orchestrator.reporting.pareto import FrontPoint
from orchestrator.reporting.pick_rules import PickRule, pick_from_front
from orchestrator.reporting.seed_averages import average_seeds, lowest_seed
from orchestrator.reporting.sweep_report import sweep_front
from orchestrator.reporting.sweep_results import (
    item_notes,
    load_item_values,
    load_sweep_results,
    newest_sweep,
)
from orchestrator.settings import Settings
from orchestrator.training.checkpoint import (
    TOKENIZER,
    load_config,
    load_decoder,
    load_provenance,
    read_text_files,
    weights_key,
)
from orchestrator.training.model_lookup import (
    find_checkpoint_by_weights,
    load_influence_table,
    parse_schedule,
    resolve_checkpoint,
    resolve_model,
)
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import resolve_path


def export_model(
    settings: Settings,
    desk: Desk,
    path: Path | None,
    *,
    to: Path | None = None,
    schedule: str | None = None,
    measure: bool = True,
) -> Path:
    """Export a checkpoint with its card.

    Args:
        settings: Section `evaluation` says what the card's quality is measured on.
        desk: Workspace, tracking and terminal.
        path: The checkpoint, its run or the run's name; the workspace's newest model when unset.
        to: The folder to write; under the workspace, named by the run, when unset.
        schedule: Another iteration schedule than the checkpoint's, as typed.
        measure: Whether to evaluate the model for the card.

    Raises:
        UserError: If the checkpoint, the schedule or the folder will not do.
    """
    checkpoint = resolve_model(desk.workspace, path)
    wanted = parse_schedule(schedule, checkpoint)
    name = checkpoint.parent.name + (f"-r{wanted}".replace(",", "") if wanted else "")
    folder = resolve_path(to) if to else desk.workspace.exports / name
    check_target(folder)
    decoder = load_decoder(checkpoint)
    if wanted is not None:
        decoder = decoder.with_schedule(wanted)
    evaluation = None
    if measure:
        try:
            evaluation = evaluate(
                checkpoint,
                settings.evaluation,
                desk.workspace,
                schedule=wanted,
                tracking=desk.tracking,
                progress=desk.progress,
            )
        except (UserError, RunFailed) as error:
            desk.progress.note(f"the card is without quality: {error}")
    return export(
        decoder,
        folder,
        tokenizer_file=_tokenizer(checkpoint),
        text_files=read_text_files(checkpoint),
        card=card_of(
            desk, checkpoint, decoder.config, evaluation, metric=settings.influence.metric
        ),
        progress=desk.progress,
    )


@dataclass(frozen=True)
class Choice:
    """What was picked from a sweep."""

    point: FrontPoint
    """The model with its place."""
    sentence: str
    """What it is, how good, at what cost, how surely."""
    folder: Path | None
    """Where it was exported to; None if it was not."""
    version: str | None
    """Its address in MLflow's registry, as `models:/SWEEP@knee`; None if it was not exported."""


def pick_model(
    desk: Desk,
    name: str | None,
    rule: PickRule,
    *,
    axes: FrontAxes | None = None,
    to: Path | None = None,
    hand_over: bool = True,
) -> Choice:
    """Choose a model from a sweep's front; export and register it.

    Args:
        desk: Workspace, tracking and terminal.
        name: The sweep; the newest when unset.
        rule: How to choose.
        axes: Cost and quality of the front; evaluations and accuracy when unset.
        to: Where to export it; under the workspace when unset.
        hand_over: Whether to export and register it.

    Raises:
        UserError: If there is no such sweep, no model meets the rule, or the model's weights are
            gone.
    """
    sweep = load_sweep_results(desk.workspace, name or newest_sweep(desk.workspace))
    items = load_item_values(desk.workspace, sweep.results)
    for line in item_notes(sweep.results, items):
        desk.progress.note(line)
    front = sweep_front(sweep, items, axes or FrontAxes(), kept_share=rule.share)
    point = pick_from_front(front, rule)
    sentence = describe_point(front, point, kept_share=rule.share)
    keys = average_seeds(sweep.results).keys_of_seeds[point.result.key]
    result = lowest_seed([result for result in sweep.results if result.key in keys])
    if len(keys) > 1:
        number = f"{len(keys)} seeds, its checkpoint is that of seed {result.seed}"
        sentence += f"; its numbers are means over {number}"
    if not hand_over:
        return Choice(point, sentence, None, None)
    if result.checkpoint is None:
        raise UserError(f"the sweep {sweep.name} has no weights of {result.name}")
    checkpoint = resolve_checkpoint(Path(result.checkpoint))
    decoder = load_decoder(checkpoint)
    if result.schedule is not None:
        decoder = decoder.with_schedule(IterationSchedule(result.schedule))
    folder = resolve_path(to) if to else desk.workspace.exports / sweep.name / rule.alias
    card = card_of(
        desk, checkpoint, decoder.config, items.get(result.key), influence=sweep.influence
    )
    export(
        decoder,
        folder,
        tokenizer_file=_tokenizer(checkpoint),
        text_files=read_text_files(checkpoint),
        card=replace(card, chosen=f"`{rule.alias}` of the sweep `{sweep.name}`: {sentence}."),
        progress=desk.progress,
    )
    run = desk.tracking.run(sweep.key, name=sweep.name, kind="sweep")
    run.register(sweep.name, folder, key=result.key, alias=rule.alias, note=sentence)
    run.finish()
    return Choice(point, sentence, folder, f"models:/{sweep.name}@{rule.alias}")


def _tokenizer(checkpoint: Path) -> Path | None:
    file = checkpoint / TOKENIZER
    return file if file.is_file() else None


def card_of(
    desk: Desk,
    checkpoint: Path,
    config: ModelConfig,
    evaluation: EvaluationResult | None,
    *,
    influence: InfluenceTable | None = None,
    metric: str | None = None,
) -> ModelCard:
    """Gather what is known about a checkpoint.

    Args:
        desk: Its workspace holds the teacher, if there is one.
        checkpoint: The model.
        config: Its configuration, with the schedule that is exported.
        evaluation: Its quality, if measured.
        influence: The table that its schedule was chosen by; that of the teacher, else of the
            model itself, when unset.
        metric: The measure of influence that is looked for then.
    """
    provenance = load_provenance(checkpoint)
    teacher = find_checkpoint_by_weights(desk.workspace, str(provenance.get("teacher") or ""))
    origin = teacher or checkpoint
    full = load_config(origin)
    is_cheaper = full.corrections != config.corrections
    return ModelCard(
        name=f"{config.method} {checkpoint.parent.name}",
        config=config,
        provenance={**provenance, "weights": weights_key(checkpoint)},
        evaluation=evaluation,
        influence=influence
        or load_influence_table(origin, metric)
        or load_influence_table(checkpoint, metric),
        full=full if is_cheaper else None,
    )
