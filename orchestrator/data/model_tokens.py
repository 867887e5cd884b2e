"""Find the tokens that a model was trained on."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.store import MANIFEST_NAME, TOKENIZER_NAME, verify_data
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
        return newest_tokens(workspace, tokenizer_file(checkpoint))
    fingerprint = provenance.get("tokens", "")
    folder = workspace.tokens / str(fingerprint)
    if not is_valid_name(fingerprint) or not folder.is_dir():
        raise UserError(
            f"the tokens that {checkpoint} was trained on ({fingerprint or 'unknown'}) are not in "
            f"{workspace.root}; run `iiet-orch prepare` with the same data settings"
        )
    verify_data(folder)
    return folder


def newest_tokens(workspace: Workspace, tokenizer: Path | None = None) -> Path:
    """Return the workspace's newest tokens, for models that were not trained on tokens of it.

    Args:
        tokenizer: The `tokenizer.json` that they were made with, if that matters.

    Raises:
        UserError: If it has none.
    """
    manifests = list(workspace.tokens.glob(f"*/{MANIFEST_NAME}"))
    hint = ""
    if tokenizer:
        wanted, hint = file_key(tokenizer), f" --set data.tokenizer={tokenizer}"
        manifests = [m for m in manifests if file_key(m.with_name(TOKENIZER_NAME)) == wanted]
    if not manifests:
        of = "tokens of this model's tokenizer" if tokenizer else "prepared data"
        raise UserError(f"{workspace.root} has no {of}; `iiet-orch prepare{hint}` makes them")
    folder = max(manifests, key=lambda path: path.stat().st_mtime).parent
    verify_data(folder)
    return folder
