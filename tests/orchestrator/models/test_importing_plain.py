"""Plain models of transformers through import, evaluation and export: the same model each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import CASES, random_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.models.folder import load_provenance
from orchestrator.models.open import load_model, open_model
from orchestrator.pipelines.models import export_checkpoint, import_model
from orchestrator.reporting.model_card import ModelCard
from orchestrator.workspace.errors import UserError

VOCABULARY = 320
"""Rows of the embedding; the tokenizer has 302 entries."""
CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def make_folder(tmp_path, tokenizer):
    """Write a random model of a case, with a tokenizer that puts <s> before every text."""

    def make(case: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path / "model"
        model = random_model(case, vocab_size=VOCABULARY, bos_token_id=300, eos_token_id=[301, 7])
        model.to(dtype).save_pretrained(folder, **options)
        own = Tokenizer.from_file(str(tokenizer))
        own.add_special_tokens(["<s>", "<|end|>"])
        own.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", own.token_to_id("<s>"))]
        )
        own.save(str(folder / "tokenizer.json"))
        specials = {"bos_token": "<s>", "eos_token": "<|end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(specials))
        (folder / "chat_template.jinja").write_text(CHAT)
        return folder

    return make


@pytest.mark.parametrize("case", CASES)
def test_imported_and_exported_it_is_the_model_of_transformers(
    case, make_folder, workspace, tmp_path
):
    source = make_folder(case)
    checkpoint = import_model(source, workspace=workspace)
    decoder = load_model(checkpoint)
    card = ModelCard(name=case, config=decoder.config)
    folder = export_checkpoint(checkpoint, tmp_path / "out", decoder=decoder, card=card)
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, folder)]
    assert type(models[0]) is type(models[1])
    tokens = torch.arange(VOCABULARY)[-40:].view(2, 20)  # Rows beyond the tokenizer's, too.
    with torch.no_grad():
        expected, again = (model(tokens).logits for model in models)
        torch.testing.assert_close(decoder(tokens), expected, rtol=0, atol=1e-5)
    assert torch.equal(again, expected)
    ids = [
        (config.bos_token_id, config.eos_token_id)
        for model in models for config in (model.config, model.generation_config)
    ]  # fmt: skip
    assert ids == 4 * [(300, [301, 7])]
    theirs, ours = (AutoTokenizer.from_pretrained(path) for path in (source, folder))
    messages = [{"role": "user", "content": "a bag"}]
    texts = [each.apply_chat_template(messages, tokenize=False) for each in (theirs, ours)]
    assert texts == 2 * ["<s>user: a bag\n"]
    assert ours("a bag").input_ids == theirs("a bag").input_ids
    # The folder is opened like any other, and imported again.
    assert open_model(folder).config == decoder.config
    second = import_model(folder, workspace=workspace, name="second")
    weights = [load_provenance(each)["weights"] for each in (checkpoint, second)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_several_files_becomes_float32(dtype, make_folder, workspace):
    source = make_folder("qwen3", dtype, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    decoder = load_model(import_model(source, workspace=workspace))
    assert {tensor.dtype for tensor in decoder.state_dict().values()} == {torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, theirs[n]) for n, tensor in decoder.state_dict().items())


def test_a_file_of_several_that_is_missing_or_damaged_is_named(make_folder, workspace):
    source = make_folder("llama", max_shard_size="20KB")
    file = sorted(source.glob("*.safetensors"))[1]
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"cannot read .*{file.name}"):
        import_model(source, workspace=workspace)
    file.unlink()
    with pytest.raises(UserError, match=rf"lacks {file.name}, which model\.safetensors\.index"):
        import_model(source, workspace=workspace)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="weight_map names no files"):
        import_model(source, workspace=workspace)
    assert not workspace.runs.exists()
