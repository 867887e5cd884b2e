"""A crash at any moment leaves each file and folder as it was or as it will be.

`Recorder` notes what a program asks of the file system, and what is on disk for certain before and
after each request. A crash keeps for certain what was fsynced: the content of a file since its own
fsync, and the names in a folder since the folder's. All else may be on disk or not: new content may
be cut off, new names and removals missing. So each moment has several outcomes, which are made as
folders and opened by the real reader. Once the write has returned, all must be the new state. What
was written is found by looking at the files, because libraries write past Python.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sample_texts import tokens_of
from tokenizers import Tokenizer

from iiet.hf.weights import config_to_json, write_config
from iiet.model.config import ModelConfig
from orchestrator.data.store import is_complete, verify_data
from orchestrator.evaluation.store import AnswerJournal
from orchestrator.models.folder import check_checkpoint
from orchestrator.training.checkpoint import (
    load_training_state,
    prune_checkpoints,
    save_checkpoint,
    write_other_files,
)
from orchestrator.training.shards import ShardSaver
from orchestrator.training.world import World
from orchestrator.workspace.files import UnfinishedFolder, new_folder, read_json, write_json
from orchestrator.workspace.journal import JOURNAL_NAME, Journal, read_journal
from orchestrator.workspace.layout import checkpoint_name, find_checkpoints

RECORDED = ("fsync", "link", "mkdir", "rename", "replace", "rmdir", "truncate", "unlink")
NEED_SPACE = ("fsync", "link", "mkdir", "rename", "replace")

Answer = Any
Entry = tuple[bytes | None, int]
"""Content of a file, or None for a folder, and when it was changed, in ns."""
Entries = dict[str, Entry]
Outcome = tuple[tuple[str, bytes | None], ...]


class Recorder:
    """The requests of a program, and what a crash may leave of a folder before each of them."""

    def __init__(self, root: Path, *, failing: int | None = None) -> None:
        """Watch a folder, which is on disk as it is; the request number `failing` fails."""
        self.requests: list[str] = []
        self.outcomes: dict[Outcome, Entries] = {}
        self.last: set[Outcome] = set()
        """The outcomes of a crash after the last request."""
        self._root = root
        self._failing = failing
        self._ids = itertools.count(1)
        # By id, because a file system gives the number of a deleted file to the next one.
        self._living: dict[int, int] = {}  # Number in the file system -> id.
        self._now: dict[int, Entry] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._scan()
        self._safe = {key: content or b"" for key, (content, _) in self._now.items()}
        self._safe_names = {key: dict(names) for key, names in self._names.items()}

    @contextmanager
    def recording(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Record the requests of the block."""
        with patch.context() as patched:
            for name in RECORDED:
                patched.setattr(os, name, self._recorded(name, getattr(os, name)))
            yield
        self._keep_outcomes()

    def _recorded(self, name: str, request: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._keep_outcomes()
            if name in NEED_SPACE:
                self.requests.append(f"{name}{arguments}")
                if len(self.requests) - 1 == self._failing:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = request(*arguments, **options)
            self._scan()
            if name == "fsync" and (key := self._living.get(os.fstat(arguments[0]).st_ino)):
                self._safe[key] = self._now[key][0] or b""
                self._safe_names[key] = dict(self._names.get(key, {}))
            elif name == "mkdir":  # A new folder counts as on disk at once, but not its content.
                path = Path(arguments[0])
                parent, key = (self._living[p.stat().st_ino] for p in (path.parent, path))
                self._safe_names.setdefault(parent, {})[path.name] = key
            return result

        return call

    def _scan(self) -> None:
        """Read what a program that runs now would see."""
        before = self._living
        self._living = {}
        self._names = {key: {} for key in self._names}

        def visit(path: Path) -> int:
            status = path.stat()
            is_folder = stat.S_ISDIR(status.st_mode)
            key = before.get(status.st_ino, self._living.get(status.st_ino))
            key = next(self._ids) if key is None else key
            self._living[status.st_ino] = key
            content = None if is_folder else path.read_bytes()
            self._now[key] = content, status.st_mtime_ns
            if is_folder:
                self._names[key] = {child.name: visit(child) for child in path.iterdir()}
            return key

        self._top = visit(self._root)

    def _keep_outcomes(self) -> None:
        self._scan()
        self.last = set()
        for data, names in itertools.product(("all", "safe"), ("all", "safe", "removals")):
            entries = self._outcome(self._top, "", data, names)
            outcome = tuple((name, entries[name][0]) for name in sorted(entries))
            self.outcomes[outcome] = entries
            self.last.add(outcome)

    def _outcome(self, key: int, path: str, data: str, names: str) -> Entries:
        entries: Entries = {}
        living = self._names.get(key, {})
        safe_names = self._safe_names.get(key, {})
        for name, child in (living if names == "all" else safe_names).items():
            if names == "removals" and name not in living:
                continue
            content, modified_ns = self._now[child]
            if content is None:
                entries |= self._outcome(child, f"{path}{name}/", data, names)
            elif data == "safe" and content != (safe := self._safe.get(child, b"")):
                num_kept_bytes = len(safe) if content.startswith(safe) else 0
                content = content[: (num_kept_bytes + len(content)) // 2]
            entries[f"{path}{name}"] = content, modified_ns
        return entries


def make_outcome(entries: Entries, folder: Path) -> Path:
    """Make what a crash left as a folder; files keep their times, by which readers trust them."""
    folder.mkdir()
    for name in sorted(entries):
        content, modified_ns = entries[name]
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
            os.utime(folder / name, ns=(modified_ns, modified_ns))
    return folder


@dataclass(frozen=True)
class Case:
    """One kind of write; each function takes the folder in which it happens."""

    prepare: Callable[[Path], Any]
    write: Callable[[Path], Any]
    read: Callable[[Path], Answer]
    is_replaced: bool = False
    """Between the old folder and the new one there may be none, as readers expect."""
    resumes: bool = False
    """The same write, done again, uses the files that an error left, and succeeds."""


def nothing(folder: Path) -> None:
    """Prepare nothing."""


CONFIG = ModelConfig(
    vocab_size=8, dim=4, num_layers=1, num_heads=1, num_kv_heads=1, ffn_dim=4, context_length=4,
    method="vanilla",
)  # fmt: skip


def a_checkpoint(step: int, value: float) -> Callable[[Path], Path]:
    return lambda folder: save_checkpoint(
        folder,
        step,
        config=CONFIG,
        weights={"weight": torch.full((64,), value)},
        training_state={"value": value},
        tokenizer_path=None,
        provenance={},
    )


def shards_of_one_worker(step: int, value: float) -> Callable[[Path], None]:
    def complete(unfinished: UnfinishedFolder, checksums: Mapping[str, str], _: float) -> None:
        write_config(unfinished.path, config_to_json(CONFIG))
        write_other_files(
            unfinished.path,
            step,
            CONFIG,
            training_state={"value": value},
            tokenizer_path=None,
            provenance={},
            checksums=checksums,
        )
        unfinished.finish()

    def write(folder: Path) -> None:
        weight = torch.full((64,), value)
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        saver = ShardSaver(World())
        path = folder / checkpoint_name(step)
        try:
            saver.start(path, {"weight": weight}, {"weight.exp_avg": -weight}, complete).result()
        finally:
            saver.close()
            dist.destroy_process_group()

    return write


def checkpoints(folder: Path) -> Answer:
    saved_checkpoints = find_checkpoints(folder)
    for checkpoint in saved_checkpoints:
        check_checkpoint(checkpoint, with_training_state=True)
    return [
        (checkpoint.name, load_training_state(checkpoint)["value"])
        for checkpoint in saved_checkpoints
    ]


def some_tokens(folder: Path) -> Path:
    words = Tokenizer.from_str(
        '{"version": "1.0", "added_tokens": [{"id": 2, "content": "<|endoftext|>", "special": true,'
        ' "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}],'
        '"pre_tokenizer": {"type": "Whitespace"}, "model": {"type": "WordLevel", "unk_token": "a",'
        '"vocab": {"a": 0, "b": 1, "<|endoftext|>": 2}}}'
    )
    texts = ["a b " * number for number in range(1, 9)]
    return tokens_of(texts, folder, loaded_tokenizer=words, validation_fraction=0.3)


def tokens(folder: Path) -> Answer:
    folders = (path for path in folder.glob("[!.]*") if path.is_dir())
    token_folders = [path for path in folders if is_complete(path)]
    for path in token_folders:
        verify_data(path)
    return [path.name for path in token_folders]


def a_folder(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with new_folder(folder / "model") as filling:
            for name in names:
                (filling / name).write_text(name * 9)

    return write


def files_of(folder: Path) -> Answer:
    files = (folder / "model").glob("*")
    return sorted((path.name, path.read_text()) for path in files) or None


CASES = {
    "json": Case(
        lambda folder: write_json(folder / "a.json", {"x": 1}),
        lambda folder: write_json(folder / "a.json", {"x": 2, "y": [1, 2]}),
        lambda folder: read_json(folder / "a.json"),
    ),
    "first-json": Case(
        nothing,
        lambda folder: write_json(folder / "new" / "a.json", {"x": [1, 2]}),
        lambda folder: read_json(folder / "new" / "a.json"),
    ),
    "checkpoint": Case(a_checkpoint(1, 1.0), a_checkpoint(2, 2.0), checkpoints),
    "replaced-checkpoint": Case(
        a_checkpoint(1, 1.0), a_checkpoint(1, 2.0), checkpoints, is_replaced=True
    ),
    "shards": Case(a_checkpoint(1, 1.0), shards_of_one_worker(2, 2.0), checkpoints),
    "deleted-checkpoint": Case(
        lambda folder: [a_checkpoint(step, 1.0)(folder) for step in (1, 2)],
        lambda folder: prune_checkpoints(folder, 1),
        checkpoints,
    ),
    "tokens": Case(nothing, some_tokens, tokens, resumes=True),
    "replaced-folder": Case(a_folder("a", "b"), a_folder("b", "c"), files_of, is_replaced=True),
}


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n == "tokens")) for n in CASES])
def case(request) -> Case:
    return CASES[request.param]


