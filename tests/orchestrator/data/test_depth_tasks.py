"""Answers equal those of an independent solver, and nothing but the steps gives them away."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from orchestrator.data.depth.chains import PointerChains
from orchestrator.data.depth.induction import PHopInduction
from orchestrator.data.depth.permutation_words import PermutationWords
from orchestrator.data.depth.task import NO_ANSWER, DepthTask
from orchestrator.data.keyed_random import random_bits
from orchestrator.workspace.errors import UserError

NUM = 400


def texts(
    task: DepthTask, num: int = NUM, key: int = 1
) -> list[tuple[list[str], list[str | None]]]:
    """Return sequences and answers as texts."""
    symbols, answers = task.generate(random_bits(key, np.arange(num), task.num_random))
    assert symbols.shape == answers.shape == (num, task.length)
    known = dict(enumerate(task.symbols)) | {NO_ANSWER: None}
    return [
        ([str(known[s]) for s in row], [known[a] for a in answer])
        for row, answer in zip(symbols.tolist(), answers.tolist(), strict=True)
    ]


def hop(sequence: list[str], place: int) -> int | None:
    """Search backwards for the same symbol; return the position after it."""
    for earlier in reversed(range(place)):
        if sequence[earlier] == sequence[place]:
            return earlier + 1
    return None


@pytest.mark.parametrize(("depth", "num_symbols"), [(1, 2), (1, 4), (3, 4), (6, 4), (6, 7)])
def test_hops_are_those_of_a_search(depth: int, num_symbols: int) -> None:
    for sequence, answers in texts(PHopInduction(depth, num_symbols=num_symbols, length=48), 50):
        for start, answer in enumerate(answers):
            place: int | None = start
            for _ in range(depth):
                place = None if place is None else hop(sequence, place)
            assert answer == (None if place is None else sequence[place])


@pytest.mark.parametrize(("depth", "num_chains"), [(1, 2), (2, 2), (4, 3), (8, 2)])
def test_chains_are_followed_pointer_by_pointer(depth: int, num_chains: int) -> None:
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
        steps, back = 0, place
        while back != question:
            back, steps = pointers[back], steps + 1
        assert steps == depth


@pytest.mark.parametrize("depth", [1, 2, 5, 16])
def test_products_are_those_of_moving_things(depth: int) -> None:
    for word, answers in texts(PermutationWords(depth), 60):
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
        PermutationWords(3),
    ],
    ids=lambda task: task.name,
)
def test_chance_is_the_accuracy_of_the_best_guess(task: DepthTask) -> None:
    bits = random_bits(5, np.arange(20_000), task.num_random)
    symbols, answers = task.generate(bits)
    places = task.asked_positions(answers, random_bits(6, np.arange(20_000), 1)[:, 0])
    asked = places != NO_ANSWER
    right = answers[asked, places[asked]]
    shares = np.bincount(right, minlength=len(task.symbols)) / len(right)
    if task.kind == "chain":  # The question itself is never the answer.
        assert (right != symbols[asked, places[asked]]).all()
        assert shares.max() == pytest.approx(1 / len(task.symbols), abs=0.02)
        assert task.chance == 1 / (len(task.symbols) - 1)
    else:
        assert shares.max() == pytest.approx(task.chance, abs=0.02)


def test_induction_asks_where_there_is_an_answer() -> None:
    task = PHopInduction(3, num_symbols=4, length=24)
    _, answers = task.generate(random_bits(7, np.arange(NUM), task.num_random))
    places = task.asked_positions(answers, random_bits(8, np.arange(NUM), 1)[:, 0])
    for row, place in zip(answers, places, strict=True):
        assert (row == NO_ANSWER).all() if place == NO_ANSWER else row[place] != NO_ANSWER
    assert len(set(places.tolist())) > 10


def test_deeper_tasks_leave_more_positions_without_an_answer() -> None:
    shares = []
    for depth in (1, 3, 6):
        _, answers = PHopInduction(depth, num_symbols=4, length=64).generate(
            random_bits(9, np.arange(NUM), 64)
        )
        shares.append((answers != NO_ANSWER).mean())
    assert all(more > fewer for more, fewer in pairwise(shares))
    assert shares[-1] > 0.5


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: PHopInduction(6, num_symbols=4, length=20), "length=20 is too short for phop_6"),
        (lambda: PointerChains(10**6, num_chains=2), "more than 100,000"),
        (lambda: PermutationWords(10**6), "more than 100,000"),
    ],
)
def test_sequences_that_cannot_hold_a_task_are_errors(make: object, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make()  # type: ignore[operator]
