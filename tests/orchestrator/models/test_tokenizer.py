"""Byte-level BPE: any text has tokens, and the same text gives the same tokenizer."""

import json
import sys

import pytest
from refusals import refused
from tokenizers import Tokenizer
from tokenizers.models import BPE

from orchestrator.models.tokenizer import (
    END_OF_TEXT,
    ModelTokenizer,
    end_of_text_id,
    load_tokenizer,
    num_token_ids,
    train_tokenizer,
)
from orchestrator.workspace.errors import UserError

TEXTS = ["The cat sat on the mat, and the dog sat on the cat.", "A dog and a cat are not one."] * 9


def test_a_trained_tokenizer_restores_any_text_and_is_the_same_again(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    for text in ("The cat", " leading space", "naïve — 猫\n\n\ttab", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.to_str() == train_tokenizer(iter(TEXTS), 300).to_str()
    assert end_of_text_id(tokenizer) == 0 == tokenizer.token_to_id(END_OF_TEXT)
    assert num_token_ids(train_tokenizer(TEXTS, 270)) == 270
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).to_str() == tokenizer.to_str()


def test_a_missing_or_damaged_tokenizer_is_a_clear_error(tmp_path, monkeypatch):
    with refused(UserError, "no tokenizer"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{}")
    with refused(UserError, "tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused(UserError, "hub:gpt2"):
        load_tokenizer("hub:gpt2")
    with refused(UserError, "end-of-text"):
        end_of_text_id(Tokenizer(BPE(vocab={"a": 0}, merges=[])))


def test_code_of_a_folder_runs_only_if_it_is_trusted(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        ModelTokenizer(folder)
    assert not ran.exists()
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        ModelTokenizer(folder, trust_remote_code=True)
    assert ran.exists()
