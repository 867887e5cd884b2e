"""A GGUF file becomes the Llama that it was written from, or an error that names what is wrong.

Its tokenizer cuts, merges and marks text as the file says, and the imported model answers as the
file does in transformers.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import CHAT, tiny_llama, tokenizer_values, write_llama
from refusals import refused
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator import cli
from orchestrator.models.folder import load_provenance
from orchestrator.models.gguf import read_gguf
from orchestrator.models.load import load_model
from orchestrator.models.tokenizer import ModelTokenizer, token_ids
from orchestrator.pipelines import generating
from orchestrator.pipelines.models import export_checkpoint, import_model
from orchestrator.reporting.model_card import ModelCard
from orchestrator.workspace.errors import UserError

TOKENS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT = "a bag and the fog had\n\n12  dogs in 2024, don't you é 好"


@pytest.fixture
def file(tmp_path, tokenizer_path) -> Path:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "Tiny-Chat.Q8_0.gguf"
    return write_llama(path, tiny_llama(), kind="Q8_0", tokenizer=tokenizer_path)


# Weights


LEFT_OUT = {"rope.freq_base": None, "expert_count": 0, "rope.scaling.type": "none"}


@pytest.mark.parametrize("tied", [True, False])
def test_unquantized_weights_are_those_of_the_llama(tied, tmp_path):
    # Settings that are left out have the format's defaults.
    rope = {} if tied else {"rope_parameters": {"rope_theta": 10000.0}}
    metadata = {} if tied else {f"llama.{name}": value for name, value in LEFT_OUT.items()}
    llama = tiny_llama(tied=tied, **rope)
    decoder = read_gguf(write_llama(tmp_path / "tiny.gguf", llama, metadata=metadata)).eval()
    config = decoder.config
    assert (config.method, config.tie_embeddings, config.num_kv_heads) == ("vanilla", tied, 2)
    assert (config.rope_theta, config.context_length) == (777.0 if tied else 10000.0, 64)
    weights = decoder.state_dict()
    assert all(torch.equal(weights[name], llama.state_dict()[name]) for name in weights)
    with torch.no_grad():
        torch.testing.assert_close(decoder(TOKENS), llama(TOKENS).logits, rtol=0, atol=1e-5)


SQUARE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
"""Rows of 256 numbers hold whole blocks of every type."""
ROPE = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
"""How llama.cpp stores the scaled rotary angles of Llama 3.1."""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metadata": {"general.architecture": "bert"}}, "does not do: the architecture 'bert'"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"llama\.rope\.scaling\.type='yarn'"),
        ({"metadata": {"llama.expert_count": 8}}, r"does not do: llama\.expert_count=8$"),
        ({"metadata": {"llama.attention.key_length": 32}}, r"llama\.attention\.key_length=32"),
        ({"metadata": {"llama.attention.head_count": [4, 2]}}, r"head_count=\[4, 2\]"),
        ({"metadata": {"llama.attention.head_count_kv": None}}, r"head_count_kv=None"),
        ({"tensors": ROPE}, r"the tensor rope_freqs\.weight"),
        ({"left_out": ["blk.1.attn_k.weight"]}, r"missing model\.layers\.1\.self_attn\.k_proj"),
        ({"left_out": ["token_embd.weight"]}, r"missing .*embed_tokens"),
        ({"metadata": {"llama.feed_forward_length": 128}}, "cannot use .*tiny.gguf: "),
        ({"kind": "I8", **SQUARE}, "cannot use .*tiny.gguf: NotImplementedError"),
    ],
)
def test_what_the_decoder_does_not_do_is_named(changes, words, tmp_path):
    sizes = {name: changes.pop(name) for name in SQUARE if name in changes}
    path = write_llama(tmp_path / "tiny.gguf", tiny_llama(**sizes), **changes)
    with pytest.raises(UserError, match=words):
        read_gguf(path)


def test_what_is_not_a_whole_file_is_refused(file, tmp_path, monkeypatch):
    content = file.read_bytes()
    bad = tmp_path / "bad.gguf"
    for share in (0.0001, 0.001, 0.01, 0.5, 0.9999):
        bad.write_bytes(content[: max(8, int(share * len(content)))])
        with refused(UserError, "bad.gguf"):
            read_gguf(bad)
    start = content.index(b"output_norm.weight") + len(b"output_norm.weight")
    (num_dimensions,) = struct.unpack_from("<I", content, start)
    place = start + 4 + 8 * num_dimensions  # Where the number of the tensor's type is.
    bad.write_bytes(content[:place] + struct.pack("<I", 999) + content[place + 4 :])
    with refused(UserError, "gguf", "999"):
        read_gguf(bad)
    for first_bytes in (b"", b"GG", b"PK\x03\x04 a zip archive"):
        bad.write_bytes(first_bytes)
        with refused(UserError, "GGUF"):
            read_gguf(bad)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with refused(UserError, "iiet-orch[gguf]"):
        read_gguf(file)


# Text


def read_with(path: Path, tokenizer: Path, **changes: Any) -> Any:
    """Return transformers' tokenizer of a file whose metadata on text is changed."""
    values = tokenizer_values(tokenizer, 320)
    values |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    folder = path.parent / f"texts-{len([*path.parent.iterdir()])}"
    folder.mkdir()
    read_gguf(write_llama(path, tiny_llama(), metadata=values), folder)
    return AutoTokenizer.from_pretrained(folder)


