"""Tasks of lm-eval whose answers are generated, with filters, repetitions and a decoder's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from iiet.decoder import Decoder
from orchestrator.data.store import open_tokens
from orchestrator.evaluation.answers import AnswerSettings, Question, generate_answers
from orchestrator.evaluation.harness import load_suite, run_suite
from orchestrator.models.model_tokenizer import PlainTokenizer
from orchestrator.reporting.statistics import shared_metric
from orchestrator.workspace.errors import UserError

QUESTIONS = ["a bag", "the hen had gone", "cab", "face the deaf pig", "x", "dad had a"]
READER = """\
import datasets, json, pathlib

def read(**settings):
    lines = pathlib.Path(__file__).with_name("questions.jsonl").read_text().splitlines()
    rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    return {"test": rows, "train": rows.select(range(2))}
"""


def write_task(folder: Path, rows: list[dict[str, str]], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {
        "task": "questions",
        "test_split": "test",
        "fewshot_split": "train",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
        **changes,
    }
    text = "custom_dataset: !function reader.read\n" + yaml.safe_dump(config)
    (folder / "questions.yaml").write_text(text)
    (folder / "reader.py").write_text(READER)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def rows(decoder: Decoder, tokenizer: PlainTokenizer) -> list[dict[str, str]]:
    """Questions; the decoder's own answer is right for every second one."""
    settings = AnswerSettings(max_new_tokens=6, stop=("\n",))
    asked = [Question(tokenizer.encode(q, add_special_tokens=False), settings) for q in QUESTIONS]
    answers = generate_answers(decoder, tokenizer, asked)
    return [
        {"question": question, "answer": answer if number % 2 else answer + "!"}
        for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]


def test_answers_are_compared_and_stored(
    decoder: Decoder, tokenizer: PlainTokenizer, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    folder = write_task(tmp_path / "tasks", rows)
    results = [
        run_suite(load_suite(folders=[folder]), decoder, tokenizer, batch_size=size)
        for size in (1, 4)
    ]
    assert results[0] == results[1]
    result = results[0].results["questions"]
    assert result.metrics["exact_match"] == 0.5
    assert result.metrics["exact_match_stderr"] == pytest.approx((0.25 / 5) ** 0.5)
    assert result.values["exact_match"] == [0.0, 1.0] * 3
    assert [text for (text,) in result.answers] == [row["answer"].rstrip("!") for row in rows]
    assert result.log_likelihoods == []
    assert results[0].accuracy == 0.5
    assert load_suite(folders=[folder]).has_accuracy


def test_each_filter_is_a_metric_and_the_first_is_the_accuracy(
    decoder: Decoder, tokenizer: PlainTokenizer, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    right = rows[0]["answer"].rstrip("!")
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
    folder = write_task(tmp_path / "tasks", rows, filter_list=filters)
    evaluation = run_suite(load_suite(folders=[folder]), decoder, tokenizer)
    result = evaluation.results["questions"]
    assert result.metrics["exact_match:strict-match"] == 0.5
    assert result.values["exact_match:flexible-extract"][0] == 1.0
    assert result.num_items == len(rows)
    assert result.accuracy_metric == "exact_match:strict-match"
    assert evaluation.quality()["accuracy_stderr"] == pytest.approx((0.25 / 5) ** 0.5)
    assert shared_metric([result, result]) == "exact_match:strict-match"


def test_repetitions_are_sampled_apart_and_again_alike(
    decoder: Decoder, tokenizer: PlainTokenizer, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    sampled = {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    folder = write_task(tmp_path / "tasks", rows, generation_kwargs=sampled, repeats=3)
    first, second = (
        run_suite(load_suite(folders=[folder]), decoder, tokenizer, batch_size=size)
        for size in (2, 32)
    )
    answers = first.results["questions"].answers
    assert answers == second.results["questions"].answers
    assert [len(texts) for texts in answers] == [3] * len(rows)
    assert any(len(set(texts)) > 1 for texts in answers)


def test_a_metric_over_texts_has_a_value_and_no_items(
    decoder: Decoder, tokenizer: PlainTokenizer, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    bleu = {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}
    folder = write_task(tmp_path / "tasks", rows, metric_list=[bleu])
    result = run_suite(load_suite(folders=[folder]), decoder, tokenizer).results["questions"]
    assert result.metrics.keys() == {"bleu"}
    assert result.values == {}
    assert result.accuracy_metric is None


def test_what_the_generator_lacks_is_said_before_a_task_runs(
    decoder: Decoder, tokenizer: PlainTokenizer, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    folder = write_task(tmp_path / "tasks", rows, generation_kwargs={"num_beams": 4})
    with pytest.raises(UserError, match=r"questions: its generation_kwargs ask for num_beams=4"):
        run_suite(load_suite(folders=[folder]), decoder, tokenizer)


@pytest.mark.slow
def test_answers_equal_those_of_lm_evals_hugging_face_class(
    decoder: Decoder,
    tokenizer: PlainTokenizer,
    rows: list[dict[str, str]],
    tiny_tokens: Path,
    tmp_path: Path,
) -> None:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    from iiet.exporting import fast_tokenizer, transformers_model
    from orchestrator.evaluation.harness.suppressed_output import suppress_output

    folder = write_task(tmp_path / "tasks", rows)
    loaded = load_suite(folders=[folder], num_fewshot=1)
    ours = run_suite(loaded, decoder, tokenizer).results["questions"]
    path = open_tokens(tiny_tokens).tokenizer_path
    loaded.tasks["questions"].set_fewshot_seed(1234)
    with suppress_output():
        theirs = evaluator.evaluate(
            lm=HFLM(
                pretrained=transformers_model(decoder),
                tokenizer=fast_tokenizer(path, end_of_text="<|endoftext|>", context_length=48),
                max_length=48,
                batch_size=1,
            ),
            task_dict={"tasks": loaded.tasks},
            bootstrap_iters=0,
        )
    samples = theirs["samples"]["questions"]
    assert ours.answers == [sample["resps"][0] for sample in samples]
