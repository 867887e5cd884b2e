"""Stage `export`: a checkpoint becomes a folder that transformers and lm-eval load by themselves.

Weights, tokenizer, the model's code and a card. It is written under another name and renamed at the
end, so that a folder under its own name is whole. The names and checksums of all its files stand in
`MANIFEST.sha256`, as `sha256sum --check` reads them; so a folder with anything in it that no export
wrote, or that was changed since, is never overwritten.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from iiet.decoder import Decoder
from iiet.weights import CONFIG
from orchestrator.data.tokenizer import end_of_text_id, load_tokenizer
from orchestrator.evaluation.model_folders import EXPORTED_TYPE
from orchestrator.reporting.model_card import ModelCard
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import TOKEN_IDS
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import delete_folder, write_text
from orchestrator.workspace.provenance import file_digest

CARD = "README.md"
MANIFEST = "MANIFEST.sha256"
_USUAL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors*", "tokenizer*.json"),
    *("special_tokens_map.json", "chat_template.jinja", "iiet_*.py", CARD),
)
"""Files of exports that were written before exports had a manifest."""


def export(
    decoder: Decoder,
    folder: Path,
    *,
    tokenizer_file: Path | None,
    card: ModelCard,
    text_files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the folder and return it.

    Args:
        decoder: The model, with its own schedule as the default.
        folder: Made if missing; replaced if it is an earlier export and nothing else.
        tokenizer_file: Copied beside the weights; None where there is none.
        card: What `README.md` says.
        text_files: Those of an imported model's checkpoint; they are exported as they came.
        progress: Told what is going on.

    Raises:
        UserError: If the folder holds something else or cannot be written, the tokenizer has no
            token that ends a document, or the source of the method cannot be copied.
    """
    from iiet.export import export_pretrained

    progress = progress or Progress()
    check_target(folder)
    progress.start("export")
    text = dict(text_files or {})
    token_ids = json.loads(text.pop(TOKEN_IDS)) if TOKEN_IDS in text else None
    end = "" if text_files else _end_of_text(tokenizer_file)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        export_pretrained(
            decoder,
            temporary,
            tokenizer_file,
            end_of_text=end,
            token_ids=token_ids,
            text_files=text or None,
        )
        write_text(temporary / CARD, card.to_markdown())
        _write_manifest(temporary)
        check_target(folder)  # Once more: the export took its time.
        if folder.exists():
            delete_folder(folder)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from None
    except ValueError as error:  # The source of the method of another package.
        raise UserError(f"cannot export this model: {error}") from None
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
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        is_export = False
    if not is_export:
        raise UserError(f"{folder} exists and is no earlier export; choose another with --to")
    if others := _files_of_others(folder):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"{folder} is an earlier export, and some of its files are not as the export wrote "
            f"them: {', '.join(others[:3])}{more}; move them away, or choose another folder with "
            "--to"
        )


def _write_manifest(folder: Path) -> None:
    lines = [f"{file_digest(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    write_text(folder / MANIFEST, "".join(lines))


def _files_of_others(folder: Path) -> list[str]:
    """Return what lies in an export that it did not write, or that was changed since."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        return [name for name in names if not any(fnmatch(name, usual) for usual in _USUAL_FILES)]
    except (OSError, UnicodeDecodeError):
        return [MANIFEST]
    digests = {name: digest for digest, _, name in (x.partition("  ") for x in text.splitlines())}
    return [
        name
        for name in names
        if not (folder / name).is_file() or file_digest(folder / name) != digests.get(name)
    ]


def _end_of_text(tokenizer_file: Path | None) -> str:
    if tokenizer_file is None:
        return ""
    tokenizer = load_tokenizer(tokenizer_file)
    return str(tokenizer.id_to_token(end_of_text_id(tokenizer)))
