"""Short questions: each has the answer that an independent solver finds, and is marked by it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from lm_eval.api.model import LM

from orchestrator.evaluation.lm_eval_model import run_task
from orchestrator.evaluation.short_answers import ITEMS_PER_KIND, KINDS, short_questions
from orchestrator.evaluation.tasks import check_task_names, load_suite, unaveraged_tasks
from orchestrator.records.evaluation import Suite, TaskResult
from orchestrator.settings import EvaluationSettings
from orchestrator.settings.evaluation import SHORT_ANSWERS, Prompts


def solved(prompt: str) -> str:
    """Answer the last question of a prompt by rules of its own."""
    question = prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:")
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    if "reverse" in question:
        words = question.partition(": ")[2].removesuffix(".").split(", ")
        return ", ".join(reversed(words))
    if "largest" in question:
        return str(sorted(numbers)[-1])
    if "away" in question:
        had, more, fewer = numbers
        return str(had + more - fewer)
    if "+" in question:
        return str(sum(numbers))
    asked = re.findall(r"Where does (\w+) live", question)[0]
    [other] = re.findall(rf"{asked} lives where (\w+) lives", question)
    [home] = re.findall(rf"{other} lives in (\w+)", question)
    return str(home)


class Writer(LM):
    """Writes what a function of the context returns."""

    prompts = Prompts()

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.answer = answer

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise AssertionError("nothing is chosen")

    loglikelihood_rolling = loglikelihood


def marked(answer: Callable[[str], str]) -> TaskResult:
    task = load_suite(Suite(tasks=(SHORT_ANSWERS,))).tasks[SHORT_ANSWERS]
    writer: Any = Writer(answer)
    return run_task(SHORT_ANSWERS, task, writer).result


def test_questions_differ_and_repeating_an_answer_of_the_prompt_is_mostly_wrong():
    items = short_questions()
    assert items == short_questions()
    assert len({item["text"] for item in items}) == len(items) == len(KINDS) * ITEMS_PER_KIND
    # The examples of a kind are the same in all of its items.
    examples = [item["text"].rpartition("Question: ")[0] for item in items]
    assert len(set(examples[: len(KINDS)])) == len(KINDS), "a limit leaves all kinds"
    most_frequent = Counter(item["answer"] for item in items).most_common(1)[0][1]
    assert most_frequent < 0.1 * len(items)


def test_right_answers_are_marked_right_up_to_spaces_case_and_punctuation():
    for write in (solved, lambda prompt: f" {solved(prompt).upper()}."):
        result = marked(write)
        assert result.metrics["exact_match"] == 1.0
        assert result.accuracy_metric == "exact_match"
    for wrong in ("", "7"):
        assert marked(lambda prompt, text=wrong: text).metrics["exact_match"] < 0.05
    assert marked(lambda prompt: f"{solved(prompt)} or so").metrics["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("suite", "beside"), [("heldout", (SHORT_ANSWERS,)), (f"heldout,{SHORT_ANSWERS}", ())]
)
def test_retention_may_name_it_beside_the_suite(suite, beside):
    settings = EvaluationSettings(suite=suite, retention={SHORT_ANSWERS: 5.0})
    check_task_names(settings)
    assert unaveraged_tasks(settings) == beside
