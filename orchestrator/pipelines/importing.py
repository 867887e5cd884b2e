"""Import a model folder from elsewhere as a checkpoint of the workspace.

The result is a checkpoint like any other, with the folder's special tokens and chat template, but
without an optimizer state to resume from. Commands that need its tokens take the workspace's tokens
that were made with its tokenizer.
"""

from __future__ import annotations

import re
from pathlib import Path

from iiet.cost import num_parameters
from iiet.weights import CONFIG
from orchestrator.data.hub_models import download_model, is_hub_name, shown_name
from orchestrator.data.tokenizer import load_tokenizer, num_token_ids, tokenizer_path
from orchestrator.pipelines.context import open_context
from orchestrator.pipelines.imported_text import read_model_text_files
from orchestrator.terminal.formatting import format_parameters
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import TOKENIZER, load_provenance, save_checkpoint
from orchestrator.training.checkpoint_lookup import newest_intact_checkpoint
from orchestrator.training.model_loading import (
    PUBLISHED,
    folder_kind,
    load_model,
    model_folder_key,
)
from orchestrator.training.model_lookup import hub_hint, resolve_checkpoint
from orchestrator.workspace.checkpoint_names import find_checkpoints
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import resolve_path
from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.provenance import content_key, environment, file_key


def import_model(
    folder: Path | str,
    *,
    workspace: Workspace | Path | str,
    tokenizer: Path | str | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make a checkpoint of a model folder and return it; the same import is found again.

    Args:
        folder: In the published naming, a plain Llama folder, an exported folder, or a checkpoint
            or run of another workspace, also of an earlier version; or `hub:OWNER/NAME`.
        tokenizer: A `tokenizer.json`, or `hub:NAME`, if the folder has none or not the right one.
        name: Name of the run; the folder's name when unset.

    Raises:
        UserError: If the folder cannot be read, the hub does not give it, the tokenizer does not
            fit the model, or another model has the name.
    """
    context = open_context(workspace, progress)
    progress = context.progress
    progress.start("import")  # A download takes its time.
    folder = _source_folder(folder)
    if not (folder / CONFIG).is_file() and find_checkpoints(folder):
        folder = resolve_checkpoint(folder)
    decoder = load_model(folder)
    config = decoder.config
    is_llama = folder_kind(folder) == PUBLISHED and config.method == "vanilla"
    origin = "a Llama folder" if is_llama else folder_kind(folder)
    own = folder / TOKENIZER
    file = tokenizer_path(tokenizer).absolute() if tokenizer else own if own.is_file() else None
    if file is None:
        progress.note(
            f"{folder} has no tokenizer.json: the model can be used with token ids only; "
            "import it with --tokenizer FILE to generate and evaluate"
        )
    elif (num_ids := num_token_ids(load_tokenizer(file))) > config.vocab_size:
        raise UserError(
            f"the tokenizer {file} has {num_ids} entries, the model only {config.vocab_size}"
        )
    text_files = read_model_text_files(folder, file, vocab_size=config.vocab_size)
    own_name = shown_name(folder)
    is_checkpoint = folder in find_checkpoints(folder.parent)
    named = folder.parent.name if is_checkpoint else own_name.rpartition("/")[2]
    run_folder = context.workspace.runs / (name or re.sub(r"[^\w.-]+", "-", named))
    text = {name: content.decode("utf-8", "replace") for name, content in text_files.items()}
    source = content_key(model_folder_key(folder), file_key(file) if file else None, text)
    checkpoint = _imported_before(run_folder, source)
    if checkpoint is None:
        checkpoint = save_checkpoint(
            run_folder,
            0,
            config=config,
            weights=decoder.state_dict(),
            training_state={},
            tokenizer_path=file,
            text_files=text_files,
            provenance={
                "objective": "import",
                "imported": {"from": own_name, "read as": origin, "source": source},
                "environment": environment(),
            },
        )
    journal = Journal(run_folder)
    journal.event("imported")  # Commands without a path take the newest run.
    journal.close()
    count = format_parameters(num_parameters(config))
    progress.finish(f"{origin}: {config.method}, {count} parameters")
    return checkpoint


def _source_folder(named: Path | str) -> Path:
    if is_hub_name(named):
        return download_model(named)
    folder = resolve_path(named)
    if not folder.exists():
        missing = f"{folder} is no model folder: there is nothing of this name"
        raise UserError(f"{missing}{hub_hint(Path(named))}")
    return folder


def _imported_before(run_folder: Path, source: str) -> Path | None:
    """Return the checkpoint of the same import; `source` is the key of what was imported."""
    if not run_folder.exists():
        return None
    checkpoint, damage = newest_intact_checkpoint(run_folder)
    if damage:
        raise UserError(f"{damage[0]}; delete {run_folder}, and the same command imports it again")
    imported = load_provenance(checkpoint).get("imported", {}) if checkpoint else {}
    if imported.get("source") != source:
        raise UserError(
            f"the workspace has another run named {run_folder.name}; choose one with --name"
        )
    return checkpoint
