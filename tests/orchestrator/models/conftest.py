"""Folders of random models whose tokenizer opens every text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import random_model
from sample_texts import add_opening
from tokenizers import Tokenizer

CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def make_folder(tmp_path, tokenizer_path) -> Callable[..., Path]:
    """A function that writes a random chat model of a case.

    Its tokenizer puts <s>, 300, before every text, and its texts end at <|end|>, 301, or at 7. The
    embedding has 320 rows, the tokenizer 302 entries.
    """

    def make(case: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path / "model"
        ids = {"bos_token_id": 300, "eos_token_id": [301, 7], "pad_token_id": 301}
        random_model(case, vocab_size=320, **ids).to(dtype).save_pretrained(folder, **options)
        path = folder / "tokenizer.json"
        shutil.copyfile(tokenizer_path, path)
        add_opening(path)
        with_end = Tokenizer.from_file(str(path))
        with_end.add_special_tokens(["<|end|>"])
        with_end.save(str(path))
        specials = {"bos_token": "<s>", "eos_token": "<|end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(specials))
        (folder / "chat_template.jinja").write_text(CHAT)
        return folder

    return make
