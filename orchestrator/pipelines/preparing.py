"""Text in, token shards out: reads the corpus, trains or loads the tokenizer."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.preparation import prepare as prepare_tokens
from orchestrator.pipelines.context import open_context
from orchestrator.settings import Settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import Workspace


def prepare(
    settings: Settings, *, workspace: Workspace | Path | str, progress: Progress | None = None
) -> Path:
    """Return the folder of prepared tokens; tokens that exist are verified by their checksums.

    Args:
        settings: Section `data`.

    Raises:
        UserError: If the source is missing, empty or unreadable, or stored tokens are damaged.
    """
    context = open_context(workspace, progress)
    return prepare_tokens(settings.data, context.workspace, context.progress, verify=True)
