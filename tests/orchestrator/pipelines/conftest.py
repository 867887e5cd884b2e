"""A workspace, which tasks the pipelines' evaluations run, and folders of a Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from orchestrator.data.store import open_tokens
from orchestrator.evaluation import lm_eval_model
from orchestrator.evaluation.store import MeasuredTask
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return open_workspace(tmp_path / "workspace")


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """Names of the tasks that were run, in order."""
    names: list[str] = []
    real = lm_eval_model.run_task

    def recorded(name: str, *arguments: Any) -> MeasuredTask:
        names.append(name)
        return real(name, *arguments)

    monkeypatch.setattr(lm_eval_model, "run_task", recorded)
    return names


@pytest.fixture
def save_llama(tmp_path, tiny_tokens) -> Callable[..., Path]:
    """A function that saves a Llama as transformers does: a name, and changes of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def save(name: str = "llama", *, chat_template: str | None = None, **changes: Any) -> Path:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        values = {"vocab_size": 320, "initializer_range": 0.3, "max_position_embeddings": 32}
        config = LlamaConfig(**{**sizes, **heads, **values, **changes})
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer = Tokenizer.from_file(str(open_tokens(tiny_tokens).tokenizer_path))
        options: dict[str, Any] = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        if chat_template:
            tokenizer.add_special_tokens(["<s>", "<|user|>", "<|assistant|>"])
            options |= {"bos_token": "<s>", "chat_template": chat_template}
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
        fast.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save
