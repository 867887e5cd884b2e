"""Export a checkpoint as a folder that transformers and lm-eval load without this package.

The folder holds weights, tokenizer, the model's code and a card with the quality of these weights
under this schedule. It is complete once it has its own name. `MANIFEST.sha256` lists all files for
`sha256sum --check`; a folder with other or changed files is never overwritten.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.influence import InfluenceTable
from iiet.weights import CONFIG
from orchestrator.cluster.launch import command_device
from orchestrator.data.tokenizer import end_of_text_id, load_tokenizer
from orchestrator.evaluation.evaluated_model import open_model
from orchestrator.evaluation.model_tokenizer import PlainTokenizer
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.evaluating import evaluate_model
from orchestrator.pipelines.hub_imports import local_model
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.reporting.model_card import ModelCard
from orchestrator.settings import Settings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes
from orchestrator.training.checkpoint import (
    TOKEN_IDS,
    TOKENIZER,
    load_config,
    load_provenance,
    read_text_files,
    served_schedules,
    weights_key,
)
from orchestrator.training.model_loading import EXPORTED_TYPE, decoder_config, load_model
from orchestrator.training.model_lookup import (
    find_checkpoint_by_weights,
    load_influence_table,
    parse_schedule,
    resolve_model,
)
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import new_folder, resolve_path, write_text
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.provenance import file_digest

CARD = "README.md"
MANIFEST = "MANIFEST.sha256"


def export(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    model: Path | str | None = None,
    to: Path | str | None = None,
    schedule: str | None = None,
    measure: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export a checkpoint with its card, and return the folder.

    Args:
        settings: Section `evaluation`: tasks for the card's quality.
        model: A checkpoint or run, by path or name; the newest IIET or imported model when unset.
        to: Folder to write; under the workspace, named by the run, when unset.
        schedule: Iteration schedule as typed, if not the checkpoint's own.
        measure: Evaluate the model for the card. If that fails, the card is without quality.
        force: Replace an export of another model in `to`.

    Raises:
        UserError: If the checkpoint, the schedule or the folder cannot be used.
    """
    context = open_context(workspace, progress)
    checkpoint = resolve_model(context.workspace, local_model(context, model))
    wanted = parse_schedule(schedule, checkpoint)
    name = checkpoint.parent.name + (f"-r{wanted}".replace(",", "") if wanted else "")
    folder = resolve_path(to) if to else context.workspace.exports / name
    decoder = load_model(checkpoint, schedule=wanted)
    replaces = force or to is None  # The workspace's own folder is that of the run.
    check_target(folder, None if replaces else (checkpoint, decoder.config))
    evaluation = None
    if measure:
        try:
            subject = open_model(checkpoint, wanted, warn=context.progress.note)
            device = command_device(settings.cluster, context.workspace.root)
            evaluation = evaluate_model(subject, settings.evaluation, context, on_device=device)
        except (UserError, RunFailed) as error:
            context.progress.note(f"the card is without quality: {error}")
    card = model_card(
        context, checkpoint, decoder.config, evaluation, metric=settings.influence.metric
    )
    return export_checkpoint(
        checkpoint,
        folder,
        decoder=decoder,
        card=card,
        replaces=replaces,
        progress=context.progress,
    )


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    decoder: Decoder,
    card: ModelCard,
    replaces: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export the decoder with the checkpoint's tokenizer and text files, and return the folder.

    Args:
        checkpoint: Holds the tokenizer, and an imported model's tokenizer and chat files.
        folder: Created if missing; replaced if it is an earlier export of this model and nothing
            else.
        decoder: The model; its own schedule becomes the default.
        card: Text of `README.md`.
        replaces: Replace an export of another model, too.

    Raises:
        UserError: If the folder holds something else or cannot be written, the tokenizer has no
            token that ends a document, or the source of the method cannot be copied.
    """
    from iiet.export import export_pretrained

    progress = progress or Progress()
    model = None if replaces else (checkpoint, decoder.config)
    check_target(folder, model)
    progress.start("export")
    file = checkpoint / TOKENIZER
    tokenizer_file = file if file.is_file() else None
    text_files = read_text_files(checkpoint)
    end_of_text = ""
    if tokenizer_file and not text_files:
        tokenizer = load_tokenizer(tokenizer_file)
        end_of_text = str(tokenizer.id_to_token(end_of_text_id(tokenizer)))
    token_ids = json.loads(text_files.pop(TOKEN_IDS)) if TOKEN_IDS in text_files else None
    try:
        with new_folder(folder) as temporary:
            export_pretrained(
                decoder,
                temporary,
                tokenizer_file,
                end_of_text=end_of_text,
                token_ids=token_ids,
                text_files=text_files or None,
            )
            write_text(temporary / CARD, card.to_markdown())
            lines = [f"{file_digest(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
            write_text(temporary / MANIFEST, "".join(lines))
            check_target(folder, model)  # Again: another process may have written there meanwhile.
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from None
    except ValueError as error:  # The source of another package's method cannot be copied.
        raise UserError(f"cannot export this model: {error}") from None
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    progress.finish(f"{format_bytes(num_bytes)} with code, tokenizer and card")
    return folder


def model_card(
    context: Context,
    checkpoint: Path,
    config: ModelConfig,
    evaluation: EvaluationResult | None,
    *,
    influence: InfluenceTable | None = None,
    metric: str | None = None,
) -> ModelCard:
    """Gather what is known about a checkpoint.

    Args:
        context: Its workspace holds the teacher, if there is one.
        config: The checkpoint's configuration, with the schedule that is exported.
        influence: The table that its schedule was chosen by; when unset, that of the teacher, else
            of the model itself.
        metric: Metric of the table to look for.
    """
    provenance = load_provenance(checkpoint)
    teacher = find_checkpoint_by_weights(context.workspace, str(provenance.get("teacher") or ""))
    origin = teacher or checkpoint
    full = load_config(origin)
    is_cheaper = full.corrections != config.corrections
    return ModelCard(
        name=f"{config.method} {checkpoint.parent.name}",
        config=config,
        provenance={**provenance, "weights": weights_key(checkpoint)},
        evaluation=evaluation,
        influence=influence
        or load_influence_table(origin, metric, context.progress.note)
        or (load_influence_table(checkpoint, metric, context.progress.note) if teacher else None),
        served=served_schedules(checkpoint),
        full=full if is_cheaper else None,
        prompt=_readable_prompt(checkpoint),
    )


def _readable_prompt(checkpoint: Path) -> str:
    """Return a beginning of a text; of symbols, if the model's tokenizer reads nothing else."""
    usual, file = ModelCard.prompt, checkpoint / TOKENIZER
    if not file.is_file():
        return usual
    tokenizer = PlainTokenizer(file)
    try:
        tokenizer.encode(usual, add_special_tokens=False)
    except UserError:
        return "".join(tokenizer.symbols[:2])
    return usual


