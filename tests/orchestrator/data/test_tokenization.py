"""Token folders: complete or absent, and named by their content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data import tokenization
from orchestrator.data.corpus import Document, is_validation
from orchestrator.data.store import TokenStore, open_tokens, verify_data
from orchestrator.data.tokenization import write_tokens
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.settings import DataSettings
from orchestrator.workspace.errors import UserError

SETTINGS = DataSettings(vocab_size=300, validation_fraction=0.2)
DOCUMENTS = [
    Document(f"Document {i} tells that {i * 7} birds flew over the sea.", f"source {i}")
    for i in range(300)
]


def split_documents(store: TokenStore, array: np.ndarray) -> list[str]:
    tokenizer = load_tokenizer(store.tokenizer_path)
    ends = np.flatnonzero(array == store.manifest.end_of_text_id)
    starts = [0, *(ends[:-1] + 1)]
    return [
        tokenizer.decode(array[a:b].tolist(), skip_special_tokens=False)
        for a, b in zip(starts, ends, strict=True)
    ]


def test_the_tokens_are_the_documents(tmp_path: Path) -> None:
    store = open_tokens(write_tokens(tmp_path, DOCUMENTS, SETTINGS, resume_key="a key"))
    verify_data(store.folder, always=True)
    train = [d.text for d in DOCUMENTS if not is_validation(d.text, 0.2)]
    validation = [d for d in DOCUMENTS if is_validation(d.text, 0.2)]
    assert split_documents(store, store.train) == train
    assert split_documents(store, store.validation) == [d.text for d in validation]
    assert store.manifest.validation.bytes == sum(len(d.text.encode()) for d in validation)
    lines = store.validation_documents_path.read_text().splitlines()
    assert [Document(**json.loads(line)) for line in lines] == validation
    assert store.train.dtype == np.uint16
    assert store.vocab_size == 300
    assert store.manifest.train.tokens == len(store.train)


def test_equal_content_has_an_equal_fingerprint(tmp_path: Path) -> None:
    first = write_tokens(tmp_path / "a", DOCUMENTS, SETTINGS, resume_key="a key")
    again = write_tokens(tmp_path / "b", iter(DOCUMENTS), SETTINGS, resume_key="a key")
    assert first.name == again.name
    fewer = write_tokens(tmp_path / "a", DOCUMENTS[:-1], SETTINGS, resume_key="a key")
    other = write_tokens(
        tmp_path / "a",
        DOCUMENTS,
        SETTINGS.model_copy(update={"vocab_size": 290}),
        resume_key="a key",
    )
    split = SETTINGS.model_copy(update={"validation_fraction": 0.3})
    assert (
        len(
            {
                first.name,
                fewer.name,
                other.name,
                write_tokens(tmp_path, DOCUMENTS, split, resume_key="a key").name,
            }
        )
        == 4
    )


def test_the_tokenizer_is_not_trained_on_held_out_text(tmp_path: Path) -> None:
    marked = [
        Document(d.text + (" zqzqzqzq" * 50 if is_validation(d.text, 0.2) else ""), d.source)
        for d in DOCUMENTS
    ]
    # The mark changes the hashes; keep the documents whose side is the same.
    marked = [d for d in marked if is_validation(d.text, 0.2) == ("zq" in d.text)]
    assert sum("zq" in d.text for d in marked) > 3
    store = open_tokens(write_tokens(tmp_path, marked, SETTINGS, resume_key="a key"))
    assert not [
        token for token in load_tokenizer(store.tokenizer_path).get_vocab() if "zq" in token
    ]


def test_an_existing_tokenizer_is_used(tmp_path: Path) -> None:
    first = write_tokens(tmp_path, DOCUMENTS, SETTINGS, resume_key="a key")
    given = SETTINGS.model_copy(update={"tokenizer": str(first)})
    second = open_tokens(write_tokens(tmp_path, DOCUMENTS[:50], given, resume_key="a key"))
    assert second.tokenizer_path.read_text() == (first / "tokenizer.json").read_text()


def test_documents_read_for_the_tokenizer_are_tokenized_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "TOKENIZER_CHARACTERS", 1000)
    monkeypatch.setattr(tokenization, "DOCUMENTS_PER_BATCH", 7)
    store = open_tokens(write_tokens(tmp_path, iter(DOCUMENTS), SETTINGS, resume_key="a key"))
    counts = store.manifest
    assert counts.train.documents + counts.validation.documents == len(DOCUMENTS)


def test_a_small_corpus_has_a_validation_document(tmp_path: Path) -> None:
    for number in range(2, 8):
        some = DOCUMENTS[number : 2 * number]
        store = open_tokens(write_tokens(tmp_path, some, SETTINGS, resume_key="a key"))
        assert store.manifest.validation.documents >= 1


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "the corpus is empty"), (DOCUMENTS[:1], "a single document of .* tokens")],
)
def test_too_little_text_leaves_nothing(
    tmp_path: Path, documents: list[Document], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write_tokens(tmp_path, documents, SETTINGS, resume_key="a key")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_reading_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Document]:
        yield from DOCUMENTS
        raise UserError("the disk is gone")

    given = write_tokens(tmp_path / "given", DOCUMENTS, SETTINGS, resume_key="a key")
    for settings in (SETTINGS, SETTINGS.model_copy(update={"tokenizer": str(given)})):
        with pytest.raises(UserError, match="the disk is gone"):
            write_tokens(tmp_path / "tokens", broken(), settings, resume_key="a key")
        assert list((tmp_path / "tokens").iterdir()) == []


def test_incomplete_tokens_are_replaced(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path, DOCUMENTS, SETTINGS, resume_key="a key")
    (folder / "train.bin").unlink()
    assert write_tokens(tmp_path, DOCUMENTS, SETTINGS, resume_key="a key") == folder
    verify_data(folder, always=True)
