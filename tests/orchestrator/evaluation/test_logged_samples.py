"""Outputs of stock lm-eval read as evaluations, and evaluations written as such outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from iiet.decoder import Decoder
from orchestrator.evaluation.harness import load_suite, run_suite
from orchestrator.evaluation.harness.decoder_model import DecoderModel
from orchestrator.evaluation.harness.logged_files import (
    LoggedOutput,
    new_output_folder,
    write_lm_eval_files,
)
from orchestrator.evaluation.harness.suite import Suite
from orchestrator.evaluation.harness.suppressed_output import suppress_output
from orchestrator.evaluation.logged_samples import _groups, find_logged_run
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.settings.evaluation import Prompts
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import RunFailed, UserError

READER = """\
import datasets

WORDS = ["a bag", "the hen", "cab", "face", "dad", "x", "a bag"]

def read(**settings):
    rows = [{"text": w, "choices": ["bag", "fog"], "label": n % 2} for n, w in enumerate(WORDS)]
    return {"test": datasets.Dataset.from_list(rows)}
"""
MEAN = {"aggregation": "mean", "higher_is_better": True}
FILTERS = [
    {"name": "strict", "filter": [{"function": "take_first"}]},
    {"name": "any", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
]
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
        "metadata": {"version": 1.5},
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "filter_list": FILTERS,
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "reader.py").write_text(READER)
    for name, config in TASKS.items():
        text = yaml.safe_dump({"task": name, "test_split": "test", **config})
        (folder / f"{name}.yaml").write_text("custom_dataset: !function reader.read\n" + text)
    return load_suite(folders=[folder])


@pytest.fixture
def ours(suite: Suite, decoder: Decoder, tokenizer: ModelTokenizer) -> EvaluationResult:
    return run_suite(suite, decoder, tokenizer)


@pytest.fixture
def output(suite: Suite, decoder: Decoder, tokenizer: ModelTokenizer, tmp_path: Path) -> Path:
    """What `lm_eval --log_samples --output_path` writes for this decoder."""
    from lm_eval import evaluator
    from lm_eval.loggers import EvaluationTracker

    model = DecoderModel(decoder, tokenizer, 8, prompts=Prompts(), progress=Progress())
    tracker = EvaluationTracker(output_path=str(tmp_path / "output"))
    tracker.general_config_tracker.log_experiment_args(
        "hf", "pretrained=org/tiny", None, None, False
    )
    with suppress_output():
        found = evaluator.evaluate(lm=model, task_dict={"tasks": suite.tasks}, bootstrap_iters=0)
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        for name in found["configs"]:
            tracker.save_results_samples(task_name=name, samples=samples[name])
    return tmp_path / "output"


def test_stock_output_is_read_as_the_evaluation_that_we_store(
    ours: EvaluationResult, output: Path
) -> None:
    run = find_logged_run(output)
    assert run is not None
    read = run.read()
    assert sorted(run.tasks) == sorted(TASKS)
    for name, result in ours.results.items():
        found = read.results[name]
        assert (found.items, found.values) == (result.items, result.values)
        assert (found.version, found.num_fewshot) == (result.version, result.num_fewshot)
        assert found.metrics.items() <= result.metrics.items()
        assert found.accuracy_metric == result.accuracy_metric
        assert found.metrics
    assert len(ours.results["choices"].items) == 7
    assert list(ours.results["answers"].values) == ["exact_match:strict", "exact_match:any"]
    # The folder of the model, and the results themselves, are the same run.
    folder = output / "org__tiny"
    [results] = folder.glob("results_*.json")
    for path in (folder, results):
        again = find_logged_run(path)
        assert again is not None
        assert again.read() == read


def test_written_files_are_those_of_stock_lm_eval(
    suite: Suite, ours: EvaluationResult, output: Path, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    from lm_eval.utils import (
        get_file_task_name,
        get_latest_filename,
        get_results_filenames,
        get_sample_results_filenames,
    )

    config = {"model": "iiet", "model_args": {}, "batch_size": 8, "limit": None}
    place = LoggedOutput(new_output_folder(tmp_path / "own"), "runs/tiny r=2,1")
    folder = write_lm_eval_files(place, suite, ours, tokenizer, config)
    assert folder == tmp_path / "own" / "runs__tiny r=2,1"
    files = [str(path) for path in sorted(folder.iterdir())]
    samples = {get_file_task_name(Path(f).name): f for f in get_sample_results_filenames(files)}
    stock = {get_file_task_name(f.name): f for f in output.rglob("samples_*.jsonl")}
    assert samples.keys() == stock.keys() == TASKS.keys()
    for name, file in samples.items():
        assert Path(file).read_text() == stock[name].read_text()
    written = json.loads(Path(get_latest_filename(get_results_filenames(files))).read_text())
    [theirs] = [json.loads(path.read_text()) for path in output.rglob("results_*.json")]
    assert theirs.keys() <= written.keys()
    for part in ("configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes"):
        assert written[part] == theirs[part]
    for name, result in ours.results.items():
        own, other = written["results"][name], theirs["results"][name]
        differing = {key for key in other if own[key] != other[key]}
        assert all("_stderr" in key and other[key] == "N/A" for key in differing)
        assert own.get("acc_stderr,none") == result.metrics.get("acc_stderr")
    # Read again, they are the evaluation.
    run = find_logged_run(tmp_path / "own")
    assert run is not None
    for name, result in run.read().results.items():
        assert result.metrics == ours.results[name].metrics
        assert result.values == ours.results[name].values


def test_stored_responses_that_do_not_fit_the_task_are_refused(
    suite: Suite, ours: EvaluationResult, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    config = {"model": "iiet", "model_args": {}, "batch_size": 8, "limit": None}
    place = LoggedOutput(new_output_folder(tmp_path / "own"), "tiny")
    good = ours.results["choices"]
    for changes, reason in (
        ({"log_likelihoods": [[0.0, -1.0]] * 7}, "give other values than were measured"),
        ({"log_likelihoods": good.log_likelihoods[:2]}, "are not those that it asks for"),
    ):
        damaged = EvaluationResult(results={"choices": good.model_copy(update=changes)})
        with pytest.raises(RunFailed, match=reason):
            write_lm_eval_files(place, suite, damaged, tokenizer, config)
    with pytest.raises(UserError, match="--log-samples takes a folder"):
        new_output_folder("found.json")
    assert not list(place.folder.iterdir())


def test_of_each_task_the_newest_samples_count(output: Path) -> None:
    folder = output / "org__tiny"
    [results] = folder.glob("results_*.json")
    [samples] = folder.glob("samples_choices_*.jsonl")
    lines = samples.read_text().splitlines()[:2]
    newer = "2124-01-01T00-00-00.000001"
    (folder / f"samples_choices_{newer}.jsonl").write_text("\n".join(lines) + "\n")
    changed = json.loads(results.read_text())
    changed["versions"]["choices"] = 2.0
    (folder / f"results_{newer}.json").write_text(json.dumps(changed))
    run = find_logged_run(folder)
    assert run is not None
    read = run.read()
    assert (read.results["choices"].num_items, read.results["choices"].version) == (2, "2.0")
    assert read.results["answers"].num_items == 7
    older = find_logged_run(results)
    assert older is not None
    assert older.read().results["choices"].num_items == 7


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is damaged"),
        ('{"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1}\n', "has no `doc_hash`"),
        ("", "it is empty"),
        ("[1]\n", "has no `doc_hash`"),
        ('{"doc_hash": "a", "doc_id": 0, "filter": "none", "metrics": ["acc"]}', "is damaged"),
    ],
)
def test_damaged_samples_are_named(output: Path, content: str, reason: str) -> None:
    [samples] = output.rglob("samples_choices_*.jsonl")
    samples.write_text(content)
    run = find_logged_run(output)
    assert run is not None
    with pytest.raises(UserError, match=reason) as error:
        run.read()
    assert str(samples) in str(error.value)
    assert "--log_samples" in str(error.value)


def test_results_without_samples_and_folders_of_several_models_are_refused(output: Path) -> None:
    folder = output / "org__tiny"
    os.renames(output / "org__tiny", output / "a")
    (output / "b").mkdir()
    (output / "b" / "results_2024-01-01T00-00-00.000001.json").write_text("{}")
    with pytest.raises(UserError, match="results of several models; name one of its folders: a, b"):
        find_logged_run(output)
    with pytest.raises(UserError, match="results of lm-eval but no samples of them"):
        find_logged_run(output / "b")
    assert find_logged_run(folder) is None
    assert find_logged_run(output.parent / "tasks") is None


def test_a_group_of_groups_holds_all_tasks_below_it() -> None:
    subtasks = {"mmlu": ["mmlu_stem", "x"], "mmlu_stem": ["y", "z"], "piqa": []}
    assert _groups(subtasks) == {"mmlu": ("y", "z", "x")}
