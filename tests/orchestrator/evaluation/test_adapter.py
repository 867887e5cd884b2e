"""lm-eval's tasks on a decoder: numbers and answers equal those of lm-eval's own class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval_tasks import write_task

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from orchestrator.evaluation.adapter import (
    ChatModel,
    DecoderModel,
    answer_settings,
    check_answer_settings,
    run_task,
    suppress_output,
)
from orchestrator.evaluation.answers import AnswerSettings, Question, generate_answers
from orchestrator.evaluation.store import MeasuredTask
from orchestrator.evaluation.tasks import Suite, TaskSelection, load_suite
from orchestrator.models.tokenizer import Message, ModelTokenizer
from orchestrator.reporting.statistics import shared_metric
from orchestrator.settings.evaluation import Prompts
from orchestrator.workspace.errors import UserError

ROWS: dict[str, list[dict[str, Any]]] = {
    "lastword": [
        {"context": f"one two three {word} and {word} again", "word": word}
        for word in ("apple", "bear", "cab", "deed", "edge")
    ],
    "choices": [
        {"context": f"a {a} and a", "endings": [f"{a} {b}", f"{b} gone home", "end"], "label": 0}
        for a, b in (("bag", "fog"), ("hen", "pig"), ("log", "cat"), ("map", "pan"))
    ],
    "rolling": [{"text": "bead cafe deaf face feed " * n} for n in (1, 4, 9)],
}
QUESTIONS = ["a bag", "the hen had gone", "cab", "face the deaf pig", "x", "dad had a"]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    folder = tmp_path / "tasks"
    for name, rows in ROWS.items():
        write_task(folder, name, rows)
    return load_suite(TaskSelection(folders=(folder,)))


def run(
    suite: Suite, decoder: Decoder, tokenizer: Any, batch_size: int = 32, limit: int | None = None
) -> dict[str, MeasuredTask]:
    model = DecoderModel(decoder, tokenizer, batch_size)
    return {name: run_task(name, task, model, limit) for name, task in suite.tasks.items()}


def scores_of_sample(sample: dict[str, Any]) -> list[float]:
    first = [responses[0] for responses in sample["resps"]]
    return [r[0] if isinstance(r, tuple) else r for r in first]


def scores_of(task: MeasuredTask) -> list[list[float]]:
    """Return the log-likelihoods by item."""
    return [scores_of_sample(sample) for sample in task.samples]


def test_numbers_and_answers_equal_those_of_lm_evals_hugging_face_class(
    suite: Suite,
    decoder: Decoder,
    tokenizer: ModelTokenizer,
    tiny_tokens: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from lm_eval import evaluator
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.models.huggingface import HFLM

    from iiet.exporting import fast_tokenizer, transformers_model

    tasks = suite.tasks | questions(tmp_path / "asked", decoder, tokenizer).tasks
    ours = {n: run_task(n, t, DecoderModel(decoder, tokenizer)) for n, t in tasks.items()}
    assert capfd.readouterr() == ("", "")
    model = transformers_model(decoder)
    text = fast_tokenizer(
        tiny_tokens / "tokenizer.json", end_of_text="<|endoftext|>", context_length=48
    )
    with suppress_output():
        theirs = evaluator.evaluate(
            lm=HFLM(
                pretrained=model, tokenizer=text, max_length=48, batch_size=1, logits_cache=False
            ),
            task_dict={"tasks": tasks},
            bootstrap_iters=0,
        )
    for name, task in ours.items():
        for metric, value in task.result.metrics.items():
            if not metric.endswith("_stderr"):
                assert theirs["results"][name][f"{metric},none"] == pytest.approx(value, rel=1e-5)
        samples = theirs["samples"][name]
        if name == "questions":
            assert answers_of(task) == [sample["resps"][0] for sample in samples]
            continue
        for scores, sample in zip(scores_of(task), samples, strict=True):
            assert scores == pytest.approx(scores_of_sample(sample), abs=1e-4), name
    result = ours["choices"].result
    for metric in ("acc", "acc_norm"):
        error = mean_stderr(result.values[metric])
        assert result.metrics[f"{metric}_stderr"] == pytest.approx(error)
    assert ours["lastword"].result.version == "2.0"
    assert [task.result.num_items for task in ours.values()] == [4, 5, 3, 6]
    limited = run(suite, decoder, tokenizer, limit=2)
    assert [task.result.num_items for task in limited.values()] == [2, 2, 2]


def test_prompts_have_their_examples_and_lose_their_beginning_with_a_note(
    decoder: Decoder, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    folder = write_task(tmp_path, "lastword", ROWS["lastword"], fewshot_split="test")
    wide = Decoder(ModelConfig.from_dict({**decoder.config.to_dict(), "context_length": 512}))
    plain, shown = (
        run(load_suite(TaskSelection(folders=(folder,), num_fewshot=n)), wide, tokenizer)[
            "lastword"
        ]
        for n in (0, 2)
    )
    assert (plain.result.num_fewshot, shown.result.num_fewshot) == (0, 2)
    assert scores_of(plain) != scores_of(shown)
    narrow = Decoder(ModelConfig.from_dict({**decoder.config.to_dict(), "context_length": 8}))
    model = DecoderModel(narrow, tokenizer)
    for name, task in load_suite(TaskSelection(folders=(folder,))).tasks.items():
        run_task(name, task, model)
    assert model.num_cut == 5


# Generated answers


def questions(folder: Path, decoder: Decoder, tokenizer: ModelTokenizer, **changes: Any) -> Suite:
    """Return a task of questions; the decoder's own answer is right for every second one."""
    settings = AnswerSettings(max_new_tokens=6, stop=("\n",))
    asked = [Question(tokenizer.encode(q, add_special_tokens=False), settings) for q in QUESTIONS]
    answers = generate_answers(decoder, tokenizer, asked)
    rows = [
        {"question": question, "answer": answer if number % 2 else answer + "!"}
        for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]
    write_task(folder, "questions", rows, **changes)
    return load_suite(TaskSelection(folders=(folder,)))


