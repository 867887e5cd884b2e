"""Byte-level BPE: any text has tokens, and the same text gives the same tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.models.tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    load_tokenizer,
    num_token_ids,
    train_tokenizer,
)
from orchestrator.workspace.errors import UserError

TEXTS = ["The cat sat on the mat, and the dog sat on the cat.", "A dog and a cat are not one."] * 9


def test_decoding_restores_any_text() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    for text in ("The cat", " leading space", "naïve — 猫\n\n\ttab", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_is_deterministic() -> None:
    first, second = (train_tokenizer(iter(TEXTS), 290).to_str() for _ in range(2))
    assert first == second


def test_end_of_text_is_token_zero_and_the_vocabulary_is_bounded() -> None:
    tokenizer = train_tokenizer(TEXTS, 270)
    assert end_of_text_id(tokenizer) == 0 == tokenizer.token_to_id(END_OF_TEXT)
    assert num_token_ids(tokenizer) == 270


def test_a_tokenizer_is_loaded_from_its_file_or_folder(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 290)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).to_str() == tokenizer.to_str()


def test_a_missing_or_damaged_tokenizer_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hub:gpt2 is not in the hub's cache"):
        load_tokenizer("hub:gpt2")


def test_a_tokenizer_without_an_end_of_text_token_is_refused() -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(UserError, match="no end-of-text token"):
        end_of_text_id(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
