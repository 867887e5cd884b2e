"""`prepare`: finished work is reused, and an interrupted preparation resumes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from orchestrator.data import text_writing, tokenization
from orchestrator.data.corpus import Document
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import prepare
from orchestrator.data.store import open_tokens, verify_data
from orchestrator.data.token_writer import RECORD_NAME
from orchestrator.pipelines.training import plan_pretrain
from orchestrator.settings import DataSettings, Settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import TEMPORARY_PREFIX, Workspace, open_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "workspace")


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    texts = [f"Text {i} says that the sea has {i * 13} kinds of fish." for i in range(200)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    return DataSettings(source="files", files=(str(tmp_path / "*.txt"),), vocab_size=300)


def fail_to_read(*arguments: object) -> None:
    raise AssertionError("the source was read again")


def test_finished_work_is_reused(
    workspace: Workspace, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(settings, workspace)
    verify_data(folder, always=True)
    assert folder == workspace.tokens / open_tokens(folder).fingerprint
    monkeypatch.setattr(text_writing, "read_documents", fail_to_read)
    assert prepare(settings, workspace) == folder
    assert "200 documents" in open_data(folder).describe()
    with pytest.raises(AssertionError, match="read again"):
        prepare(settings.model_copy(update={"vocab_size": 301}), workspace)


@pytest.mark.parametrize("record", ['{"fingerprint": "../../elsewhere"}', "{}", "[]", "7"])
def test_a_record_without_a_folder_name_is_an_error(
    workspace: Workspace, settings: DataSettings, record: str
) -> None:
    prepare(settings, workspace)
    [path] = (workspace.tokens / "sources").iterdir()
    path.write_text(record)
    with pytest.raises(UserError, match=rf"{path.name} is damaged .*delete it"):
        prepare(settings, workspace)
    path.unlink()
    prepare(settings, workspace)


def test_a_changed_source_is_prepared_again(
    workspace: Workspace, settings: DataSettings, tmp_path: Path
) -> None:
    first = prepare(settings, workspace)
    (tmp_path / "b.txt").write_text("Another text is here for the fish to read.")
    second = prepare(settings, workspace)
    assert second != first
    (tmp_path / "b.txt").unlink()
    assert prepare(settings, workspace) == first


def test_a_changed_local_data_set_is_prepared_again(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DataSettings(source="hub", hub_name=str(tmp_path / "set"), vocab_size=300)
    (tmp_path / "set").mkdir()
    for name, number in (("a", 50), ("b", 100)):
        lines = "".join(f'{{"text": "Text {name}{i} is about {i} fish."}}\n' for i in range(50))
        # As SlimPajama's files are.
        (tmp_path / "set" / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        assert f"{number} documents" in open_data(prepare(settings, workspace)).describe()
    (tmp_path / "set" / "c.jsonl.lz4").touch()
    monkeypatch.setitem(sys.modules, "lz4", None)  # As if it were not installed.
    with pytest.raises(UserError, match=r"c\.jsonl\.lz4 needs lz4; run `pip install lz4`"):
        plan_pretrain(Settings(data=settings), workspace=workspace)


def test_a_user_error_leaves_no_tokens(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="the corpus is empty"):
        prepare(DataSettings(source="files", files=(str(tmp_path / "empty.txt"),)), workspace)
    with pytest.raises(UserError, match="no file matches"):
        prepare(DataSettings(source="files", files=("nowhere/*.txt",)), workspace)
    assert not list(workspace.tokens.rglob("*.bin"))


KILLED = """
import os, signal, sys
from pathlib import Path
from orchestrator.data import token_writer, tokenization
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import prepare
from orchestrator.settings import DataSettings
from orchestrator.workspace.layout import open_workspace

signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's & ignores it.
tokenization.COMMIT_BYTES, tokenization.DOCUMENTS_PER_BATCH = 2000, 5
class KilledWriter(token_writer.TokenWriter):
    commits = 0
    def commit(self):
        self.commits += 1
        return super().commit()
    def add(self, *document):
        super().add(*document)
        if self.commits == 2 and self.uncommitted_bytes > 500:
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
tokenization.TokenWriter = KilledWriter
prepare(DataSettings.model_validate_json(sys.argv[2]), open_workspace(Path(sys.argv[3])))
"""


def contents(folder: Path) -> dict[str, bytes]:
    names = ("train.bin", "validation.bin", "validation.jsonl", "tokenizer.json", "manifest.json")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_an_interrupted_preparation_resumes_to_identical_bytes(
    workspace: Workspace,
    settings: DataSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    arguments = [name, settings.model_dump_json(), str(workspace.root)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == -getattr(signal, name), done.stderr
    (left,) = workspace.tokens.glob(f"{TEMPORARY_PREFIX}*")
    safe = json.loads((left / RECORD_NAME).read_text())["documents"]
    assert safe > 0

    encoded: list[int] = []
    encode = tokenization.encode_batches

    def counting(tokenizer: Any, documents: Iterator[Document]) -> Iterator[Any]:
        for batch, ids in encode(tokenizer, documents):
            encoded.append(len(batch))
            yield batch, ids

    monkeypatch.setattr(tokenization, "encode_batches", counting)
    monkeypatch.setattr(tokenization, "train_tokenizer", None)  # trained before the interruption
    folder = prepare(settings, workspace)
    verify_data(folder, always=True)
    manifest = open_tokens(folder).manifest
    num_documents = manifest.train.documents + manifest.validation.documents
    assert sum(encoded) == num_documents - safe, "committed documents are not tokenized again"
    assert not list(workspace.tokens.glob(f"{TEMPORARY_PREFIX}*"))
    monkeypatch.undo()
    whole = prepare(settings, open_workspace(tmp_path / "whole"))
    assert contents(folder) == contents(whole)


def interrupted(workspace: Workspace, settings: DataSettings) -> Path:
    arguments = ["SIGKILL", settings.model_dump_json(), str(workspace.root)]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    (left,) = workspace.tokens.glob(f"{TEMPORARY_PREFIX}*")
    return left


@pytest.mark.slow
def test_a_damaged_file_of_an_interrupted_preparation_is_named(
    workspace: Workspace, settings: DataSettings
) -> None:
    left = interrupted(workspace, settings)
    data = bytearray((left / "train.bin").read_bytes())
    data[0] ^= 1
    (left / "train.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"train\.bin is damaged.*starts over"):
        prepare(settings, workspace)
    assert not left.exists()
    verify_data(prepare(settings, workspace), always=True)


def test_damaged_content_of_finished_tokens_is_named(
    workspace: Workspace, settings: DataSettings
) -> None:
    folder = prepare(settings, workspace)
    path = folder / "train.bin"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged: train\.bin .*delete the folder"):
        prepare(settings, workspace)
    # A change that keeps size and time is found by comparing everything.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepare(settings, workspace) == folder
    with pytest.raises(UserError, match=r"is damaged: train\.bin"):
        prepare(settings, workspace, verify=True)


@pytest.mark.slow
def test_encoding_uses_all_cores(workspace: Workspace, settings: DataSettings) -> None:
    code = (
        "import psutil, sys\n"
        "from pathlib import Path\n"
        "from orchestrator.settings import DataSettings\n"
        "from orchestrator.data.preparation import prepare\n"
        "from orchestrator.workspace.layout import open_workspace\n"
        "settings = DataSettings.model_validate_json(sys.argv[1])\n"
        "before = psutil.Process().num_threads()\n"
        "prepare(settings, open_workspace(Path(sys.argv[2])))\n"
        "print(psutil.Process().num_threads() - before)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", code, settings.model_dump_json(), str(workspace.root)],
        env={**environment, "RAYON_NUM_THREADS": "5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) >= 5, "the tokenizers library's own threads"


class Texts(Progress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def advance(self, done: float, text: str = "", **_: Any) -> None:
        self.texts.append(text)


def test_progress_shows_rates(
    workspace: Workspace, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "DOCUMENTS_PER_BATCH", 10)
    progress = Texts()
    prepare(settings, workspace, progress)
    assert any(re.search(r"\d tokens, [\d,]+ tokens/s, [\d.]+ \wi?B/s", t) for t in progress.texts)
