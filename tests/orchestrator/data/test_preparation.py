"""`prepare`: finished work is reused, and what has changed or is damaged is noticed."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack

import pytest
import zstandard
from kept_progress import KeptProgress
from refusals import refused
from sample_texts import lines_of

from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import expected_tokens, prepare, source_key
from orchestrator.data.store import open_tokens, verify_data
from orchestrator.data.text import unread_note
from orchestrator.pipelines.training import plan_pretrain
from orchestrator.settings import DataSettings, Settings
from orchestrator.sweeping.stages import plan_sweep
from orchestrator.workspace.errors import DamagedFile, UserError
from orchestrator.workspace.locks import lock_file


@pytest.fixture
def settings(tmp_path) -> DataSettings:
    texts = [f"Text {i} says that the sea has {i * 13} kinds of fish." for i in range(200)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    return DataSettings(source="files", files=(str(tmp_path / "*.txt"),), vocab_size=300)


def test_finished_work_is_reused(workspace, settings):
    expected = expected_tokens(settings, None)
    folder = prepare(settings, workspace)
    verify_data(folder, always=True)
    assert folder == workspace.tokens / open_tokens(folder).fingerprint
    assert expected.vocab_size == expected_tokens(settings, folder).vocab_size == 300
    # The estimate holds the files of the parts, too.
    assert expected.new_bytes > 2 * (folder / "validation.jsonl").stat().st_size
    progress = KeptProgress()
    assert prepare(settings, workspace, progress) == folder
    assert progress.texts == [], "nothing is read"
    assert progress.summaries[0].endswith(", found again")
    assert "200 documents" in open_data(folder).describe()
    assert prepare(settings.model_copy(update={"vocab_size": 301}), workspace, progress) != folder
    assert "reading" in progress.texts


def test_the_summary_says_how_many_files_gave_the_documents_and_what_cut_them(workspace, settings):
    progress = KeptProgress()
    prepare(settings, workspace, progress)
    prepare(settings, workspace, progress)
    prepare(settings.model_copy(update={"passage_characters": 100}), workspace, progress)
    lines = progress.summaries
    assert all(line.startswith("1 file gave 200 documents, ") for line in lines)
    assert ["data.passage_characters=100" in line for line in lines] == [False, False, True]


def test_a_preparation_waits_for_one_of_the_same_data_alone_and_says_so(workspace, settings):
    with ExitStack() as other_process:
        lock = workspace.tokens / "sources" / f"{source_key(settings)}.lock"
        other_process.enter_context(lock_file(lock))

        class EndingTheWait(KeptProgress):
            def note(self, text: str) -> None:
                super().note(text)
                other_process.close()

        progress = EndingTheWait()
        prepare(settings.model_copy(update={"vocab_size": 301}), workspace, progress)
        assert progress.notes == [], "other data do not wait"
        prepare(settings, workspace, progress)
    assert progress.notes == [f"waiting for process {os.getpid()}, which prepares the same data"]


def test_what_another_process_has_prepared_meanwhile_is_found(workspace, settings):
    with ExitStack() as other_process:
        lock = workspace.tokens / "sources" / f"{source_key(settings)}.lock"
        other_process.enter_context(lock_file(lock))

        class PreparedMeanwhile(KeptProgress):
            def note(self, text: str) -> None:
                other_process.close()
                prepare(settings, workspace)

        progress = PreparedMeanwhile()
        prepare(settings, workspace, progress)
    assert progress.texts == [], "nothing is read"
    assert progress.summaries[0].endswith(", found again")


def test_a_changed_tokenizer_of_equal_size_makes_other_tokens(workspace, settings, tmp_path):
    path = tmp_path / "tokenizer.json"
    content = json.loads(open_tokens(prepare(settings, workspace)).tokenizer_path.read_text())
    path.write_text(json.dumps(content))
    size = path.stat().st_size
    by_path = settings.model_copy(update={"tokenizer": str(path)})
    before = open_tokens(prepare(by_path, workspace)).train[:]

    first, second = map(int, before[:2])
    assert first != second
    exchanged = {first: second, second: first}
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {
        text: exchanged.get(token, token) for text, token in vocabulary.items()
    }
    path.write_text(json.dumps(content))
    assert path.stat().st_size == size
    after = open_tokens(prepare(by_path, workspace)).train[:]
    assert after.tolist() == [exchanged.get(token, token) for token in before.tolist()]


def test_files_that_are_not_read_are_counted_by_their_endings(workspace, settings, tmp_path):
    names = ("b.html", "deeper/c.html", "d.pdf", "README", ".hidden/e.html", ".f.html")
    for name in names:
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).touch()
    (tmp_path / "a.txt").rename(tmp_path / "texts" / "a.txt")
    folder = settings.model_copy(update={"files": (str(tmp_path / "texts"),)})
    note = "4 other files are not read (.html 2, .pdf 1, without an ending 1)"
    progress = KeptProgress()
    prepare(folder, workspace, progress)
    assert progress.summaries[0].endswith(note)
    assert plan_pretrain(Settings(data=folder), workspace=workspace).unread == note
    assert note in plan_sweep(Settings(data=folder), workspace=workspace).notes
    mixture = {"source": "mixture", "shares": {"files": 0.9, "phop_2": 0.1}}
    assert unread_note(folder.model_copy(update=mixture)) == note
    named = {"files": (str(tmp_path / "texts" / "*.txt"),)}
    assert unread_note(folder.model_copy(update=named)) is None, "who names files wants these"


@pytest.mark.slow
def test_a_changed_local_data_set_is_prepared_again(workspace, tmp_path, monkeypatch):
    settings = DataSettings(source="hub", hub_name=str(tmp_path / "set"), vocab_size=300)
    (tmp_path / "set").mkdir()
    for name, number in (("a", 50), ("b", 100)):
        lines = lines_of(f"Text {name}{i} is about {i} fish." for i in range(50))
        # As SlimPajama's files are.
        (tmp_path / "set" / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        assert f"{number} documents" in open_data(prepare(settings, workspace)).describe()
    (tmp_path / "set" / "c.jsonl.lz4").touch()
    monkeypatch.setitem(sys.modules, "lz4", None)  # As if it were not installed.
    with refused(UserError, "c.jsonl.lz4", "pip install lz4"):
        plan_pretrain(Settings(data=settings), workspace=workspace)


def test_damaged_tokens_and_records_are_named(workspace, settings):
    folder = prepare(settings, workspace)
    [record] = (workspace.tokens / "sources").glob("*.json")
    record.write_text('{"fingerprint": "../../elsewhere"}')
    with refused(DamagedFile, record.name):
        prepare(settings, workspace)
    record.unlink()
    assert prepare(settings, workspace) == folder
    path = folder / "train.bin"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with refused(DamagedFile, folder.name, "train.bin"):
        prepare(settings, workspace)
    # A change that keeps size and time is found by comparing everything.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepare(settings, workspace) == folder
    with refused(DamagedFile, "train.bin"):
        prepare(settings, workspace, verify=True)
