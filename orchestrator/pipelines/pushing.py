"""Export a checkpoint and upload the folder to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.hub_models import check_upload, upload_model
from orchestrator.pipelines.exporting import export
from orchestrator.settings import Settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import Workspace


@dataclass(frozen=True, kw_only=True)
class HubTarget:
    """Where an exported model is uploaded to."""

    repository: str
    """`OWNER/NAME`, or a name of the token's owner; made if it is missing."""
    private: bool | None = None
    """Whether a new repository is private; as its owner's settings say when unset."""
    token: str | None = None
    """Token of the hub; that of `HF_TOKEN` or `hf auth login` when unset."""


def export_to_hub(
    settings: Settings,
    target: HubTarget,
    *,
    workspace: Workspace | Path | str,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Path, str]:
    """Export a checkpoint, upload the folder, and return the folder and the address of its page.

    Args:
        target: Checked before anything is exported.
        **options: As in `export`.

    Raises:
        UserError: As `export`; or if the hub cannot be reached, or refuses the token or the model.
    """
    check_upload(target.repository, target.token)
    progress = progress or Progress()
    folder = export(settings, workspace=workspace, progress=progress, **options)
    progress.start("push")
    address = upload_model(folder, target.repository, private=target.private, token=target.token)
    progress.finish(address)
    return folder, address
