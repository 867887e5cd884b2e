"""From a checkpoint to a model that others load: measured, described, exported.

The card's numbers are those of the very weights and schedule that are exported: stored results are
found again, missing ones are measured first. What cannot be measured here (an imported model
without tokens, for example) is said, and the export goes on.
"""

from __future__ import annotations

from pathlib import Path

from iiet.config import ModelConfig
from orchestrator.analysis.card import ModelCard
from orchestrator.analysis.evaluation import EvaluationResult
from orchestrator.catalog import (
    find_by_weights,
    parse_schedule,
    resolve_teacher,
    stored_influence,
)
from orchestrator.errors import StageFailed, UserError
from orchestrator.procedure import Desk
from orchestrator.settings import Settings
from orchestrator.stages.evaluate import evaluate
from orchestrator.stages.export import check_target, export
from orchestrator.training.checkpoint import (
    TOKENIZER,
    load_config,
    load_decoder,
    load_provenance,
    weights_key,
)


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
        path: The checkpoint or its run; the workspace's newest IIET when unset.
        to: The folder to write; under the workspace, named by the run, when unset.
        schedule: Another iteration schedule than the checkpoint's, as typed.
        measure: Whether to evaluate the model for the card.

    Raises:
        UserError: If the checkpoint, the schedule or the folder will not do.
    """
    checkpoint = resolve_teacher(desk.workspace, path)
    wanted = parse_schedule(schedule, checkpoint)
    name = checkpoint.parent.name + (f"-r{wanted}".replace(",", "") if wanted else "")
    folder = to.expanduser().resolve() if to else desk.workspace.exports / name
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
        except (UserError, StageFailed) as error:
            desk.progress.note(f"the card is without quality: {error}")
    tokenizer = checkpoint / TOKENIZER
    return export(
        decoder,
        folder,
        tokenizer_file=tokenizer if tokenizer.is_file() else None,
        card=card_of(desk, checkpoint, decoder.config, evaluation),
        progress=desk.progress,
    )


def card_of(
    desk: Desk, checkpoint: Path, config: ModelConfig, evaluation: EvaluationResult | None
) -> ModelCard:
    """Gather what is known about a checkpoint.

    Args:
        desk: Its workspace holds the teacher, if there is one.
        checkpoint: The model.
        config: Its configuration, with the schedule that is exported.
        evaluation: Its quality, if measured.
    """
    provenance = load_provenance(checkpoint)
    teacher = find_by_weights(desk.workspace, str(provenance.get("teacher") or ""))
    origin = teacher or checkpoint
    full = load_config(origin)
    is_cheaper = full.corrections != config.corrections
    return ModelCard(
        name=f"{config.method} {checkpoint.parent.name}",
        config=config,
        provenance={**provenance, "weights": weights_key(checkpoint)},
        evaluation=evaluation,
        influence=stored_influence(checkpoint) or stored_influence(origin),
        full=full if is_cheaper else None,
    )
