"""The split, the source's state, and data sets of the hub as a stream of documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import text_source
from orchestrator.data.corpus import is_validation, read_documents, source_state
from orchestrator.settings import DataSettings
from orchestrator.workspace.errors import UserError


def files(*names: Path | str, **more: Any) -> DataSettings:
    return DataSettings(source="files", files=tuple(map(str, names)), **more)


def texts(settings: DataSettings) -> list[str]:
    return [document.text for document in read_documents(settings)]


def test_the_split_depends_on_the_text_alone() -> None:
    many = [f"text number {i}" for i in range(4000)]
    held_out = [text for text in many if is_validation(text, 0.1)]
    assert 300 < len(held_out) < 500
    assert set(held_out) < {text for text in many if is_validation(text, 0.2)}


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "bad \\ud800 half"}')
    assert texts(files(tmp_path / "a.jsonl")) == ["bad ? half"]


def test_the_source_state_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One text.")
    before = source_state(files(path))
    path.write_text("Another text.")
    assert source_state(files(path)) != before


def test_settings_without_a_source_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file matches"):
        list(read_documents(files(tmp_path / "*.txt")))
    with pytest.raises(UserError, match=r"data\.files, which is empty"):
        list(read_documents(files()))
    with pytest.raises(UserError, match=r"data\.hub_name, which is empty"):
        list(read_documents(DataSettings(source="hub")))


def test_an_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"some/name needs the hub.*data\.source=files"):
        list(read_documents(DataSettings(source="hub", hub_name="some/name")))


def test_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    read = []

    def stream(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert (name, config, split, streaming) == ("some/name", None, "train", True)
        for number in range(1000):
            read.append(number)
            yield {"text": f"text {number}"}

    monkeypatch.setattr(text_source, "require_hub", lambda wanted: None)
    monkeypatch.setattr(datasets, "load_dataset", stream)
    settings = DataSettings(source="hub", hub_name="some/name", max_documents=5)
    assert texts(settings) == [f"text {i}" for i in range(5)]
    assert len(read) == 5


def test_an_error_of_the_hub_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("no such\ndata set")

    monkeypatch.setattr(text_source, "require_hub", lambda wanted: None)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="cannot read the data set some/name: no such data set"):
        list(read_documents(DataSettings(source="hub", hub_name="some/name")))
