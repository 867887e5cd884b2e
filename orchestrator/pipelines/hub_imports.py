"""Models of the Hugging Face hub where a command needs a checkpoint: imported at first use."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.hub_models import is_hub_name
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.importing import import_model


def local_model(context: Context, model: Path | str | None) -> Path | None:
    """Return a model as the functions of `model_lookup` take it; None stays None.

    `hub:OWNER/NAME` is downloaded and imported as the run `NAME`; the same import is found again.

    Raises:
        UserError: As `import_model`.
    """
    if not model:
        return None
    if not is_hub_name(model):
        return Path(model)
    return import_model(model, workspace=context.workspace, progress=context.progress)
