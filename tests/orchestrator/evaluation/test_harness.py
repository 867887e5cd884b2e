"""lm-eval with our model class: log-likelihoods equal a direct computation.

The last tests run official items (LAMBADA, PIQA, ...) if a folder of them is beside the repository.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from orchestrator.data.store import open_tokens
from orchestrator.evaluation.harness import load_suite, run_suite, suite
from orchestrator.models.tokenizer import end_of_text_id, load_tokenizer
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parents[3]
OFFICIAL_TASKS = ROOT.parent / "shared" / "data" / "tasks"

ROWS = {
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
KINDS: dict[str, dict[str, Any]] = {
    "lastword": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + word}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
}
READER = """
import json, pathlib, datasets

def _read(name):
    lines = pathlib.Path(__file__).with_name(name + ".jsonl").read_text().splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}

"""


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **changes: Any) -> None:
    """Write a task as a user would: a YAML file, its items, and the function that reads them."""
    folder.mkdir(exist_ok=True)
    config = {
        "task": name,
        "test_split": "test",
        **KINDS.get(name, KINDS["lastword"]),
        "metadata": {"version": 2.0},
        **changes,
    }
    text = f"custom_dataset: !function {name}_reader.read\n" + yaml.safe_dump(config)
    (folder / f"{name}.yaml").write_text(text)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = f'{READER}def read(**settings):\n    return _read("{name}")\n'
    (folder / f"{name}_reader.py").write_text(reader)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    for name, rows in ROWS.items():
        write_task(folder, name, rows)
    return folder


@pytest.fixture
def decoder(tiny_model: dict[str, Any]) -> Decoder:
    torch.manual_seed(0)
    config = {**tiny_model, "context_length": 32, "initializer_std": 0.2}
    return Decoder(ModelConfig.from_dict(config))


@pytest.fixture
def tokenizer_path(tiny_tokens: Path) -> Path:
    return open_tokens(tiny_tokens).tokenizer_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every network look-up fail."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may ask the network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@torch.no_grad()
def directly(decoder: Decoder, ids: list[int], num_scored: int) -> float:
    """Score the last tokens of a sequence that fits the context, by one plain forward pass."""
    log_probabilities = decoder(torch.tensor([ids[:-1]]))[0, -num_scored:].double().log_softmax(-1)
    return float(log_probabilities[range(num_scored), ids[-num_scored:]].sum())


def pair_directly(decoder: Decoder, tokenizer: Any, context: str, continuation: str) -> float:
    before = tokenizer.encode(context).ids or [end_of_text_id(tokenizer)]
    whole = tokenizer.encode(context + continuation).ids
    scored = whole[len(before) :] if context else whole
    longest = decoder.config.context_length
    total = 0.0
    for start in range(0, len(scored), longest):
        part = scored[start : start + longest]
        ids = (before + scored[:start])[-(longest + 1 - len(part)) :] + part
        total += directly(decoder, ids, len(part))
    return total


def rolling_directly(decoder: Decoder, tokenizer: Any, text: str) -> float:
    """Score windows of the context's length; the last one starts earlier, so that it is full."""
    ids, longest = tokenizer.encode(text).ids, decoder.config.context_length
    total, done = 0.0, 0
    while done < len(ids):
        end = min(done + longest, len(ids))
        sequence = [end_of_text_id(tokenizer), *ids][max(0, end - longest) : end + 1]
        total += directly(decoder, sequence, end - done)
        done = end
    return total


