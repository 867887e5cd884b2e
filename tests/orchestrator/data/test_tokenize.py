"""Token folders: the same bytes from any number of parts, threads and interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kept_progress import KeptProgress
from pydantic import Field
from refusals import assert_names, refused
from sample_texts import lines_of, tokens_of
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from orchestrator.data import text, text_parts, tokenize
from orchestrator.data.split import is_validation
from orchestrator.data.store import (
    MANIFEST_NAME,
    FileArray,
    Manifest,
    TokenStore,
    open_tokens,
    verify_data,
)
from orchestrator.data.text_parts import PartRunner, thread_runner
from orchestrator.data.tokenize import write_text
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import DamagedFile, UserError
from orchestrator.workspace.files import VERIFIED_NAME
from orchestrator.workspace.layout import TEMPORARY_PREFIX

TEXTS = [f"Document {i} tells that {i * 7} birds flew over the sea." for i in range(300)]
OPTIONS: dict[str, Any] = {"vocab_size": 300, "validation_fraction": 0.2}


def split_documents(store: TokenStore, tokens: FileArray) -> list[str]:
    tokenizer = load_tokenizer(store.tokenizer_path)
    array = tokens[:]
    ends = np.flatnonzero(array == store.manifest.end_of_text_id)
    starts = [0, *(ends[:-1] + 1)]
    return [
        tokenizer.decode(array[a:b].tolist(), skip_special_tokens=False)
        for a, b in zip(starts, ends, strict=True)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != VERIFIED_NAME}


# A text counts as often as it is written: in one part, and in several.
SEVERAL = [
    [*TEXTS[number * 80 : number * 80 + 120], TEXTS[5], TEXTS[number * 80 + 7]]
    for number in range(3)
]


def in_one_part(folder: Path, **settings: Any) -> Path:
    """Return the token folder of the texts of `several`, which are in one file there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PART_BYTES", 10**9)
        return tokens_of(chain.from_iterable(SEVERAL), folder, **OPTIONS, **settings)


@pytest.fixture
def several(tmp_path, monkeypatch) -> DataSettings:
    """Settings of three files in many parts."""
    for number, part in enumerate(SEVERAL):
        (tmp_path / f"{number}.jsonl").write_text(lines_of(part))
    monkeypatch.setattr(text, "PART_BYTES", 1500)
    return DataSettings(source="files", files=(str(tmp_path / "*.jsonl"),), **OPTIONS)