def test_a_crash_leaves_the_old_state_or_the_new_one(case, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    case.prepare(work)
    old = case.read(work)
    recorder = Recorder(work)
    with recorder.recording(monkeypatch):
        case.write(work)
    new = case.read(work)
    assert new != old
    between = [None, []] if case.is_replaced else []
    for number, (outcome, entries) in enumerate(recorder.outcomes.items()):
        crashed = make_outcome(entries, tmp_path / str(number))
        valid = [new] if outcome in recorder.last else [old, new, *between]
        assert case.read(crashed) in valid, sorted(entries)
        if case.resumes and case.read(crashed) == old:
            case.write(crashed)
            assert case.read(crashed) == new


def test_a_failed_write_leaves_the_old_state_and_nothing_else(case, tmp_path, monkeypatch):
    def names(folder: Path) -> set[str]:
        files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {str(name) for name in files if not name.name.endswith(".lock")}

    states: list[Answer] = []
    for failing in itertools.count():
        work = tmp_path / str(failing)
        work.mkdir()
        case.prepare(work)
        old = case.read(work)
        before = names(work)
        recorder = Recorder(work, failing=failing)
        with recorder.recording(monkeypatch), suppress(OSError):
            case.write(work)
        if failing >= len(recorder.requests):
            break
        states.append(case.read(work))
        if states[-1] == old and not case.resumes:
            assert names(work) == before, recorder.requests[failing]
    assert failing > 1
    assert all(answer in (old, case.read(work)) for answer in states), "the last write was whole"


def test_a_journal_that_is_cut_anywhere_gives_a_whole_prefix(tmp_path):
    journal = Journal(tmp_path)
    for step in range(2):
        journal.metrics(step, {"loss": 1 / 3})
    journal.close()
    path = tmp_path / JOURNAL_NAME
    complete_journal = path.read_bytes()
    records, end = read_journal(tmp_path)
    assert (len(records), end) == (2, len(complete_journal))
    for length in range(len(complete_journal)):
        path.write_bytes(complete_journal[:length])
        records_of_prefix, offset = read_journal(tmp_path)
        assert records_of_prefix == records[: complete_journal[:length].count(b"\n")]
        path.write_bytes(complete_journal)  # The writer lives, and ends its line.
        assert records_of_prefix + read_journal(tmp_path, offset)[0] == records
        # Or the writer was killed, and another one continues.
        path.write_bytes(complete_journal[:length])
        next_journal = Journal(tmp_path)
        next_journal.metrics(9, {"loss": 0.5})
        next_journal.close()
        steps = [record["step"] for record in records_of_prefix + read_journal(tmp_path, offset)[0]]
        # A line that lacked only its end is whole after all.
        assert steps in (
            [*range(len(records_of_prefix)), 9],
            [*range(len(records_of_prefix) + 1), 9],
        )


def test_an_answer_journal_that_is_cut_anywhere_gives_a_whole_prefix(tmp_path):
    path = tmp_path / "answers"
    keys = "ab"

    def write(key: str) -> None:
        AnswerJournal(path).add({key: [0.1, "x\ny"]})

    def readable_keys() -> str:
        return "".join(key for key in "abcd" if AnswerJournal(path).get(key) == [0.1, "x\ny"])

    for key in keys:
        write(key)
    complete_journal = path.read_bytes()
    for length in range(len(complete_journal)):
        path.write_bytes(complete_journal[:length])
        before = readable_keys()
        assert keys.startswith(before)
        write("d")
        assert readable_keys() in (f"{before}d", f"{keys[: len(before) + 1]}d")