def test_each_item_equals_a_direct_computation(
    decoder: Decoder, tokenizer_path: Path, tasks: Path, no_network: None
) -> None:
    found = run_suite(load_suite(folders=[tasks]), decoder, tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path)
    expected = {
        "lastword": [
            [pair_directly(decoder, tokenizer, row["context"], f" {row['word']}")]
            for row in ROWS["lastword"]
        ],
        "choices": [
            [pair_directly(decoder, tokenizer, row["context"], f" {e}") for e in row["endings"]]
            for row in ROWS["choices"]
        ],
        "rolling": [[rolling_directly(decoder, tokenizer, row["text"])] for row in ROWS["rolling"]],
    }
    assert set(found.tasks) == set(expected)
    for name, wanted in expected.items():
        for scores, right in zip(found.results[name].log_likelihoods, wanted, strict=True):
            assert scores == pytest.approx(right, abs=1e-4), name
    picks = [max(range(3), key=scores.__getitem__) for scores in expected["choices"]]
    accuracy = sum(pick == 0 for pick in picks) / len(picks)
    assert found.tasks["choices"]["acc"] == accuracy
    bits = -sum(s[0] for s in expected["rolling"]) / math.log(2)
    num_bytes = sum(len(row["text"]) for row in ROWS["rolling"])
    assert found.quality()["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-5)
    assert found.results["lastword"].version == "2.0"
    assert found.num_items == 12


def test_standard_errors_equal_those_of_lm_eval(
    decoder: Decoder, tokenizer_path: Path, tasks: Path
) -> None:
    from lm_eval.api.metrics import mean_stderr

    result = run_suite(load_suite(folders=[tasks]), decoder, tokenizer_path).results["choices"]
    for metric in ("acc", "acc_norm"):
        error = mean_stderr(result.values[metric])
        assert result.metrics[f"{metric}_stderr"] == pytest.approx(error)


def test_a_run_prints_nothing_and_reports_progress(
    decoder: Decoder, tokenizer_path: Path, tasks: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Recorder(Progress):
        def __init__(self) -> None:
            self.total: float | None = None
            self.seen: list[float] = []
            self.notes: list[str] = []

        def start(self, title: str, total: float | None = None) -> None:
            self.total = total

        def advance(self, done: float, text: str = "") -> None:
            self.seen.append(done)

        def note(self, text: str) -> None:
            self.notes.append(text)

    progress = Recorder()
    stored: list[str] = []
    run_suite(
        load_suite(folders=[tasks]),
        Decoder(ModelConfig.from_dict({**decoder.config.to_dict(), "context_length": 8})),
        tokenizer_path,
        progress=progress,
        on_result=lambda result: stored.append(result.name),
    )
    assert progress.total == 12
    assert progress.seen == sorted(progress.seen)
    assert progress.seen[-1] == 12
    assert "lost their beginning" in progress.notes[0]
    assert stored == ["choices", "lastword", "rolling"]
    assert capfd.readouterr() == ("", "")


def test_names_limits_and_groups(decoder: Decoder, tokenizer_path: Path, tasks: Path) -> None:
    (tasks / "both.yaml").write_text("group: both\ntask: [lastword, choices]\n")
    loaded = load_suite(["both", "rolling"], folders=[tasks])
    found = run_suite(loaded, decoder, tokenizer_path, limit=2)
    assert found.groups == {"both": ("lastword", "choices")}
    assert {name: result.num_items for name, result in found.results.items()} == {
        "lastword": 2,
        "choices": 2,
        "rolling": 2,
    }
    assert list(found.accuracies) == ["both"]


def test_few_shot_examples_are_in_the_prompt(
    decoder: Decoder, tokenizer_path: Path, tmp_path: Path
) -> None:
    write_task(tmp_path / "few", "lastword", ROWS["lastword"], fewshot_split="test")
    wide = Decoder(ModelConfig.from_dict({**decoder.config.to_dict(), "context_length": 512}))
    plain, shown = (
        run_suite(
            load_suite(folders=[tmp_path / "few"], num_fewshot=n), wide, tokenizer_path
        ).results
        for n in (0, 2)
    )
    assert (plain["lastword"].num_fewshot, shown["lastword"].num_fewshot) == (0, 2)
    assert plain["lastword"].log_likelihoods != shown["lastword"].log_likelihoods


def test_the_fingerprint_depends_on_content_not_on_the_path(tasks: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(tasks, moved)
    first = load_suite(folders=[tasks])
    second = load_suite(folders=[moved])
    prints = {name: first.fingerprint(name) for name in first.tasks}
    assert prints == {name: second.fingerprint(name) for name in second.tasks}
    assert len(set(prints.values())) == 3
    write_task(moved, "lastword", [*ROWS["lastword"][:-1], {"context": "x y", "word": "z"}])
    write_task(moved, "choices", ROWS["choices"], target_delimiter="")
    third = load_suite(folders=[moved])
    assert third.fingerprint("rolling") == prints["rolling"]
    assert third.fingerprint("lastword") != prints["lastword"]
    assert third.fingerprint("choices") != prints["choices"]


def test_unknown_names_are_errors_that_name_the_nearest(tasks: Path, no_network: None) -> None:
    with pytest.raises(
        UserError, match=r"lastwrod: .*did you mean lastword.*winograndee: .*grande"
    ):
        load_suite(["lastword", "lastwrod", "winograndee"], folders=[tasks])
    with pytest.raises(UserError, match=r"hellaswagg: .*did you mean hellaswag"):
        load_suite(["hellaswagg"])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30])


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("names", [[], ["choices", "lastword"], ["both"]])
@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("lastword.jsonl", _cut),
        ("lastword.jsonl", Path.unlink),
        ("lastword.jsonl", _replace_by_folder),
        ("lastword_reader.py", _cut),
        ("lastword.yaml", lambda path: path.write_text("")),
        ("lastword.yaml", lambda path: path.write_text("task: [")),
        ("lastword.yaml", _replace_by_folder),
        ("lastword.yaml", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    ],
)
def test_a_damaged_task_is_an_error_not_skipped(
    tasks: Path, no_network: None, names: list[str], name: str, harm: Callable[[Path], Any]
) -> None:
    (tasks / "both.yaml").write_text("group: both\ntask: [lastword, choices]\n")
    assert "lastword" in load_suite(names, folders=[tasks]).tasks
    harm(tasks / name)
    with pytest.raises(UserError, match=r"lastword|both"):
        load_suite(names, folders=[tasks])


