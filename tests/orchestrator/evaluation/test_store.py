"""The store: its files are those of lm-eval, and what is damaged is as good as missing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from lm_eval_tasks import write_task
from refusals import refused

from orchestrator.evaluation.lm_eval_model import DecoderModel, run_task
from orchestrator.evaluation.store import (
    ITEMS,
    AnswerJournal,
    EvaluationStore,
    MeasuredTask,
    item_values,
)
from orchestrator.evaluation.tasks import LoadedSuite, load_suite, suppress_output
from orchestrator.records.evaluation import EvaluationKeys, Suite, TaskResult
from orchestrator.workspace.errors import DamagedFile, RunFailed

WORDS = ["a bag", "the hen", "cab", "face", "dad", "x", "a bag"]
FILTERS = [
    {"name": "strict", "filter": [{"function": "take_first"}]},
    {"name": "any", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
]
ABOUT: dict[str, Any] = {"config": {"model": "iiet", "model_args": {"schedule": "2,1"}}}


@pytest.fixture
def suite(tmp_path) -> LoadedSuite:
    folder = tmp_path / "tasks"
    rows = [{"context": w, "endings": ["bag", "fog"], "label": n % 2} for n, w in enumerate(WORDS)]
    write_task(folder, "choices", rows)
    questions = [{"question": word, "answer": word} for word in WORDS]
    write_task(folder, "answers", questions, kind="questions", filter_list=FILTERS)
    write_task(folder, "texts", [{"text": word} for word in WORDS], kind="rolling")
    return load_suite(Suite(include_folder=str(folder)))


@pytest.fixture
def output(suite, decoder, tokenizer, tmp_path) -> Path:
    """What `lm_eval --log_samples --output_path` writes for this decoder."""
    from lm_eval import evaluator
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(tmp_path / "output"))
    tracker.general_config_tracker.log_experiment_args(
        "hf", "pretrained=org/tiny", None, None, False
    )
    with suppress_output():
        run_results = evaluator.evaluate(
            lm=DecoderModel(decoder, tokenizer, 8),
            task_dict={"tasks": suite.tasks},
            bootstrap_iters=0,
        )
        samples = run_results.pop("samples")
        tracker.save_results_aggregated(results=run_results, samples=samples)
        for name in run_results["configs"]:
            tracker.save_results_samples(task_name=name, samples=samples[name])
    return tmp_path / "output"


def read(folder: Path) -> dict[str, TaskResult]:
    """Return by task what lm-eval's files in a folder say."""
    [results] = folder.rglob("results_*.json")
    run = json.loads(results.read_text())
    task_results = {}
    for name in run["results"]:
        [path] = folder.rglob(f"samples_{name}_*.jsonl")
        items, values = item_values([json.loads(line) for line in path.read_text().splitlines()])
        task_results[name] = MeasuredTask(name=name, output=run, items=items, values=values).result
    return task_results


def test_stored_files_are_those_of_stock_lm_eval(suite, output, decoder, tokenizer, tmp_path):
    from lm_eval.utils import get_latest_filename, get_results_filenames

    store = EvaluationStore(tmp_path / "store")
    model = DecoderModel(decoder, tokenizer, 8)
    stock = read(output)
    measured = {name: run_task(name, task, model) for name, task in suite.tasks.items()}
    for name, task in measured.items():
        store.write(f"key-{name}", task, ABOUT)
        stored = store.read(f"key-{name}")
        stock_result = stock[name]
        assert stored == task.result
        assert (stock_result.items, stock_result.values) == (stored.items, stored.values)
        assert (stock_result.version, stock_result.num_fewshot) == (
            stored.version,
            stored.num_fewshot,
        )
        assert stock_result.metrics.items() <= stored.metrics.items()
        assert stock_result.accuracy_metric == stored.accuracy_metric
        # The stored folder is itself an output of lm-eval.
        assert read(tmp_path / "store" / f"key-{name}") == {name: stored}
    assert len(measured["choices"].items) == 7
    assert list(measured["answers"].values) == ["exact_match:strict", "exact_match:any"]

    # Copied as one run, under one date.
    keys = EvaluationKeys(
        tasks={name: f"key-{name}" for name in measured}, groups={"both": ("choices", "texts")}
    )
    store.copy(keys, tmp_path / "own", pretrained="runs/tiny")
    assert read(tmp_path / "own") == {name: task.result for name, task in measured.items()}
    [theirs] = output.rglob("results_*.json")
    files = [str(path) for path in (tmp_path / "own").iterdir()]
    ours = json.loads(Path(get_latest_filename(get_results_filenames(files))).read_text())
    stock_run = json.loads(theirs.read_text())
    for name in measured:
        [own_samples], [stock_samples] = (
            folder.rglob(f"samples_{name}_*") for folder in (tmp_path / "own", output)
        )
        assert own_samples.read_text() == stock_samples.read_text()
        assert stock_run["results"][name].items() - ours["results"][name].items() <= {
            (key, "N/A") for key in stock_run["results"][name] if "_stderr" in key
        }
    for part in ("task_hashes", "versions", "n-shot", "n-samples", "higher_is_better"):
        assert ours[part] == stock_run[part]
    assert ours["config"]["model_args"] == {"schedule": "2,1", "pretrained": "runs/tiny"}
    assert ours["model_name"] == "own"
    assert ours["group_subtasks"] == {"both": ["choices", "texts"]}