def answers_of(task: MeasuredTask) -> list[list[str]]:
    return [[text for texts in sample["resps"] for text in texts] for sample in task.samples]


def test_answers_are_compared_under_each_filter(
    decoder: Decoder, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    plain = questions(tmp_path / "plain", decoder, tokenizer)
    results = [run(plain, decoder, tokenizer, size)["questions"].result for size in (1, 4)]
    assert results[0] == results[1]
    assert results[0].metrics["exact_match"] == 0.5
    assert results[0].metrics["exact_match_stderr"] == pytest.approx((0.25 / 5) ** 0.5)
    assert results[0].values["exact_match"] == [0.0, 1.0] * 3

    task = plain.tasks["questions"]
    right = task.doc_to_target(task.eval_docs[0]).rstrip("!")
    filters = [
        {"name": "strict-match", "filter": [{"function": "take_first"}]},
        {
            "name": "flexible-extract",
            "filter": [
                {"function": "map", "mapping_dict": {right: right + "!"}, "default_value": "?"},
                {"function": "take_first"},
            ],
        },
    ]
    filtered = questions(tmp_path / "filters", decoder, tokenizer, filter_list=filters)
    result = run(filtered, decoder, tokenizer)["questions"].result
    assert result.metrics["exact_match:strict-match"] == 0.5
    assert result.metrics["exact_match:strict-match_stderr"] == pytest.approx((0.25 / 5) ** 0.5)
    assert result.values["exact_match:flexible-extract"][0] == 1.0
    assert result.num_items == len(QUESTIONS)
    assert result.accuracy_metric == shared_metric([result] * 2) == "exact_match:strict-match"

    bleu = {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}
    texts = questions(tmp_path / "texts", decoder, tokenizer, metric_list=[bleu])
    result = run(texts, decoder, tokenizer)["questions"].result
    assert (result.metrics.keys(), result.values) == ({"bleu"}, {})


def test_repetitions_are_sampled_apart_and_again_alike(
    decoder: Decoder, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    sampled = {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    suite = questions(tmp_path, decoder, tokenizer, generation_kwargs=sampled, repeats=3)
    first, second = (
        answers_of(run(suite, decoder, tokenizer, size)["questions"]) for size in (2, 32)
    )
    assert first == second
    assert [len(texts) for texts in first] == [3] * len(QUESTIONS)
    assert any(len(set(texts)) > 1 for texts in first)


def test_settings_of_a_task_become_those_of_the_generator(
    decoder: Decoder, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    greedy = answer_settings({"until": ["\n", "Q:"], "do_sample": False, "temperature": 0.8}, 1024)
    assert greedy == AnswerSettings(stop=("\n", "Q:"), max_new_tokens=256)
    assert answer_settings({"until": "."}, 100) == AnswerSettings(stop=(".",), max_new_tokens=50)
    sampled = answer_settings({"until": [], "max_gen_toks": 7, "do_sample": True, "top_p": 0.9}, 64)
    assert sampled == AnswerSettings(max_new_tokens=7, temperature=1.0, top_p=0.9)
    assert answer_settings({"temperature": 0.5, "top_k": 3, "num_beams": 1}, 64).temperature == 0.5
    for options, words in (
        ({"num_beams": 4}, r"num_beams=4; supported are until, max_gen_toks"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"max_gen_toks": 64}, r"up to 64 tokens \(max_gen_toks\), and the model's context holds"),
    ):
        with pytest.raises(UserError, match=words):
            answer_settings(options, 64)
    suite = questions(tmp_path, decoder, tokenizer, generation_kwargs={"num_beams": 4})
    with pytest.raises(UserError, match=r"questions: its generation_kwargs ask for num_beams=4"):
        check_answer_settings(suite.tasks, 64)


# Chat templates


def test_a_description_that_the_template_refuses_is_left_out() -> None:
    def chat(messages: Sequence[Message], *, opens_answer: bool, template: str | None) -> str:
        if messages[0]["role"] == "system":
            raise UserError("the system role is not supported")
        text = "/".join(message["content"] for message in messages)
        return f"{template}: {text}{' ->' if opens_answer else ''}"

    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]
    model = ChatModel()
    model.text = SimpleNamespace(chat=chat)  # type: ignore[assignment]
    model.prompts = Prompts(chat_template="short")
    assert model.apply_chat_template(messages) == "short: 1 + 1 ->"
    assert model.apply_chat_template(messages, add_generation_prompt=False) == "short: 1 + 1"
    # An instruction of the user is never left out.
    model.prompts = Prompts(chat_template="short", system_instruction="Add.")
    with pytest.raises(UserError, match="the system role is not supported"):
        model.apply_chat_template(messages)
