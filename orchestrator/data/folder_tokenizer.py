"""The tokenizer of a folder of transformers, loaded as transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.data.hub import offline
from orchestrator.workspace.errors import UserError


def load_folder_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return a `PreTrainedTokenizerFast`, or what the folder says instead.

    Args:
        folder: `tokenizer.json`, and `tokenizer_config.json` if it has one.
        trust_remote_code: Whether code that lies in the folder may run.

    Raises:
        UserError: If it cannot be loaded.
    """
    # Imported here: it takes seconds, and models that are trained here do without it.
    from transformers import AutoTokenizer

    try:
        with offline():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # damaged files raise dozens of kinds, the tokenizers library plain ones
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load a tokenizer from {folder}: {line}") from None
