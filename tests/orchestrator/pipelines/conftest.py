"""A workspace, which tasks the pipelines' evaluations run, and folders of a Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from orchestrator.data.store import open_tokens


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """Names of the tasks that lm-eval has run, in order."""
    from lm_eval import evaluator

    names: list[str] = []
    evaluate = evaluator.evaluate

    def recorded(*, task_dict: dict[str, Any], **options: Any) -> Any:
        names.extend(task_dict["tasks"])
        return evaluate(task_dict=task_dict, **options)

    monkeypatch.setattr(evaluator, "evaluate", recorded)
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
