"""Find the tokens that a model was trained on."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.store import verify_data
from orchestrator.models.folder import load_provenance, tokenizer_file
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, is_valid_name
from orchestrator.workspace.provenance import file_key


def tokens_folder_of(checkpoint: Path, workspace: Workspace) -> Path:
    """Return the folder of the tokens that a checkpoint was trained on.

    For an imported checkpoint: the newest tokens made with its tokenizer.

    Raises:
        UserError: If they are not in this workspace, or damaged.
    """
    provenance = load_provenance(checkpoint)
    if "imported" in provenance:
        return _tokens_by_tokenizer(tokenizer_file(checkpoint), workspace)
    fingerprint = provenance.get("tokens", "")
    folder = workspace.tokens / str(fingerprint)
    if not is_valid_name(fingerprint) or not folder.is_dir():
        raise UserError(
            f"the tokens that {checkpoint} was trained on ({fingerprint or 'unknown'}) are not in "
            f"{workspace.root}; run `iiet-orch prepare` with the same data settings"
        )
    verify_data(folder)
    return folder


def _tokens_by_tokenizer(tokenizer: Path, workspace: Workspace) -> Path:
    wanted = file_key(tokenizer)
    files = [f for f in workspace.tokens.glob("*/tokenizer.json") if file_key(f) == wanted]
    if not files:
        raise UserError(
            f"{workspace.root} has no tokens of this model's tokenizer; "
            f"`iiet-orch prepare --set data.tokenizer={tokenizer}` makes them"
        )
    folder = max(files, key=lambda file: file.stat().st_mtime).parent
    verify_data(folder)
    return folder