def test_a_file_that_cannot_be_read_is_named_and_a_missing_one_is_no_result(
    suite, decoder, tokenizer, tmp_path
):
    notes: list[str] = []
    store = EvaluationStore(tmp_path, notes.append)
    task = run_task("choices", suite.tasks["choices"], DecoderModel(decoder, tokenizer))
    keys = EvaluationKeys(tasks={"choices": "key"})
    assert store.read("key") is None
    for pattern in ("results_*", ITEMS):
        store.write("key", task, ABOUT)
        [file] = (tmp_path / "key").glob(pattern)
        for text in ("{", '{"results": 1}'):
            file.write_text(text)
            with refused(DamagedFile, file.name):
                store.load(keys)
        file.unlink()
        assert store.load(keys) is None, "it is measured again"
        with refused(RunFailed, "choices", "key"):
            store.copy(keys, tmp_path / "copy", pretrained="")
    store.write("key", task, ABOUT)
    [file] = (tmp_path / "key").glob("samples_*")
    file.unlink()
    assert store.load(keys), "a report reads no samples"
    with refused(RunFailed, file.name):
        store.copy(keys, tmp_path / "copy", pretrained="")
    plain = tmp_path / "a file"
    plain.write_text("")
    store.write("key", task, ABOUT)
    with refused(RunFailed, "a file"):
        store.copy(keys, plain, pretrained="")
    EvaluationStore(plain, notes.append).write("key", task, ABOUT)
    assert ["choices" in note for note in notes] == [True]


def test_what_is_loaded_knows_its_groups_and_which_tasks_are_in_no_average(
    suite, decoder, tokenizer, tmp_path
):
    store = EvaluationStore(tmp_path)
    model = DecoderModel(decoder, tokenizer)
    for name, task in suite.tasks.items():
        store.write(f"key-{name}", run_task(name, task, model), ABOUT)
    keys = EvaluationKeys(
        tasks={name: f"key-{name}" for name in suite.tasks},
        groups={"both": ("choices", "texts")},
        skipped={"piqa": "it is not on this machine"},
        unaveraged=("texts",),
    )
    loaded = store.load(keys)
    assert loaded
    assert loaded.averaged.keys() == {"choices", "answers"}
    assert (loaded.groups, loaded.skipped) == (keys.groups, keys.skipped)
    keys.tasks["texts"] = "never measured"
    assert store.load(keys) is None


def test_a_number_without_items_is_stored_like_a_task(tmp_path):
    run = {"results": {"loss": {"loss,none": 0.5}}, "versions": {"loss": 1}, "n-shot": {"loss": 0}}
    store = EvaluationStore(tmp_path)
    store.write("key", MeasuredTask(name="loss", output=run), {})
    result = store.read("key")
    assert (result.metrics, result.num_items) == ({"loss": 0.5}, 0)


def test_a_perplexity_that_says_nothing_is_left_out():
    numbers = {"perplexity,none": 4e7, "perplexity_stderr,none": 9.0, "acc,none": 0.5}
    run = {"results": {"t": numbers}, "versions": {}, "n-shot": {}}
    assert MeasuredTask(name="t", output=run).result.metrics == {"acc": 0.5}
    numbers["perplexity,none"] = 35.0
    metrics = MeasuredTask(name="t", output=run).result.metrics
    assert metrics == {"perplexity": 35.0, "perplexity_stderr": 9.0, "acc": 0.5}


# Answers of a task that is not finished

SCORES = {"a": [[-1.25, True], [-0.1 - 0.2, False]], "b": "a text\nof two lines, ü"}


def test_answers_come_back_exactly_or_are_missing_and_a_failure_is_said_once(tmp_path):
    path = tmp_path / "a new workspace" / "evaluations" / "key.answers"

    def write(answers: dict[str, object]) -> None:
        AnswerJournal(path).add(answers)

    def stored_answers() -> dict[str, object]:
        journal = AnswerJournal(path)
        return {key: value for key in "abcd" if (value := journal.get(key)) is not None}

    write(SCORES)
    write({"c": [[float("-inf"), False]]})
    assert stored_answers() == {**SCORES, "c": [[float("-inf"), False]]}
    complete = path.read_bytes()
    path.write_bytes(complete[:-4])
    write({"d": "after a cut line"})
    assert stored_answers() == {**SCORES, "d": "after a cut line"}
    path.write_bytes(b"\xff\x00" * 99 + b"\n[]\n" + complete)
    assert AnswerJournal(path).num_answers == 4
    errors: list[OSError] = []
    journal = AnswerJournal(path / "below a file", on_failure=errors.append)
    assert journal.num_answers == 0
    for _ in range(2):
        journal.add(SCORES)
    assert len(errors) == 1


def test_answers_that_cannot_be_stored_are_noted_by_the_name_of_their_task(tmp_path):
    file = tmp_path / "a file"
    file.touch()
    notes: list[str] = []
    EvaluationStore(file, notes.append).journal("key", "choices").add(SCORES)
    assert ["choices" in note for note in notes] == [True]


def test_answers_on_a_full_disk_end_the_command(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal = EvaluationStore(tmp_path, pytest.fail).journal("key", "choices")
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space"):
        journal.add(SCORES)