class WatchedThreads:
    """Threads that call functions when they begin a part, and when they have written it."""

    def __init__(
        self,
        number: int,
        *,
        on_begin: Callable[[], object] = lambda: None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self.num_at_once = number
        self.on_begin = on_begin
        self.on_end = on_end

    @contextmanager
    def opened(self) -> Iterator[PartRunner]:
        with thread_runner(self.num_at_once) as self.runner:
            yield self

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        return self.runner.submit(work)

    def submit_reporting(self, work: Callable[..., Any], report: Any) -> Future[Any]:
        def watched_work() -> Any:
            self.on_begin()
            result = work(report)
            self.on_end()
            return result

        return self.runner.submit(watched_work)


def test_a_document_begins_as_the_tokenizer_begins_a_text(tmp_path):
    texts = TEXTS[:20]
    plain = open_tokens(tokens_of(texts, tmp_path / "plain", **OPTIONS))
    tokenizer = load_tokenizer(plain.tokenizer_path)
    tokenizer.add_special_tokens(["<s>"])
    first = tokenizer.token_to_id("<s>")
    folders = {}
    for name, template in {"one": "<s> $A", "two": "<s> $A <s>", "none": "$A"}.items():
        tokenizer.post_processor = TemplateProcessing(
            single=template, pair="$A $B", special_tokens=[("<s>", first)]
        )
        path = tmp_path / f"{name}.json"
        tokenizer.save(str(path))
        options = {**OPTIONS, "tokenizer": str(path)}
        folders[name] = open_tokens(tokens_of(texts, tmp_path / name, **options))
    # What a tokenizer puts after a text does not count: each document ends once.
    for name in ("one", "two"):
        array = folders[name].train[:]
        bare = plain.train[:]
        ends = np.flatnonzero(bare == plain.manifest.end_of_text_id)
        starts = [0, *(ends[:-1] + 1)]
        assert array.tolist() == np.insert(bare.astype(array.dtype), starts, first).tolist()
    assert folders["none"].train[:].tolist() == plain.train[:].tolist()
    assert len({store.fingerprint for store in folders.values()}) == 3


def test_the_tokens_are_the_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(text_parts, "DOCUMENTS_PER_BATCH", 7)
    texts = [*TEXTS, *(f"Ένα κείμενο {number}." for number in range(20))]
    texts += texts[:50]
    store = open_tokens(tokens_of(texts, tmp_path, **OPTIONS))
    verify_data(store.folder, always=True)
    train = [document for document in texts if not is_validation(document, 0.2)]
    assert {document for document in texts if is_validation(document, 0.1)} < set(texts) - set(
        train
    )
    validation = [document for document in texts if is_validation(document, 0.2)]
    assert split_documents(store, store.train) == train
    assert split_documents(store, store.validation) == validation
    counts = store.manifest.validation
    num_bytes = sum(len(document.encode()) for document in validation)
    assert num_bytes > sum(map(len, validation)), "one of them is not ASCII"
    assert (counts.documents, counts.bytes) == (len(validation), num_bytes)
    lines = (store.folder / "validation.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [
        {"text": document, "source": "texts.jsonl"} for document in validation
    ]
    assert store.train[:].dtype == np.uint16
    assert store.vocab_size == 300
    assert store.manifest.train.tokens == len(store.train)


def test_the_fingerprint_says_what_the_tokens_hold(tmp_path):
    first = tokens_of(TEXTS, tmp_path / "a", **OPTIONS)
    assert tokens_of(TEXTS, tmp_path / "b", **OPTIONS).name == first.name
    different = [
        tokens_of(TEXTS[:-1], tmp_path / "a", **OPTIONS),
        tokens_of(TEXTS, tmp_path / "a", **{**OPTIONS, "vocab_size": 290}),
        tokens_of(TEXTS, tmp_path / "a", **{**OPTIONS, "validation_fraction": 0.3}),
        tokens_of(TEXTS[::-1], tmp_path / "a", **{**OPTIONS, "tokenizer": str(first)}),
    ]
    assert len({first.name, *(folder.name for folder in different)}) == 5
    assert (different[-1] / "tokenizer.json").read_bytes() == (
        first / "tokenizer.json"
    ).read_bytes()
    (first / MANIFEST_NAME).unlink()
    assert tokens_of(TEXTS, tmp_path / "a", **OPTIONS) == first, "they are written again"
    verify_data(first, always=True)


@pytest.mark.parametrize("stamps", ["as they are", "{"])
def test_tokens_that_are_cut_or_missing_are_not_opened(tmp_path, stamps):
    folder = tokens_of(TEXTS, tmp_path, **OPTIONS)
    if stamps == "{":
        (folder / VERIFIED_NAME).write_text(stamps)
    train = folder / "train.bin"
    train.write_bytes(train.read_bytes()[:-2])
    with refused(DamagedFile, "train.bin", "changed"):
        open_tokens(folder)
    train.unlink()
    with refused(DamagedFile, "train.bin", "missing"):
        open_tokens(folder)


def test_the_tokenizer_is_not_trained_on_held_out_text(tmp_path):
    marked = [
        document + (" zqzqzqzq" * 50 if is_validation(document, 0.2) else "") for document in TEXTS
    ]
    # The mark changes the hashes; keep the documents whose side is the same.
    marked = [document for document in marked if is_validation(document, 0.2) == ("zq" in document)]
    assert sum("zq" in document for document in marked) > 3
    folder = tokens_of(marked, tmp_path, **OPTIONS)
    vocabulary = load_tokenizer(folder / "tokenizer.json").get_vocab()
    assert not [token for token in vocabulary if "zq" in token]


@pytest.mark.parametrize("num_sampled", [100, 20])
def test_a_tokenizer_is_trained_on_each_part_of_a_sorted_corpus(tmp_path, monkeypatch, num_sampled):
    greek = [f"Ένα κείμενο {number} και {number * 7} κείμενα." for number in range(300)]
    options = {**OPTIONS, "vocab_size": 400}
    corpus = [*TEXTS, *greek]
    whole = load_tokenizer(tokens_of(corpus, tmp_path, **options))
    monkeypatch.setattr(tokenize, "TOKENIZER_CHARACTERS", 3000)
    monkeypatch.setattr(tokenize, "MAX_PARTS_SAMPLED", num_sampled)
    monkeypatch.setattr(text, "PART_BYTES", 2000)
    files = {
        name: (tokens_of(texts, tmp_path / name, **options) / "tokenizer.json").read_bytes()
        for name, texts in {"sorted": corpus, "again": corpus, "reversed": corpus[::-1]}.items()
    }
    sampled = Tokenizer.from_buffer(files["sorted"])
    for documents in (TEXTS, greek):
        num_tokens, num_by_whole = (
            sum(len(encoding.ids) for encoding in tokenizer.encode_batch(documents))
            for tokenizer in (sampled, whole)
        )
        assert num_tokens < 1.1 * num_by_whole
    assert files["again"] == files["sorted"]
    if num_sampled == 100:  # All parts are read: the order of the documents does not matter.
        assert files["reversed"] == files["sorted"]
    else:
        assert files["reversed"] != files["sorted"]


def test_a_small_corpus_has_a_validation_document_or_is_an_error(tmp_path):
    for number in range(2, 8):
        part = TEXTS[number : 2 * number]
        store = open_tokens(tokens_of(part, tmp_path / str(number), **OPTIONS))
        assert store.manifest.validation.documents >= 1
    for texts, message in (([], "the corpus is empty"), (TEXTS[:1], "a single document of .* tok")):
        with pytest.raises(UserError, match=message):
            tokens_of(texts, tmp_path / "none", **OPTIONS)
        assert not list((tmp_path / "none").glob("*/*.bin"))


def test_several_threads_give_the_same_bytes_as_one(several, tmp_path):
    one_part = in_one_part(tmp_path / "whole")
    for number in (1, 3):
        parent = tmp_path / f"by {number}"
        folder = write_text(
            several, parent, "key", Progress(), open_runner=partial(thread_runner, number)
        )
        assert folder.name == one_part.name
        assert open_tokens(folder).train[:].tolist() == open_tokens(one_part).train[:].tolist()
        for name in ("validation.bin", "tokenizer.json"):
            assert (folder / name).read_bytes() == (one_part / name).read_bytes(), (number, name)
        assert [path.name for path in parent.iterdir()] == [folder.name]
    (tmp_path / "2.jsonl").write_text(lines_of(TEXTS[200:250]) + '{"text": 5}')
    with refused(UserError, "2.jsonl, line 51", "'text'"):
        write_text(
            several, tmp_path / "bad", "key", Progress(), open_runner=partial(thread_runner, 3)
        )


@pytest.mark.parametrize("max_documents", [None, 150])
def test_parts_stay_parts_and_only_the_last_is_copied_for_its_first_documents(
    several, tmp_path, monkeypatch, max_documents
):
    linked: list[str] = []
    hardlink_to = Path.hardlink_to

    def noting(new: Path, stored: Path) -> None:
        linked.append(new.name)
        hardlink_to(new, stored)

    monkeypatch.setattr(Path, "hardlink_to", noting)
    settings = several.model_copy(update={"max_documents": max_documents})
    folder = write_text(settings, tmp_path / "tokens", "key", Progress())
    store = open_tokens(folder)
    verify_data(folder, always=True)
    names = list(store.manifest.train_files)
    assert len(names) > 2
    assert sorted(linked) == (names[:-1] if max_documents else names)
    one_part = open_tokens(in_one_part(tmp_path / "whole", max_documents=max_documents))
    assert one_part.manifest.train_files == ("train.bin",)
    assert one_part.fingerprint == store.fingerprint
    for name in ("validation.bin", "tokenizer.json"):
        assert (folder / name).read_bytes() == (one_part.folder / name).read_bytes()
    for length in (16, 333):  # A part has some 400 tokens.
        windows = [
            tokens.sequences(np.arange(90), context_length=length, seed=3).input_ids.tolist()
            for tokens in (store, one_part)
        ]
        assert windows[0] == windows[1]


def test_parts_of_another_node_may_be_seen_late(several, tmp_path, monkeypatch):
    expected = write_text(several, tmp_path / "at once", "key", Progress())
    seen: list[Path] = []
    hidden: list[Path] = []

    def hide() -> None:
        for part in (tmp_path / "late").glob(f"{TEMPORARY_PREFIX}*/tokenized/[0-9]*"):
            if part not in seen:
                part.rename(tmp_path / part.name)
                hidden.append(part)

    def show(_: float) -> None:
        while hidden:
            part = hidden.pop()
            (tmp_path / part.name).rename(part)
            seen.append(part)

    monkeypatch.setattr(time, "sleep", show)
    runner = WatchedThreads(1, on_end=hide)
    folder = write_text(several, tmp_path / "late", "key", Progress(), open_runner=runner.opened)
    assert len(seen) == len(text.text_source(several).parts())
    assert contents(folder) == contents(expected)


def test_a_file_system_without_second_names_gets_copies(several, tmp_path, monkeypatch):
    folder = write_text(several, tmp_path / "linked", "key", Progress())

    def refuse(*_: Any) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    copies = write_text(several, tmp_path / "copied", "key", Progress())
    assert contents(copies) == contents(folder)


def test_work_that_a_lost_worker_had_done_is_done_again(several, tmp_path):
    expected = write_text(several, tmp_path / "once", "key", Progress())

    class Repeating:
        """Does all work twice, as for a worker that is lost once its work is done."""

        num_at_once = 1

        def submit(self, work: Callable[[], Any]) -> Future[Any]:
            work()
            done: Future[Any] = Future()
            done.set_result(work())
            return done

        def submit_reporting(self, work: Callable[..., Any], report: Any) -> Future[Any]:
            return self.submit(partial(work, report))

    again = write_text(
        several, tmp_path / "twice", "key", Progress(), open_runner=lambda: nullcontext(Repeating())
    )
    assert contents(again) == contents(expected)


def test_tokens_of_an_earlier_version_are_read(tmp_path):
    class EarlierManifest(Manifest):
        train_files: tuple[str, ...] = Field(default=(), exclude=True)

    folder = tokens_of(TEXTS, tmp_path, **OPTIONS)
    store = open_tokens(folder)
    EarlierManifest(**store.manifest.model_dump()).write(folder / MANIFEST_NAME)
    assert "train_files" not in (folder / MANIFEST_NAME).read_text()
    assert open_tokens(folder).train[:].tolist() == store.train[:].tolist()


def test_several_threads_read_no_more_documents_than_are_wanted(several, tmp_path):
    num_parts = len(text.text_source(several).parts())
    started = []
    for num_documents in (7, 60, 150, 10_000):
        settings = several.model_copy(update={"max_documents": num_documents})
        tokens = []
        for num_threads in (1, 4):
            started.clear()
            parent = tmp_path / f"{num_documents} by {num_threads}"
            runner = WatchedThreads(num_threads, on_begin=lambda: started.append(1))
            folder = write_text(settings, parent, "key", Progress(), open_runner=runner.opened)
            tokens.append(open_tokens(folder).train[:].tolist())
            if num_threads == 1:
                num_needed = len(started)
            assert len(started) <= num_needed + 1, "threads begin parts that nobody needs"
        assert tokens[0] == tokens[1]
        manifest = Manifest.read(folder / MANIFEST_NAME)
        num_tokenized = manifest.train.documents + manifest.validation.documents
        assert num_tokenized == min(num_documents, sum(map(len, SEVERAL)))
    assert num_needed == num_parts


KILLED = """
import os, signal, sys
from functools import partial
from itertools import chain
from pathlib import Path
from orchestrator.data import text, text_parts, tokenize
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress

signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's & ignores it.
text.PART_BYTES = 1500
text_parts.DOCUMENTS_PER_BATCH = 5
reports = 0
class Killed(Progress):
    def advance(self, done, text="", **_):
        global reports
        reports += 1
        if done == 3 and "tokens" in text and reports > 20:
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
settings = DataSettings.model_validate_json(sys.argv[2])
one_thread = partial(text_parts.thread_runner, 1)
tokenize.write_text(settings, Path(sys.argv[3]), "key", Killed(), open_runner=one_thread)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_an_interrupted_preparation_resumes_to_identical_bytes(several, tmp_path, name):
    parent = tmp_path / "tokens"
    arguments = [name, several.model_dump_json(), str(parent)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == -getattr(signal, name), done.stderr
    (unfinished,) = parent.glob(f"{TEMPORARY_PREFIX}*")
    stored_parts = sorted(unfinished.glob("tokenized/[0-9]*"))
    # After Ctrl-C, the thread at work may still finish its part.
    assert len(stored_parts) >= 3
    damaged = stored_parts[1] / "train.bin"
    damaged.write_bytes(b"\1" + damaged.read_bytes()[1:])

    started = []
    progress = KeptProgress()
    runner = WatchedThreads(1, on_begin=lambda: started.append(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "train_from_iterator", pytest.fail)  # It was trained before.
        folder = write_text(several, parent, "key", progress, open_runner=runner.opened)
    verify_data(folder, always=True)
    num_missing = len(text.text_source(several).parts()) - len(stored_parts)
    assert len(started) == 1 + num_missing, "whole parts are not tokenized again"
    assert_names(progress.notes[0], "000001", "train.bin")
    assert not list(parent.glob(f"{TEMPORARY_PREFIX}*"))
    uninterrupted = write_text(
        several, tmp_path / "whole", "key", Progress(), open_runner=partial(thread_runner, 1)
    )
    assert contents(folder) == contents(uninterrupted)
