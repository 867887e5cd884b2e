"""Stage `export`: a checkpoint becomes a folder that transformers and lm-eval load by themselves.

Weights, tokenizer, the model's code and a card. It is written under another name and renamed at the
end, so that a folder under its own name is whole; a folder that holds something else is never
overwritten.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from iiet.decoder import Decoder
from orchestrator.analysis.card import ModelCard
from orchestrator.console import Progress
from orchestrator.data.tokenizer import end_of_text_id, load_tokenizer
from orchestrator.errors import UserError
from orchestrator.foreign import EXPORTED_TYPE
from orchestrator.training.checkpoint import CONFIG
from orchestrator.workspace import write_text

CARD = "README.md"


def export(
    decoder: Decoder,
    folder: Path,
    *,
    tokenizer_file: Path | None,
    card: ModelCard,
    progress: Progress | None = None,
) -> Path:
    """Write the folder and return it.

    Args:
        decoder: The model, with its own schedule as the default.
        folder: Made if missing; replaced if it is an earlier export.
        tokenizer_file: Copied beside the weights; None where there is none.
        card: What `README.md` says.
        progress: Told what is going on.

    Raises:
        UserError: If the folder holds something else or cannot be written, or the tokenizer has no
            token that ends a document.
    """
    from iiet.export import export_pretrained

    progress = progress or Progress()
    check_target(folder)
    progress.start("export")
    end = _end_of_text(tokenizer_file)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        export_pretrained(decoder, temporary, tokenizer_file, end_of_text=end)
        write_text(temporary / CARD, card.to_markdown())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    progress.finish(f"{num_bytes / 1e6:.1f} MB with code, tokenizer and card")
    return folder


def check_target(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier export.

    Raises:
        UserError: If it does.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        is_export = config.get("model_type") == EXPORTED_TYPE and "auto_map" in config
    except (OSError, ValueError, AttributeError):
        is_export = False
    if not is_export:
        raise UserError(f"{folder} exists and is no earlier export; choose another with --to")


def _end_of_text(tokenizer_file: Path | None) -> str:
    if tokenizer_file is None:
        return ""
    tokenizer = load_tokenizer(tokenizer_file)
    return str(tokenizer.id_to_token(end_of_text_id(tokenizer)))