def test_exactly_the_planned_tasks_are_run(
    decoder: Decoder, tokenizer_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "hub_problem", lambda: "huggingface.co cannot be reached")

    def measured(*planned: str) -> EvaluationResult:
        names = ["lastword", "choices", "piqa"]
        loaded = load_suite(names, folders=[tasks], planned=planned)
        return run_suite(loaded, decoder, tokenizer_path)

    found = measured("lastword")
    assert list(found.results) == ["lastword"]
    assert found.skipped["choices"] == "it could not be loaded when the sweep was planned"
    with pytest.raises(RunFailed, match=r"piqa could be loaded when .*huggingface.co cannot be"):
        measured("lastword", "choices", "piqa")


def test_hub_tasks_are_skipped_at_once_without_network(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def no_hub() -> str:
        asked.append(1)
        return "huggingface.co cannot be reached"

    monkeypatch.setattr(suite, "hub_problem", no_hub)
    # A data set's loader must fail at once: no retries, no look-up.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    found = load_suite(["piqa", "lastword", "blimp"], folders=[tasks])
    assert list(found.tasks) == ["lastword"]
    assert found.skipped == dict.fromkeys(
        ["piqa", "blimp"], "it needs the hub, and huggingface.co cannot be reached"
    )
    assert asked == [1]
    with pytest.raises(RunFailed, match=r"lambada_openai, piqa, .*winogrande: it needs the hub"):
        load_suite(["paper"])


def test_local_tasks_never_contact_the_hub(
    tasks: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "hub_problem", lambda: pytest.fail("asked for the hub"))
    assert len(load_suite(folders=[tasks]).tasks) == 3
    assert os.environ.get("HF_HUB_OFFLINE") is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"unsafe_code": True}, "runs code that a model wrote"),
        ({"doc_to_text": "{{no_such_field.x}}"}, "UndefinedError"),
    ],
)
def test_unsupported_tasks_are_errors(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    write_task(tmp_path / "odd", "odd", ROWS["lastword"], **change)
    write_task(tmp_path / "odd", "lastword", ROWS["lastword"])
    with pytest.raises(UserError, match=f"odd: .*{reason}"):
        load_suite(folders=[tmp_path / "odd"])


def test_folders_without_tasks_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no lm-eval task files"):
        load_suite(folders=[tmp_path])
    with pytest.raises(UserError, match="there is no folder"):
        load_suite(folders=[tmp_path / "missing"])
    with pytest.raises(UserError, match="no task was named"):
        load_suite()


@pytest.mark.slow
def test_scores_equal_those_of_lm_evals_hugging_face_class(
    decoder: Decoder, tokenizer_path: Path, tasks: Path
) -> None:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    from iiet.exporting import fast_tokenizer, transformers_model
    from orchestrator.evaluation.harness.suppressed_output import suppress_output

    loaded = load_suite(folders=[tasks])
    ours = run_suite(loaded, decoder, tokenizer_path).results
    model = transformers_model(decoder)
    model.config.use_cache = False
    with suppress_output():
        theirs = evaluator.evaluate(
            lm=HFLM(
                pretrained=model,
                tokenizer=fast_tokenizer(
                    tokenizer_path, end_of_text="<|endoftext|>", context_length=32
                ),
                max_length=32,
                batch_size=4,
                logits_cache=False,
            ),
            task_dict={"tasks": loaded.tasks},
            bootstrap_iters=0,
        )
    for name, result in ours.items():
        for metric, value in result.metrics.items():
            if not metric.endswith("_stderr"):
                assert theirs["results"][name][f"{metric},none"] == pytest.approx(value, rel=1e-5)


def official_files() -> list[Path]:
    return sorted(OFFICIAL_TASKS.glob("*/*.yaml"))


@pytest.mark.skipif(not official_files(), reason="no official task files beside the repository")
@pytest.mark.parametrize("path", official_files(), ids=lambda path: path.stem)
def test_official_items_equal_a_direct_computation(
    path: Path,
    decoder: Decoder,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_network: None,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    folder = _with_few_items(path, tmp_path / "task")
    name = f"local_{'blimp_' if path.parent.name == 'blimp' else ''}{path.stem}"
    wide = Decoder(ModelConfig.from_dict({**decoder.config.to_dict(), "context_length": 96}))
    loaded = load_suite([name], folders=[folder])
    result = run_suite(loaded, wide, tokenizer_path).results[name]
    tokenizer = load_tokenizer(tokenizer_path)
    assert result.num_items == 6
    for request in loaded.tasks[name].instances:
        direct = pair_directly(wide, tokenizer, *request.args)
        scores = result.log_likelihoods[request.doc_id]
        assert scores[request.idx] == pytest.approx(direct, abs=2e-3)


def _with_few_items(path: Path, folder: Path) -> Path:
    """Copy a task with its first items; its paths are relative to the repository's root."""
    folder.mkdir()
    config = yaml.safe_load(path.read_text())
    files = config["dataset_kwargs"]["data_files"]
    for split, name in files.items():
        source = ROOT / name
        with gzip.open(source, "rt") if source.suffix == ".gz" else source.open() as lines:
            rows = [next(lines) for _ in range(6)]
        target = folder / f"{split}.jsonl"
        target.write_text("".join(rows))
        files[split] = str(target)
    (folder / path.name).write_text(yaml.safe_dump(config))
    return folder