def test_text_is_cut_by_the_rule_that_the_file_names(tokenizer_path, tmp_path):
    path = tmp_path / "tiny.gguf"
    words = read_with(path, tokenizer_path, pre="gpt-2")
    digits = read_with(path, tokenizer_path)
    # The rule of the original.
    assert words.encode(TEXT) == Tokenizer.from_file(str(tokenizer_path)).encode(TEXT).ids
    assert words.decode(words.encode(TEXT)) == TEXT
    assert len(words) == 320

    def cut(fast: Any) -> list[str]:
        pieces = fast.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12  b")
        return [piece for piece, _ in pieces]

    assert cut(words) == ["a", "Ċ", "Ċ", "12", "Ġ", "Ġb"]
    assert cut(digits) == ["a", "ĊĊ", "1", "2", "Ġ", "Ġb"], "smollm"


def test_control_tokens_and_those_around_a_text(tokenizer_path, tmp_path):
    path = tmp_path / "tiny.gguf"
    fast = read_with(path, tokenizer_path)
    ids = fast.encode("<|im_start|>a<|im_end|>")
    assert fast.convert_ids_to_tokens(ids) == ["<|im_start|>", "a", "<|im_end|>"]
    assert fast.decode(ids, skip_special_tokens=True) == "a"
    assert (fast.bos_token, fast.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert fast.chat_template == CHAT
    fast = read_with(path, tokenizer_path, add_bos_token=True, add_eos_token=True)
    inner = fast.encode("ab", add_special_tokens=False)
    assert fast.encode("ab") == [fast.bos_token_id, *inner, fast.eos_token_id]
    # The end of a turn ends a text, too.
    folder = tmp_path / "turn"
    folder.mkdir()
    values = {**tokenizer_values(tokenizer_path, 320), "tokenizer.ggml.eot_token_id": 7}
    read_gguf(write_llama(path, tiny_llama(), metadata=values), folder)
    assert token_ids(folder, "eos_token_id") == [fast.eos_token_id, 7]


def test_a_sentencepiece_tokenizer_begins_texts_as_llama_does(tmp_path, workspace):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    values = {
        "model": "llama",
        "tokens": tokens + [f"<0x{number:02X}>" for number in range(256)],
        "scores": [0.0] * 6 + [-2.0, -1.0, -3.0] + [0.0] * 256,
        "token_type": [2, 3, 3] + [1] * 6 + [6] * 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    metadata = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    path = write_llama(tmp_path / "spm.gguf", tiny_llama(), metadata=metadata)
    text = ModelTokenizer(import_model(path, workspace=workspace))
    ids = text.encode_document("ab b")
    assert ids == (1, 8, 3, 5)
    assert text.decode(ids) == "ab b"
    assert text.decode(text.encode_document("é")) == "é", "by its bytes"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": None}, r"cannot build the tokenizer .*--tokenizer FILE"),
        ({"pre": "deepseek-llm"}, "by the rule 'deepseek-llm'; known are gpt2 .* smollm"),
        ({"pre": None}, "by the rule None"),
        ({"model": "bert"}, "of the kind 'bert'"),
        ({"model": "llama", "add_space_prefix": False}, "with a space before each text"),
        ({"merges": ["nothing like it"]}, "cannot build the tokenizer"),
        ({"eos_token_id": 320}, "cannot build the tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_named(changes, words, tokenizer_path, tmp_path):
    with pytest.raises(UserError, match=words):
        read_with(tmp_path / "tiny.gguf", tokenizer_path, **changes)


# The imported model


def test_it_becomes_a_run_that_is_found_again(file, workspace, capfd):
    where = ["--workspace", str(workspace.root)]
    for command in (["evaluate"], ["benchmark"], ["generate", "--prompt", "a"]):
        assert cli.main([*command, str(file), *where]) == 2
        assert f"`iiet-orch import {file}`" in " ".join(capfd.readouterr().err.split())
    checkpoint = import_model(file, workspace=workspace)
    assert checkpoint.parent == workspace.runs / "Tiny-Chat.Q8_0"
    imported = load_provenance(checkpoint)["imported"]
    assert imported["from"] == file.name
    assert import_model(file, workspace=workspace) == checkpoint
    write_llama(file, tiny_llama(rms_norm_eps=1e-3))
    with pytest.raises(UserError, match="--tokenizer FILE"):
        import_model(file, workspace=workspace)
    with pytest.raises(UserError, match="--name"):
        import_model(file, workspace=workspace, tokenizer=checkpoint / "tokenizer.json")
    assert cli.main(["import", str(file.parent), *where]) == 2
    assert str(file) in " ".join(capfd.readouterr().err.split())
    assert [run.name for run in workspace.runs.iterdir()] == ["Tiny-Chat.Q8_0"]


@pytest.mark.slow
def test_answers_are_those_of_transformers(file, workspace, tmp_path):
    stock = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    checkpoint = import_model(file, workspace=workspace)
    folder = export_checkpoint(
        checkpoint,
        tmp_path / "exported",
        decoder=load_model(checkpoint),
        card=ModelCard(name="tiny", config=load_model(checkpoint).config),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "a bag"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    greedy = stock.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.size(1) :]
    expected = tokenizer.decode(greedy, skip_special_tokens=True)
    options: dict[str, Any] = {"workspace": workspace, "chat": True, "max_new_tokens": 12}
    streamed = "".join(generating.generate_stream("a bag", **options))
    assert streamed == expected.rstrip("\ufffd")
    assert generating.generate(["a bag"], **options) == [streamed]
    exported = json.loads((folder / "config.json").read_text())
    assert exported["eos_token_id"] == tokenizer.eos_token_id
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        imported_again = load_model(import_model(folder, workspace=workspace))
        torch.testing.assert_close(imported_again(tokens), stock(tokens).logits, rtol=0, atol=1e-4)
