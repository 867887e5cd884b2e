"""The tokenizer of a GGUF file cuts, merges and marks text as its metadata says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_files import CHAT, tokenizer_values
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from orchestrator.data.store import open_tokens
from orchestrator.models.gguf_tokenizer import gguf_token_ids, write_gguf_tokenizer
from orchestrator.workspace.errors import UserError

TEXT = "a bag and the fog had\n\n12  dogs in 2024, don't you é 好"


@pytest.fixture
def original(tiny_tokens: Path) -> Path:
    return open_tokens(tiny_tokens).tokenizer_path


@pytest.fixture
def metadata(original: Path) -> dict[str, Any]:
    return tokenizer_values(original, 320)


def written(metadata: dict[str, Any], folder: Path) -> Any:
    write_gguf_tokenizer(metadata, Path("tiny.gguf"), folder)
    return AutoTokenizer.from_pretrained(folder)


def test_text_has_the_tokens_of_the_tokenizer_that_was_stored(
    metadata: dict[str, Any], original: Path, tmp_path: Path
) -> None:
    metadata["tokenizer.ggml.pre"] = "gpt-2"  # The rule of the original.
    found = written(metadata, tmp_path)
    assert found.encode(TEXT) == Tokenizer.from_file(str(original)).encode(TEXT).ids
    assert found.decode(found.encode(TEXT)) == TEXT
    assert len(found) == 320


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("smollm", ["a", "ĊĊ", "1", "2", "Ġ", "Ġb"]),
        ("gpt-2", ["a", "Ċ", "Ċ", "12", "Ġ", "Ġb"]),
    ],
)
def test_the_named_rule_cuts_text(
    rule: str, pieces: list[str], metadata: dict[str, Any], tmp_path: Path
) -> None:
    found = written({**metadata, "tokenizer.ggml.pre": rule}, tmp_path)
    cut = found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12  b")
    assert [piece for piece, _ in cut] == pieces


def test_control_tokens_are_whole_and_can_be_left_out(
    metadata: dict[str, Any], tmp_path: Path
) -> None:
    found = written(metadata, tmp_path)
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = found.encode("<|im_start|>a<|im_end|>")
    assert [tokens[number] for number in ids] == ["<|im_start|>", "a", "<|im_end|>"]
    assert found.decode(ids, skip_special_tokens=True) == "a"
    assert (found.bos_token, found.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert found.chat_template == CHAT
    asked = found.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("adds", [["bos"], ["eos"], ["bos", "eos"]])
def test_tokens_around_a_text_are_added_if_the_file_says_so(
    adds: list[str], metadata: dict[str, Any], tmp_path: Path
) -> None:
    metadata |= {f"tokenizer.ggml.add_{name}_token": name in adds for name in ("bos", "eos")}
    found = written(metadata, tmp_path)
    first = [found.bos_token_id] if "bos" in adds else []
    last = [found.eos_token_id] if "eos" in adds else []
    assert found.encode("ab") == first + found.encode("ab", add_special_tokens=False) + last


def test_the_end_of_a_turn_ends_a_text(metadata: dict[str, Any]) -> None:
    end = metadata["tokenizer.ggml.eos_token_id"]
    assert gguf_token_ids(metadata)["eos_token_id"] == end
    assert gguf_token_ids({**metadata, "tokenizer.ggml.eot_token_id": end})["eos_token_id"] == end
    both = gguf_token_ids({**metadata, "tokenizer.ggml.eot_token_id": 7})
    assert both["eos_token_id"] == [end, 7]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": None}, r"has no tokenizer .*--tokenizer FILE"),
        ({"pre": "deepseek-llm"}, "by the rule 'deepseek-llm'; known are gpt2 .* smollm"),
        ({"pre": None}, "by the rule None"),
        ({"model": "bert"}, "of the kind 'bert'"),
        ({"model": "llama", "add_space_prefix": False}, "with a space before each text"),
        ({"merges": ["nothing like it"]}, "cannot build the tokenizer"),
        ({"eos_token_id": 320}, "cannot build the tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_named(
    changes: dict[str, Any], words: str, metadata: dict[str, Any], tmp_path: Path
) -> None:
    for name, value in changes.items():
        metadata[f"tokenizer.ggml.{name}"] = value
    known = {name: value for name, value in metadata.items() if value is not None}
    with pytest.raises(UserError, match=words):
        write_gguf_tokenizer(known, Path("tiny.gguf"), tmp_path)
