"""Depth data come from seed and position; answers equal those of an independent solver."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_texts import save_word_tokenizer

from iiet.model.batch import NO_TARGET
from orchestrator.data.depth import DepthStore
from orchestrator.data.depth_tasks import (
    NO_ANSWER,
    NUMBER_WORDS,
    WORDS,
    DepthTask,
    IteratedLookup,
    PermutationWords,
    PHopInduction,
    PointerChains,
)
from orchestrator.data.mixture import open_data
from orchestrator.data.order import random_bits
from orchestrator.data.preparation import expected_tokens, find_prepared, prepare
from orchestrator.models.tokenizer import load_tokenizer, train_tokenizer
from orchestrator.settings import DataSettings, resolve_settings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace


def texts(task: DepthTask, num: int = 400) -> list[tuple[list[str], list[str | None]]]:
    """Return sequences and answers as texts."""
    symbols, answers = task.generate(random_bits(1, np.arange(num), task.num_random))
    assert symbols.shape == answers.shape == (num, task.length)
    known = dict(enumerate(task.symbols)) | {NO_ANSWER: None}
    return [
        ([str(known[s]) for s in row], [known[a] for a in answer])
        for row, answer in zip(symbols.tolist(), answers.tolist(), strict=True)
    ]


def hop(sequence: list[str], place: int | None) -> int | None:
    """Search backwards for the same symbol; return the position after it."""
    for earlier in reversed(range(place or 0)):
        if sequence[earlier] == sequence[place or 0]:
            return earlier + 1
    return None


@pytest.mark.parametrize(("depth", "num_symbols"), [(1, 2), (3, 4), (6, 7)])
def test_hops_are_those_of_a_search(depth, num_symbols):
    for sequence, answers in texts(PHopInduction(depth, num_symbols=num_symbols, length=48), 50):
        for start, answer in enumerate(answers):
            place: int | None = start
            for _ in range(depth):
                place = hop(sequence, place)
            assert answer == (None if place is None else sequence[place])


@pytest.mark.parametrize(("depth", "num_chains"), [(1, 2), (4, 3), (8, 2)])
def test_chains_are_followed_pointer_by_pointer(depth, num_chains):
    task = PointerChains(depth, num_chains=num_chains)
    for sequence, answers in texts(task):
        *listed, question = sequence
        pointers = dict(zip(listed[::2], listed[1::2], strict=True))
        place = question
        for _ in range(depth):
            place = pointers[place]
        assert answers == [None] * (task.length - 1) + [place]
        # Neither counts nor ends are clues: each symbol stands once on each side of a pair.
        assert set(Counter(listed[::2]).values()) == {1}
        assert sorted(pointers) == sorted(pointers.values())
        # The way back is no shorter.
        steps = 0
        back = place
        while back != question:
            back = pointers[back]
            steps = steps + 1
        assert steps == depth


@pytest.mark.parametrize("in_words", [False, True])
def test_lookups_are_followed_entry_by_entry(in_words):
    task = IteratedLookup(4, num_symbols=9, in_words=in_words)
    numbers = Counter[int]()
    for sequence, answers in texts(task, 800):
        *listed, steps, question = sequence
        table = dict(zip(listed[::2], listed[1::2], strict=True))
        num_steps = NUMBER_WORDS.index(steps.strip()) + 1 if in_words else int(steps[2])
        place = question
        for _ in range(num_steps):
            place = table[place]
        assert answers == [None] * (task.length - 1) + [place]
        assert place in task.choices
        assert sorted(table) == sorted(table.values()) == sorted(task.choices)
        back = 0
        while place != question:
            place = table[place]
            back = back + 1
        assert back == 9 - num_steps, "one way leads through the whole table"
        numbers[num_steps] += 1
    assert set(numbers) == {1, 2, 3, 4}
    assert min(numbers.values()) > 140


def test_products_are_those_of_moving_things():
    for word, answers in texts(PermutationWords(16), 60):
        things = [1, 2, 3, 4, 5]
        for permutation, answer in zip(word, answers, strict=True):
            images = permutation.strip("<|>")
            things = [int(images[thing - 1]) for thing in things]
            assert answer == f"<|{''.join(map(str, things))}|>"


@pytest.mark.parametrize(
    "task",
    [
        PHopInduction(4, num_symbols=4, length=64),
        PointerChains(2, num_chains=2),
        IteratedLookup(3, num_symbols=8),
        PermutationWords(3),
    ],
    ids=lambda task: task.name,
)
def test_chance_is_the_accuracy_of_the_best_guess_where_a_test_asks(task):
    symbols, answers = task.generate(random_bits(5, np.arange(20_000), task.num_random))
    places = task.asked_positions(answers, random_bits(6, np.arange(20_000), 1)[:, 0])
    has_answer = places != NO_ANSWER
    assert (answers[~has_answer] == NO_ANSWER).all()
    right = answers[has_answer, places[has_answer]]
    assert (right != NO_ANSWER).all()
    best = (np.bincount(right, minlength=len(task.symbols)) / len(right)).max()
    if task.kind in ("chain", "lookup"):  # The question itself is never the answer.
        assert (right != symbols[has_answer, places[has_answer]]).all()
        assert best == pytest.approx(1 / len(task.choices), abs=0.02)
        assert task.chance == 1 / (len(task.choices) - 1)
    else:
        assert best == pytest.approx(task.chance, abs=0.02)
    if task.kind == "phop":
        assert len(set(places[has_answer].tolist())) > 40


# Prepared data


def data_settings(*tasks: str, **changes: int) -> DataSettings:
    options = {f"data.depth.{name}": value for name, value in changes.items()}
    return resolve_settings(
        {}, options={"data.source": "depth", "data.depth.tasks": tasks, **options}
    ).data


def depth_store(folder: Path, *tasks: str, **changes: int) -> DepthStore:
    data = open_data(prepare(data_settings(*tasks, **changes), Workspace(folder)))
    assert isinstance(data, DepthStore)
    return data


def test_sequences_depend_on_seed_and_position_alone(tmp_path):
    data = depth_store(tmp_path, "phop_3", "chain_2", "s5_6", length=16)
    several = data.sequences(np.arange(40), context_length=20, seed=3)
    for place in (0, 7, 39):
        single = data.sequences(np.array([place]), context_length=20, seed=3)
        assert torch.equal(single.input_ids[0], several.input_ids[place])
        assert torch.equal(single.targets[0], several.targets[place])
    other_seed = data.sequences(np.arange(40), context_length=20, seed=4)
    assert not torch.equal(other_seed.input_ids, several.input_ids)
    (held_out,) = data.validation_batches(context_length=20, num_tokens=800, batch_size=64)
    rows = {tuple(row.tolist()) for row in several.input_ids}
    assert len(held_out) == 40
    assert not rows & {tuple(row.tolist()) for row in held_out.input_ids}


def test_targets_are_answers_and_padding_has_none(tmp_path):
    data = depth_store(tmp_path, "s5_4")
    batch = data.sequences(np.arange(8), context_length=10, seed=0)
    assert (batch.targets[:, :4] != NO_TARGET).all()
    assert torch.equal(batch.targets[:, 0], batch.input_ids[:, 0])  # a product of one factor
    assert (batch.targets[:, 4:] == NO_TARGET).all()
    assert (batch.input_ids[:, 4:] == data.manifest.end_of_text_id).all()
    assert batch.num_targets == batch.num_positions == 32


def test_each_of_several_tasks_begins_with_its_name(tmp_path):
    data = depth_store(tmp_path, "phop_2", "s5_4", length=16)
    tokenizer = load_tokenizer(data.tokenizer_path)
    batch = data.sequences(np.arange(1000), context_length=17, seed=0)
    first = [tokenizer.id_to_token(number) for number in batch.input_ids[:, 0].tolist()]
    assert first.count("<|phop_2|>") == first.count("<|s5_4|>") == 500
    assert data.describe().endswith("sequences of 17 tokens")
    for task in data.tasks:
        items = list(data.items(task, 300))
        assert len(items) == 300
        assert items[:10] == list(data.items(task, 10))
        for item in items[:20]:
            ids = tokenizer.encode(item.context, add_special_tokens=False).ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == item.context
            assert tokenizer.id_to_token(ids[0]) == f"<|{task.name}|>"
            assert len(ids) <= task.length + 1
            assert item.answer in task.symbols


def test_items_go_on_after_sequences_without_an_answer(tmp_path):
    # One sequence in 416 has no symbol twice.
    data = depth_store(tmp_path, "phop_1", num_symbols=8, length=8)
    (task,) = data.tasks
    items = list(data.items(task, 2000))
    assert len(items) == 2000
    runs = {tuple(items[first : first + 5]) for first in range(len(items) - 4)}
    assert len(runs) == len(items) - 4, "sequences come again"


@pytest.fixture
def words_file(tmp_path) -> Path:
    return save_word_tokenizer(tmp_path)


def word_settings(file: Path, **changes: object) -> DataSettings:
    depth = {"tasks": ["lookup_3"], "symbols": "words", "num_symbols": 8}
    tree = {"source": "depth", "tokenizer": str(file), "depth": {**depth, **changes}}
    return resolve_settings({"data": tree}).data


def test_words_are_tokens_of_the_texts_tokenizer_and_the_answer_alone_is_a_target(
    tmp_path, words_file
):
    settings = word_settings(words_file)
    workspace = Workspace(tmp_path / "words")
    folder = prepare(settings, workspace)
    data = open_data(folder)
    assert find_prepared(settings, workspace.tokens) == folder
    tokenizer = load_tokenizer(words_file)
    assert data.vocab_size == len(tokenizer.get_vocab(with_added_tokens=True))
    (task,) = data.tasks
    batch = data.sequences(np.arange(50), context_length=20, seed=1)
    end = task.length
    assert (batch.targets[:, : end - 1] == NO_TARGET).all()
    assert (batch.targets[:, end:] == NO_TARGET).all()
    for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        text = tokenizer.decode(ids[:end])
        # The text that a person reads has these tokens, and no others.
        assert tokenizer.encode(text).ids == ids[:end]
        assert text.split()[-2] in NUMBER_WORDS[:3]
        assert tokenizer.id_to_token(targets[end - 1])[1:] in WORDS[:8]
    letters = depth_store(tmp_path / "letters", "lookup_3", num_symbols=8)
    same = letters.sequences(np.arange(50), context_length=20, seed=1)
    first_letters = [
        letters.tasks[0].symbols.index(_letter(letters, n)) for n in same.input_ids[:, 0]
    ]
    first_words = [
        WORDS.index(tokenizer.id_to_token(n)[1:]) for n in batch.input_ids[:, 0].tolist()
    ]
    assert first_letters == first_words, "the law of the sequences does not depend on the symbols"


def _letter(data: DepthStore, number: torch.Tensor) -> str:
    return str(load_tokenizer(data.tokenizer_path).id_to_token(int(number)))


def test_letters_have_the_keys_that_they_had_before_there_were_words():
    assert "symbols" not in data_settings("phop_3").read_by_source()["depth"]
    changed = data_settings("phop_3").depth.model_copy(update={"symbols": "words"})
    assert changed.to_key()["symbols"] == "words"


def test_words_that_cannot_be_are_errors(tmp_path, words_file):
    plain = tmp_path / "plain.json"
    train_tokenizer(["a few texts without these"], 258).save(str(plain))
    for file, changes, reason in (
        (plain, {}, r"data\.depth\.symbols=words: for data\.tokenizer=.*plain\.json"),
        (words_file, {"num_symbols": 33}, r"data\.depth\.symbols=words: the task has 33 symbols"),
        (
            words_file,
            {"num_symbols": 5},
            r"data\.depth\.num_symbols=5: lookup_3 needs .* 6 entries",
        ),
        (words_file, {"tasks": ["s5_4"]}, r"data\.depth\.symbols=words: .* permutations"),
        (words_file, {"tasks": ["lookup_3", "phop_2"]}, r"data\.depth\.symbols=words: .* 2 depth"),
        (Path("train"), {}, r"data\.depth\.symbols=words: .* set data\.tokenizer"),
    ):
        settings = word_settings(file, **changes)
        with pytest.raises(UserError, match=reason):
            prepare(settings, Workspace(tmp_path / "refused"))
    with pytest.raises(UserError, match=r"set data\.tokenizer"):
        expected_tokens(word_settings(Path("train")), None)


MISTAKES: list[tuple[tuple[str, ...], dict[str, int], str]] = [
    (("phop_0",), {}, "phop_0 has depth 0"),
    (("phop_3",), {"num_symbols": 1}, "data.depth.num_symbols"),
    ((), {}, r"data\.depth\.tasks is empty"),
    (("phop_20",), {}, "length=64 is too short for phop_20"),
    (("chain_1000000",), {}, "more than 100,000"),
    (("phop_6",), {}, r"64 tokens, and 32 are read at once; raise model\.context_length"),
]


def test_tasks_that_cannot_be_are_errors(tmp_path):
    for tasks, changes, reason in MISTAKES:
        with pytest.raises(UserError, match=reason):
            depth_store(tmp_path, *tasks, **changes).check_length(32)
