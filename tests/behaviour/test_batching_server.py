"""transformers' server writes what a decoder writes, of each family of methods and of several
schedules: with continuous batching, and one request at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from transformers_server import PAGED, served

from orchestrator.models.load import load_model
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.pipelines.models import export
from orchestrator.workspace.layout import open_workspace

pytestmark = pytest.mark.long

MODELS: dict[str, dict[str, Any]] = {
    "vanilla": {"method": "vanilla", "schedule": None},
    "iiet": {},
    "iiet, no corrections": {"schedule": [0, 0]},
    "looped": {"method": "looped", "schedule": [1, 1]},
    "pcformer": {"method": "pcformer", "schedule": None},
    "ode_rk2": {"method": "ode_rk2", "schedule": None},
}
NEW_TOKENS = 12
TEXTS = [f"ab{'cd efg hij ' * number}k" for number in range(10)]
"""Prompts of ten lengths."""


@pytest.mark.parametrize(("name", "options"), [*((name, PAGED) for name in MODELS), ("iiet", ())])
def test_ten_streams_at_once_are_what_the_decoder_writes(name, options, save_tiny, tmp_path):
    checkpoint = save_tiny(
        tmp_path / "run", **{"context_length": 256, "initializer_std": 0.3, **MODELS[name]}
    )
    workspace = open_workspace(tmp_path / "workspace")
    folder = export(checkpoint, workspace=workspace, measure=False, to=tmp_path / "model")
    decoder, tokenizer = load_model(checkpoint), ModelTokenizer(checkpoint)

    def expected(text: str) -> str:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        written = decoder.generate(ids, max_new_tokens=NEW_TOKENS)[0, ids.size(1) :].tolist()
        end = tokenizer.prefix_id
        return tokenizer.decode(written[: written.index(end)] if end in written else written)

    with served(folder, tmp_path, *options) as ask:

        def streamed(text: str) -> str:
            values = {"max_tokens": NEW_TOKENS, "temperature": 0}
            parts = ask("v1/completions", prompt=text, stream=True, **values)
            return "".join(part["choices"][0]["text"] for part in parts)

        with ThreadPoolExecutor(len(TEXTS)) as pool:
            texts = list(pool.map(streamed, TEXTS))
        # What docs/other-programs.md says of drafts: a request cannot name an assistant.
        with pytest.raises(HTTPError, match="422"):
            ask("v1/completions", prompt="ab", assistant_model=str(folder))
    # A part of a character at the end is not streamed.
    assert [text.rstrip("\ufffd") for text in texts] == [
        expected(text).rstrip("\ufffd") for text in TEXTS
    ]
