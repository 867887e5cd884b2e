"""A small model and its tokenizer, for tests of scoring and of generated answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from sample_texts import add_opening

from iiet import Decoder, ModelConfig
from orchestrator.models.tokenizer import ModelTokenizer


@pytest.fixture
def tokenizer(tokenizer_path) -> ModelTokenizer:
    return ModelTokenizer(tokenizer_path)


@pytest.fixture
def opening_path(tokenizer_path, tmp_path) -> Path:
    """The `tokenizer.json` of `tokenizer`, which now puts a token <s> before every text."""
    path = tmp_path / "opening.json"
    shutil.copyfile(tokenizer_path, path)
    add_opening(path)
    return path


@pytest.fixture
def decoder(tiny_model) -> Decoder:
    torch.manual_seed(0)
    config = {**tiny_model, "context_length": 48, "initializer_std": 0.4}
    return Decoder(ModelConfig.from_dict(config)).eval()
