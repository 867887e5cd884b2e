"""A mixture gives each source its share, in one vocabulary, and its sequences unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_progress import KeptProgress
from refusals import refused
from sample_texts import save_word_tokenizer

from iiet.model.batch import NO_TARGET
from orchestrator.data.depth_tasks import NUMBER_WORDS
from orchestrator.data.mixture import MixtureStore, open_data
from orchestrator.data.preparation import expected_tokens, find_prepared, prepare
from orchestrator.data.store import verify_data
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.settings import DataSettings, resolve_settings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import TEMPORARY_PREFIX, Workspace

SHARES = {"files": 0.7, "phop_2": 0.2, "chain_2": 0.1}
SYMBOL = "<|0|>"
LENGTH = 20


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "a.txt"
    texts = [f"Text {i} says that {SYMBOL} has {i * 13} kinds of fish." for i in range(300)]
    path.write_text("<|endoftext|>".join(texts))
    return path


def data_settings(text: Path, shares: dict[str, float], **changes: object) -> DataSettings:
    tree = {
        "source": "mixture",
        "shares": shares,
        "files": [str(text)] if "files" in shares else [],
        "vocab_size": 300,
        "depth": {"length": 16},
        **changes,
    }
    return resolve_settings({"data": tree}).data


def two_texts(text: Path, shares: dict[str, float]) -> DataSettings:
    folder = text.parent / "data_set"
    folder.mkdir()
    rows = [{"text": f"Row {i} holds {i * 7} birds and no fish at all."} for i in range(200)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data_settings(text, shares, hub_name=str(folder))


@pytest.fixture
def settings(text) -> DataSettings:
    return data_settings(text, SHARES)


@pytest.fixture
def mixture(settings, workspace) -> MixtureStore:
    data = open_data(prepare(settings, workspace))
    assert isinstance(data, MixtureStore)
    return data


def test_shares_are_exact_in_each_block_of_a_thousand(mixture):
    batch = mixture.sequences(np.arange(2000), context_length=LENGTH, seed=0)
    assert batch.component_numbers is not None
    numbers = batch.component_numbers[:, 0]
    assert (batch.component_numbers == numbers[:, None]).all()
    for block in (numbers[:1000], numbers[1000:]):
        shares = {n: int((block == k).sum()) / 1000 for k, n in enumerate(mixture.component_names)}
        assert shares == SHARES
    assert not torch.equal(numbers[:1000], numbers[1000:])


def test_a_position_alone_decides_its_sequence(mixture):
    options = {"context_length": LENGTH, "seed": 3}
    full_batch = mixture.batch(7, **options, global_batch=24)
    for world_size in (2, 3):
        parts = [
            mixture.batch(7, **options, global_batch=24, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), full_batch.input_ids)
        assert torch.equal(torch.cat([part.targets for part in parts]), full_batch.targets)
    single = mixture.sequences(np.array([7 * 24 + 5]), **options)
    assert torch.equal(single.input_ids[0], full_batch.input_ids[5])


def test_each_source_gives_the_sequences_that_it_gives_alone(mixture, text, workspace):
    alone = DataSettings(source="files", files=(str(text),), vocab_size=300)
    folder = prepare(alone, workspace)
    assert folder in mixture.manifest.text_folders(mixture.folder).values()  # stored once
    texts = open_data(folder)
    batch = mixture.sequences(np.arange(1000), context_length=LENGTH, seed=4)
    rows = batch.component_numbers[:, 0] == mixture.component_names.index("files")
    expected = texts.sequences(np.arange(700), context_length=LENGTH, seed=4)
    mixed_rows = {(*ids, *targets) for ids, targets in _rows(batch.input_ids, batch.targets, rows)}
    all_rows = torch.ones(700, dtype=torch.bool)
    assert mixed_rows == {
        (*a, *b) for a, b in _rows(expected.input_ids, expected.targets, all_rows)
    }


def _rows(
    ids: torch.Tensor, targets: torch.Tensor, chosen: torch.Tensor
) -> list[tuple[list[int], list[int]]]:
    return list(zip(ids[chosen].tolist(), targets[chosen].tolist(), strict=True))


def test_a_task_in_words_adds_no_token_to_the_text(text, workspace, tmp_path):
    tokenizer_file = save_word_tokenizer(tmp_path, text.read_text())
    depth = {"symbols": "words", "num_symbols": 8}
    settings = data_settings(
        text, {"files": 0.5, "lookup_2": 0.5}, depth=depth, tokenizer=str(tokenizer_file)
    )
    data = open_data(prepare(settings, workspace))
    assert isinstance(data, MixtureStore)
    tokenizer = load_tokenizer(tokenizer_file)
    assert load_tokenizer(data.tokenizer_path).to_str() == tokenizer.to_str()
    assert expected_tokens(settings, None).vocab_size == data.vocab_size
    batch = data.sequences(np.arange(40), context_length=LENGTH, seed=0)
    of_task = batch.component_numbers[:, 0] == data.component_names.index("lookup_2")
    assert of_task.any()
    assert ((batch.targets[of_task] != NO_TARGET).sum(1) == 1).all()
    (item,) = data.components["lookup_2"].items(data.components["lookup_2"].tasks[0], 1)
    assert item.context.split()[-2] in NUMBER_WORDS
    trained_here = data_settings(text, {"files": 0.5, "lookup_2": 0.5}, depth=depth)
    with refused(UserError, "data.depth.symbols=words"):
        prepare(trained_here, workspace)


def test_text_never_becomes_a_symbol(mixture):
    tokenizer = load_tokenizer(mixture.tokenizer_path)
    (texts,) = mixture.texts
    first_symbol = texts.vocab_size
    assert tokenizer.encode(SYMBOL).ids == [first_symbol]
    assert SYMBOL in tokenizer.decode(texts.train[:200].tolist())
    assert max(texts.train[:].max(), texts.validation[:].max()) < first_symbol
    batch = mixture.sequences(np.arange(1000), context_length=LENGTH, seed=0)
    is_task = batch.component_numbers > 0
    has_target = batch.targets != NO_TARGET
    assert (batch.targets[is_task & has_target] >= first_symbol).all()
    assert (batch.input_ids[is_task[:, 0], 0] >= first_symbol).all()  # the task's marker
    assert mixture.vocab_size == int(tokenizer.get_vocab_size())
    # A student learns from its teacher where there is something to predict.
    assert torch.equal(batch.teacher_mask, has_target)


def test_validation_has_the_shares_of_training(mixture):
    options = {"context_length": LENGTH, "num_tokens": 30 * LENGTH, "batch_size": 8}
    batches = list(mixture.validation_batches(**options))
    again = list(mixture.validation_batches(**options))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))
    counts = dict.fromkeys(mixture.component_names, 0)
    for batch in batches:
        (number,) = batch.component_numbers.unique().tolist()
        counts[mixture.component_names[number]] += len(batch)
    assert counts == {name: round(30 * share) for name, share in SHARES.items()}
    # All of a short text limits the tasks, too.
    large = list(mixture.validation_batches(**{**options, "num_tokens": 10**9}))
    assert sum(map(len, large)) == pytest.approx(mixture.num_validation_tokens / LENGTH, abs=3)


def test_prepared_once_and_found_again_also_elsewhere(settings, workspace, tmp_path):
    assert find_prepared(settings, workspace.tokens) is None
    expected = expected_tokens(settings, None)
    folder = prepare(settings, workspace)
    assert find_prepared(settings, workspace.tokens) == folder == prepare(settings, workspace)
    data = open_data(folder)
    assert data.vocab_size == expected.vocab_size == expected_tokens(settings, folder).vocab_size
    assert data.fingerprint == folder.name
    assert "70% files (300 documents" in data.describe()
    assert data.profile["phop_2_share"] == 0.2
    workspace.root.rename(tmp_path / "moved")
    moved = Workspace(tmp_path / "moved")
    assert find_prepared(settings, moved.tokens) == moved.tokens / folder.name
    verify_data(moved.tokens / folder.name, always=True)


class Reads(KeptProgress):
    """Counts the texts that are read, and raises like Ctrl-C before one is read too many."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.num_read = 0

    def advance(self, done: float, text: str = "", **more: Any) -> None:
        super().advance(done, text, **more)
        if text == "reading":
            if self.num_read == self.most:
                raise KeyboardInterrupt
            self.num_read += 1


def test_an_interrupted_preparation_resumes_with_the_text_that_it_was_at(text, workspace):
    settings = two_texts(text, {"files": 0.5, "hub": 0.25, "s5_4": 0.25})
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, workspace, Reads(1))
    progress = Reads(2)
    folder = prepare(settings, workspace, progress)
    assert progress.num_read == 1, "the first is there"
    assert not list(workspace.tokens.glob(f"{TEMPORARY_PREFIX}*"))
    assert prepare(settings, Workspace(workspace.root / "other")).name == folder.name
