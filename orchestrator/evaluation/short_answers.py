"""A built-in task of generated answers to short questions, which a program marks.

After a model became cheaper, multiple choice and bits per byte may recover although generated text
does not. So this task lets a model read three solved questions of a kind and write the answer to a
fourth one. Questions are drawn with a fixed seed: all models get the same ones, without a download.
An answer is right if it equals the expected one, up to case, spaces and punctuation.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from orchestrator.evaluation.heldout import item_set
from orchestrator.settings.evaluation import SHORT_ANSWERS

VERSION = 1
"""Increase it if the questions change."""
ITEMS_PER_KIND = 40
NUM_EXAMPLES = 3
"""Solved questions before each one."""
MAX_ANSWER_TOKENS = 24
"""Most tokens of an answer: enough for three words in a small vocabulary."""
_SEED = 1

_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Helen", "Jack", "Mary", "Tom")
_PLACES = ("Berlin", "Chicago", "London", "Madrid", "Moscow", "Paris", "Rome", "Tokyo")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "stones", "toys")
_WORDS = ("bird", "boat", "door", "fish", "green", "house", "milk", "moon", "red", "salt", "tree")

Question = tuple[str, str]
"""A question and its answer."""


def _sum(draw: random.Random) -> Question:
    first = draw.randrange(10, 60)
    second = draw.randrange(10, 40)
    return f"What is {first} + {second}?", str(first + second)


def _story(draw: random.Random) -> Question:
    name = draw.choice(_NAMES)
    things = draw.choice(_THINGS)
    first = draw.randrange(3, 10)
    more = draw.randrange(2, 10)
    fewer = draw.randrange(1, first)
    text = f"{name} has {first} {things}, gets {more} more and gives {fewer} away."
    return f"{text} How many {things} does {name} have now?", str(first + more - fewer)


def _largest(draw: random.Random) -> Question:
    numbers = draw.sample(range(10, 100), 3)
    first, second, third = numbers
    return f"Which is the largest number: {first}, {second} or {third}?", str(max(numbers))


def _home(draw: random.Random) -> Question:
    asked, first, second = draw.sample(_NAMES, 3)
    home, other = draw.sample(_PLACES, 2)
    facts = [
        f"{asked} lives where {first} lives.",
        f"{first} lives in {home}.",
        f"{second} lives in {other}.",
    ]
    draw.shuffle(facts)
    return f"{' '.join(facts)} Where does {asked} live?", home


def _reversed(draw: random.Random) -> Question:
    words = draw.sample(_WORDS, 3)
    return f"Write these words in reverse order: {', '.join(words)}.", ", ".join(words[::-1])


KINDS: tuple[Callable[[random.Random], Question], ...] = (
    _sum, _story, _largest, _home, _reversed,
)  # fmt: skip


def short_questions() -> list[dict[str, str]]:
    """Return the items: the text that a model reads, and the expected answer.

    Kinds alternate, so that any number of first items has all kinds equally often.
    """
    draw = random.Random(_SEED)
    items_of_kinds = []
    for kind in KINDS:
        # Repeated questions are drawn again.
        questions: dict[str, str] = {}
        while len(questions) < NUM_EXAMPLES + ITEMS_PER_KIND:
            question, answer = kind(draw)
            questions[question] = answer
        pairs = list(questions.items())
        examples = "".join(
            f"Question: {question}\nAnswer: {answer}\n\n"
            for question, answer in pairs[:NUM_EXAMPLES]
        )
        items_of_kinds.append(
            [
                {"text": f"{examples}Question: {question}\nAnswer:", "answer": answer}
                for question, answer in pairs[NUM_EXAMPLES:]
            ]
        )
    return [item for turn in zip(*items_of_kinds, strict=True) for item in turn]


def short_answers_config() -> dict[str, Any]:
    """Return the lm-eval configuration of the task."""
    spaces = {
        "name": "none",
        "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
    }
    return {
        "task": SHORT_ANSWERS,
        "custom_dataset": partial(item_set, short_questions()),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 0,  # The examples are part of each item.
        "generation_kwargs": {
            "until": ["\n"],
            "max_gen_toks": MAX_ANSWER_TOKENS,
            "do_sample": False,
        },
        "filter_list": [spaces],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
            }
        ],
        "metadata": {"version": VERSION},
    }
