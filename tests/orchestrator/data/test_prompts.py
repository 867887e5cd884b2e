"""Prompts with completions in JSON lines: the model reads both and learns the completion alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from iiet.model.batch import NO_TARGET
from orchestrator.data import text
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import find_prepared, prepare
from orchestrator.data.store import TRAIN_NAME, TokenStore, targets_name
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.settings import DataSettings, resolve_settings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace

PAIRS = [
    {"prompt": f"How many birds saw fish number {i}? ", "completion": f"{i * 7} birds."}
    for i in range(120)
]
TEMPLATE = (
    "<|endoftext|>{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_of(*files: Path, **changes: Any) -> DataSettings:
    tree = {"source": "files", "files": [*map(str, files)], "vocab_size": 400, **changes}
    return resolve_settings({"data": tree}).data


def token_store(settings: DataSettings, workspace: Workspace) -> TokenStore:
    store = open_data(prepare(settings, workspace))
    assert isinstance(store, TokenStore)
    return store


def documents(store: TokenStore) -> list[tuple[list[int], list[int]]]:
    """Return what each training document has before its targets, and its targets, as tokens."""
    assert store.train_targets is not None
    ends = np.flatnonzero(store.train[:] == store.manifest.end_of_text_id) + 1
    parts = np.split(store.train[:], ends)[:-1]
    flags = np.split(store.train_targets[:], ends)[:-1]
    return [
        (part[~chosen].tolist(), part[chosen].tolist())
        for part, chosen in zip(parts, flags, strict=True)
    ]


def test_targets_are_the_completion_and_the_end_of_the_text(tmp_path, workspace):
    store = token_store(settings_of(write_lines(tmp_path / "a.jsonl", PAIRS)), workspace)
    tokenizer = load_tokenizer(store.tokenizer_path)
    end = store.manifest.end_of_text_id
    expected = {
        tuple(tokenizer.encode(pair["prompt"]).ids): (
            *tokenizer.encode(pair["completion"]).ids,
            end,
        )
        for pair in PAIRS
    }
    targets_by_prompt = {tuple(prompt): tuple(targets) for prompt, targets in documents(store)}
    assert len(targets_by_prompt) > 80
    assert targets_by_prompt.items() < expected.items()
    assert store.validation_targets is not None
    assert len(store.validation_targets) == len(store.validation)


def test_windows_and_validation_count_the_targets_of_their_tokens(tmp_path, workspace):
    store = token_store(settings_of(write_lines(tmp_path / "a.jsonl", PAIRS)), workspace)
    batch = store.sequences(np.arange(20), context_length=24, seed=0)
    is_target = dict(enumerate(store.train_targets[:]))
    starts = [
        next(
            place
            for place in range(len(store.train) - 23)
            if store.train[place : place + 24].tolist() == row
        )
        for row in batch.input_ids.tolist()
    ]
    for start, counted in zip(starts, batch.counted.tolist(), strict=True):
        assert counted == [*(bool(is_target[start + i]) for i in range(1, 24)), False]
    (held_out,) = store.validation_batches(context_length=24, num_tokens=24, batch_size=1)
    assert 0 < held_out.num_targets < 23


def test_plain_text_beside_prompts_is_learned_whole(tmp_path, workspace):
    plain = [{"text": f"Number {i} is a story of its own."} for i in range(100)]
    files = write_lines(tmp_path / "a.jsonl", PAIRS), write_lines(tmp_path / "b.jsonl", plain)
    learned = documents(token_store(settings_of(*files), workspace))
    assert {bool(prompt) for prompt, _ in learned} == {True, False}
    alone = token_store(settings_of(files[1]), workspace)
    assert alone.train_targets is None
    assert not (alone.folder / targets_name(TRAIN_NAME)).exists()


def test_the_targets_of_many_parts_are_those_of_one(tmp_path, monkeypatch):
    plain = [{"text": f"Number {i} is a story of its own."} for i in range(40)]
    pairs = [*PAIRS, *PAIRS[:20]]  # Copies, which parts of their own drop at the end.
    settings = settings_of(*(
        write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", plain), ("b", pairs))
    ))  # fmt: skip
    in_one_part = token_store(settings, Workspace(tmp_path / "whole"))
    monkeypatch.setattr(text, "PART_BYTES", 900)
    in_parts = token_store(settings, Workspace(tmp_path / "in parts"))
    assert len(in_parts.manifest.train_files) > 5
    assert in_parts.fingerprint == in_one_part.fingerprint
    assert documents(in_parts) == documents(in_one_part)
    batches = [
        store.sequences(np.arange(60), context_length=24, seed=1).counted.tolist()
        for store in (in_one_part, in_parts)
    ]
    assert batches[0] == batches[1]


def test_completions_of_a_prompt_stay_together(tmp_path, workspace):
    rows = [
        {"prompt": pair["prompt"], "completion": f"{answer} {pair['completion']}"}
        for pair in PAIRS
        for answer in ("Yes,", "No,")
    ]
    store = token_store(settings_of(write_lines(tmp_path / "a.jsonl", rows)), workspace)
    counts = store.manifest.train.documents, store.manifest.validation.documents
    assert sum(counts) == len(rows)
    prompts = [tuple(prompt) for prompt, _ in documents(store)]
    assert all(prompts.count(prompt) == 2 for prompt in prompts[:40])
    # The same text with the prompt elsewhere is another document.
    moved = {"prompt": "How many", "completion": rows[0]["prompt"][8:] + rows[0]["completion"]}
    path = write_lines(tmp_path / "b.jsonl", [moved, *rows[1:]])
    assert token_store(settings_of(path), workspace).fingerprint != store.fingerprint


def test_a_mixture_counts_the_targets_of_each_source(tmp_path, workspace):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    settings = settings_of(path, source="mixture", shares={"files": 0.5, "phop_2": 0.5},
                           depth={"length": 16})  # fmt: skip
    mixture = open_data(prepare(settings, workspace))
    batch = mixture.sequences(np.arange(1000), context_length=24, seed=0)
    text = mixture.parts[0]
    assert isinstance(text, TokenStore)
    is_text = batch.component_numbers[:, 0] == 0
    alone = text.sequences(np.arange(500), context_length=24, seed=0)
    rows = torch.stack([batch.input_ids, batch.counted], 1)[is_text].tolist()
    assert sorted(rows) == sorted(torch.stack([alone.input_ids, alone.counted], 1).tolist())
    tasks = batch.targets[~is_text] != NO_TARGET
    assert torch.equal(batch.counted[~is_text], tasks)


@pytest.fixture
def chat_model(tmp_path, workspace) -> Path:
    """The folder of a model's tokenizer with a chat template, which writes the opening token."""
    rows = [{"text": pair["prompt"]} for pair in PAIRS]
    plain = token_store(settings_of(write_lines(tmp_path / "plain.jsonl", rows)), workspace)
    folder = tmp_path / "chat model"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(plain.tokenizer_path))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_chat_template_writes_question_and_answer(tmp_path, workspace, chat_model):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    settings = settings_of(path, tokenizer=str(chat_model / "tokenizer.json"), chat_template=True)
    store = token_store(settings, workspace)
    tokenizer = load_tokenizer(store.tokenizer_path)
    train = tokenizer.decode(store.train[:60].tolist(), skip_special_tokens=False)
    targets = store.train[:][store.train_targets[:]]
    assert train.startswith("<|endoftext|>[user] How many birds")
    answers = tokenizer.decode(targets.tolist(), skip_special_tokens=True)
    assert "[" not in answers
    assert "7 birds.\n" in answers
    (chat_model / "chat_template.jinja").write_text(TEMPLATE.replace("user", "u"))
    assert find_prepared(settings, workspace.tokens) is None, "another template is other data"


@pytest.mark.parametrize(
    ("row", "phrase"),
    [
        ({"prompt": "Why?", "completion": " "}, "completion"),
        ({"prompt": "Why?"}, "completion"),
        ({"prompt": 3, "completion": "Because."}, "prompt"),
    ],
)
def test_bad_records_name_their_line(row, phrase, tmp_path, workspace):
    path = write_lines(tmp_path / "a.jsonl", [*PAIRS, row])
    with pytest.raises(UserError, match=f"line 121.*{phrase}"):
        prepare(settings_of(path), workspace)


def test_a_chat_needs_a_model_with_a_template(tmp_path, workspace, chat_model):
    path = write_lines(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(UserError, match=r"data\.chat_template"):
        prepare(settings_of(path, chat_template=True), workspace)
    (chat_model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        prepare(settings_of(path, tokenizer=str(chat_model), chat_template=True), workspace)
