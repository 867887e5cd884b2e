"""Tasks by name: found, loaded, fingerprinted; what is missing or damaged is an error."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval_tasks import write_task
from refusals import refused

from orchestrator.evaluation.tasks import (
    LoadedSuite,
    lm_eval_task_fingerprints,
    load_suite,
    unaveraged_tasks,
)
from orchestrator.records.evaluation import Suite
from orchestrator.settings import EvaluationSettings
from orchestrator.settings.evaluation import PYTHON_BITS_TASK
from orchestrator.workspace.errors import RunFailed, UserError

LAST_WORDS = [{"context": f"one {word} and {word}", "word": word} for word in ("bag", "cab")]
CHOICES = [{"context": f"a {a}", "endings": [a, "end"], "label": 0} for a in ("hen", "pig")]


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = write_task(tmp_path / "tasks", "lastword", LAST_WORDS)
    write_task(folder, "choices", CHOICES)
    (folder / "both.yaml").write_text("group: both\ntask: [lastword, choices]\n")
    return folder


@pytest.fixture(autouse=True)
def hub_look_ups(monkeypatch) -> list[str]:
    """Without network; returns how often the hub was asked for, and fails for any other look-up."""
    look_ups: list[str] = []

    def unreachable(address: tuple[str, int], *_: Any, **__: Any) -> socket.socket:
        if address[0] == "huggingface.co":
            look_ups.append("hub")
        raise OSError("no route")

    # A data set's loader must fail at once: no retries, no look-up.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.setattr(socket, "create_connection", unreachable)
    return look_ups


def load(*names: str, folder: Path, planned: list[str] | None = None) -> LoadedSuite:
    fingerprints = None if planned is None else dict.fromkeys(planned, "")
    return load_suite(Suite(tasks=names, include_folder=str(folder), fingerprints=fingerprints))


def test_names_and_groups_are_loaded_without_the_hub(folder, hub_look_ups):
    grouped = load("both", folder=folder)
    assert (list(grouped.tasks), grouped.groups) == (
        ["lastword", "choices"], {"both": ("lastword", "choices")},
    )  # fmt: skip
    assert grouped.num_items("choices") == 2
    limited = replace(grouped, suite=grouped.suite.model_copy(update={"limit": 1}))
    assert limited.num_items("choices") == 1
    assert set(load(folder=folder).tasks) == {"lastword", "choices"}
    assert hub_look_ups == []
    assert os.environ.get("HF_HUB_OFFLINE") is None


def test_the_fingerprint_depends_on_content_not_on_the_path(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    names = ("lastword", "choices")
    first = {name: load(*names, folder=folder).fingerprint(name) for name in names}
    assert first == {name: load(*names, folder=moved).fingerprint(name) for name in names}
    assert len(set(first.values())) == 2
    write_task(moved, "lastword", [*LAST_WORDS[:-1], {"context": "x y", "word": "z"}])
    assert load(*names, folder=moved).fingerprint("choices") == first["choices"]
    write_task(moved, "choices", CHOICES, target_delimiter="")
    changed = load(*names, folder=moved)
    assert not {changed.fingerprint(name) for name in names} & {*first.values()}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lastword", "lastwrod", "winograndee"],
         r"lastwrod: .*did you mean lastword.*winograndee: .*grande"),
        (["hellaswagg"], r"hellaswagg: .*did you mean hellaswag"),
    ],
)  # fmt: skip
def test_unknown_names_are_errors_that_name_the_nearest(names, message, folder):
    with pytest.raises(UserError, match=message):
        load(*names, folder=folder)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30])


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


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
def test_a_damaged_task_is_an_error_not_skipped(folder, name, harm):
    suites: list[list[str]] = [[], ["choices", "lastword"], ["both"]]
    for names in suites:
        assert "lastword" in load(*names, folder=folder).tasks
    harm(folder / name)
    for names in suites:
        with pytest.raises(UserError, match=r"lastword|both"):
            load(*names, folder=folder)


def test_tasks_that_cannot_be_scored_and_folders_without_tasks_are_errors(tmp_path):
    changes: list[tuple[dict[str, Any], str]] = [
        ({"unsafe_code": True}, "odd: .*runs code that a model wrote"),
        ({"doc_to_text": "{{no_such_field.x}}"}, "odd: .*UndefinedError"),
    ]
    for number, (change, reason) in enumerate(changes):
        folder = write_task(tmp_path / f"odd{number}", "odd", LAST_WORDS, kind="lastword", **change)
        write_task(folder, "lastword", LAST_WORDS)
        with pytest.raises(UserError, match=reason):
            load(folder=folder)
    (tmp_path / "empty").mkdir()
    with refused(UserError, "lm-eval"):
        load(folder=tmp_path / "empty")
    with refused(UserError, "task"):
        load_suite(Suite())


def test_hub_tasks_are_skipped_at_once_without_network(folder, hub_look_ups):
    loaded = load("piqa", "lastword", "blimp", folder=folder)
    assert list(loaded.tasks) == ["lastword"]
    assert loaded.skipped == dict.fromkeys(
        ["piqa", "blimp"], "it needs the hub, and huggingface.co cannot be reached (no route)"
    )
    assert hub_look_ups == ["hub"]
    refusal = r"evaluation\.suite .*lambada_openai, piqa, .*winogrande: it needs the hub"
    with pytest.raises(UserError, match=refusal):
        load("paper", folder=folder)


def test_exactly_the_planned_tasks_are_run(folder):
    names = ("lastword", "choices", "piqa")
    loaded = load(*names, folder=folder, planned=["lastword"])
    assert list(loaded.tasks) == ["lastword"]
    assert set(loaded.skipped) == {"choices", "piqa"}
    with refused(RunFailed, "piqa", "huggingface.co"):
        load(*names, folder=folder, planned=list(names))
    with refused(RunFailed, "piqa"):
        load("piqa", folder=folder, planned=["piqa"])


def test_unaveraged_tasks_are_loaded_once_and_are_single_tasks(folder, hub_look_ups):
    write_task(folder, "words", LAST_WORDS, kind="lastword")

    def names(suite: str, retention: dict[str, float]) -> tuple[list[str], tuple[str, ...]]:
        settings = EvaluationSettings(
            suite=suite, include_path=str(folder), retention=retention, num_items=1
        )
        return sorted(lm_eval_task_fingerprints(settings)), unaveraged_tasks(settings)

    assert names("words", {"choices": 1.0}) == (["choices", "words"], ("choices",))
    assert names("words,choices", {"choices": 1.0}) == (["choices", "words"], ())
    assert names("both", {"bits_per_byte": 0.1}) == (["choices", "lastword"], (PYTHON_BITS_TASK,))
    assert names("heldout", {"choices": 1.0}) == (["choices"], ("choices",))
    assert names("heldout", {"lastword": 1.0}) == ([], ()), "it is measured already"
    for suite, task in (("choices", "both"), ("choices", "chioces"), ("choices", "phop_2")):
        with pytest.raises(UserError, match=r"evaluation\.retention"):
            names(suite, {task: 1.0})
    with refused(UserError, "evaluation.suite"):
        names("", {"choices": 1.0})
    # Tasks beside say nothing of the accuracy that a front needs.
    settings = EvaluationSettings(suite="bits_per_byte", include_path=str(folder))
    for retention in ({}, {"choices": 1.0}):
        with pytest.raises(UserError, match="needs an accuracy"):
            lm_eval_task_fingerprints(
                settings.model_copy(update={"retention": retention}), needs_accuracy=True
            )


def test_a_task_that_fixes_its_number_of_examples_at_0_keeps_it(folder):
    write_task(folder, "none", CHOICES, kind="choices", num_fewshot=0)
    write_task(folder, "one", CHOICES, kind="choices", num_fewshot=1)
    for number, expected in ((None, (0, 1, 0)), (2, (0, 2, 2))):
        names = ("none", "one", "choices")
        suite = Suite(tasks=names, include_folder=str(folder), num_fewshot=number)
        loaded = load_suite(suite).tasks
        assert tuple(loaded[name].get_config("num_fewshot") for name in names) == expected