def check_target(folder: Path, model: tuple[Path, ModelConfig] | None = None) -> None:
    """Raise `UserError` if a folder cannot be written, or holds anything but an earlier export.

    Args:
        model: Checkpoint and configuration: an export of another model is an error, too.
    """
    try:
        # Permissions do not tell: root may write everywhere, but not in /proc.
        with TemporaryDirectory(dir=next(place for place in folder.parents if place.exists())):
            pass
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror}); choose another folder with --to"
        ) from None
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        is_export = config.get("model_type") == EXPORTED_TYPE and "auto_map" in config
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        is_export = False
    if not is_export:
        raise UserError(f"{folder} exists and is no earlier export; choose another with --to")
    if others := _other_files(folder):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"{folder} is an earlier export, and some of its files are not as the export wrote "
            f"them: {', '.join(others[:3])}{more}; move them away, or choose another folder with "
            "--to"
        )
    if model is None:
        return
    checkpoint, wanted = model
    # The card, which is as the export wrote it, names the weights.
    has_weights = f"weights: `{weights_key(checkpoint)}`" in (folder / CARD).read_text("utf-8")
    if not has_weights or decoder_config(folder) != wanted:
        raise UserError(
            f"{folder} is an export of another model; replace it with --force, or choose another "
            "folder with --to"
        )


def _other_files(folder: Path) -> list[str]:
    """Return the files in an export that it did not write, or that were changed since."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return [MANIFEST]
    digests = {name: digest for digest, _, name in (x.partition("  ") for x in text.splitlines())}
    return [
        name
        for name in names
        if not (folder / name).is_file() or file_digest(folder / name) != digests.get(name)
    ]
