"""`--json`: standard output holds the JSON alone, and the reference of commands names its keys."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generated_pages
import pytest
from commands import all_commands, settings_options
from file_modes import only_readable
from lm_eval_tasks import write_choices
from sample_trials import sample_trial

from orchestrator import cli
from orchestrator.pipelines.reports import report
from orchestrator.reporting.output import Result
from orchestrator.reporting.results import StoredSweep
from orchestrator.sweeping.sweep import SweepResult
from orchestrator.workspace.layout import Workspace, open_workspace

Keys = tuple[set[str], set[str]]
"""Keys that are always there, and all keys."""


def _documented() -> dict[str, Keys]:
    """Return the keys that the reference names, by command and options."""
    keys: dict[str, Keys] = {}
    for name in all_commands():
        for options, texts in generated_pages.json_keys(name).items():
            assert all(texts.values()), (name, options, texts)
            always = {key for key, text in texts.items() if not text.startswith("(optional)")}
            keys[f"{name} {options}".strip()] = always, set(texts)
    return keys


DOCUMENTED = _documented()


def _check(name: str, printed: dict[str, Any]) -> None:
    always, every = DOCUMENTED[name]
    assert always <= set(printed) <= every, set(printed) ^ always


def test_every_command_with_json_has_its_keys_in_the_reference():
    with_json = {
        name
        for name, command in all_commands().items()
        if any("--json" in parameter.opts for parameter in command.params)
    }
    assert with_json == {name for name in all_commands() if generated_pages.json_keys(name)}
    page = generated_pages.command_line_page()
    assert "`evaluate --json`:\n\n| key | content |" in page


@pytest.fixture(scope="module")
def space(tmp_path_factory, tiny_tokens, save_tiny) -> Workspace:
    """A workspace with a model, its tokens, and a sweep of two schedules."""
    workspace = open_workspace(tmp_path_factory.mktemp("workspace"))
    shutil.copytree(tiny_tokens, workspace.tokens / tiny_tokens.name)
    checkpoint = save_tiny(workspace.runs / "full", context_length=48)
    full, cheap = (
        sample_trial(
            key=name, role=role, label=name, schedule=schedule, cost={"evaluations": nfe},
            quality={"accuracy": accuracy}, checkpoint=str(checkpoint),
        )
        for name, role, schedule, nfe, accuracy in (
            ("teacher", "teacher", (2, 1), 5, 0.5), ("1,0", "trial", (1, 0), 3, 0.498),
        )
    )  # fmt: skip
    StoredSweep(name="two", key="sweep-key", results=(full, cheap)).store(workspace)
    return workspace


Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def run(space, capfd) -> Run:
    """Runs a command with --json; returns the value, and what went to standard error."""

    def command(*words: str) -> tuple[dict[str, Any], str]:
        assert cli.main([*words, "--json", "--workspace", str(space.root)]) == 0
        captured = capfd.readouterr()
        assert captured.out[0] == "{", "the JSON alone"
        value: dict[str, Any] = json.loads(captured.out)
        return value, captured.err

    return command


SHORT = [
    "training.num_steps=2", "training.num_tokens_per_step=96", "training.num_validation_tokens=96",
    "distillation.training.num_steps=2", "distillation.training.num_tokens_per_step=96",
    "distillation.training.num_validation_tokens=96", "influence.num_tokens=96",
]  # fmt: skip


def short(*words: str) -> list[str]:
    """Return a command with the settings of `SHORT` that it reads."""
    return [*words, *settings_options(SHORT, words[0])]


COMMANDS = {
    "pick --dry-run": ["pick", "two", "--dry-run"],
    "distill --dry-run": short("distill", "full", "-r", "1,0", "-r", "0", "--dry-run"),
    "pretrain --dry-run": ["pretrain", "--dry-run"],
    "sweep --dry-run": short("sweep-threshold", "full", "--dry-run"),
    "influence --dry-run": short("influence", "full", "--dry-run"),
    "benchmark --dry-run": ["benchmark", "full", "--dry-run"],
    "generate": ["generate", "full", "--prompt", "abc", "-n", "3"],
    "export": ["export", "full", "--no-measure"],
    "list": ["list"],
    "list runs": ["list", "runs"],
    "list running": ["list", "running"],
    "clean": ["clean", "--dry-run"],
}


def test_the_keys_are_those_of_the_page(run, space, capfd):
    for name, words in COMMANDS.items():
        value, _ = run(*words)
        key = name.removesuffix(" runs")
        _check(key if key in DOCUMENTED else words[0], value)
        if name == "distill --dry-run":
            assert [student["schedule"] for student in value["students"]] == ["1,0", "0,0"]
            for student in value["students"]:
                _check("pretrain --dry-run", student)
    for name in ("config list", "config show"):
        assert cli.main([*name.split(), "--json"]) == 0
        _check(name, json.loads(capfd.readouterr().out))
    assert cli.main(["influence", "none", "--json", "--workspace", str(space.root)]) == 2
    captured = capfd.readouterr()
    assert captured.out == "", "an error prints no JSON"
    assert "none" in captured.err


@pytest.mark.parametrize(  # A run, and a sweep's model.
    ("model", "schedule"), [("full", [2, 1]), ("two", [1, 0])]
)
def test_generate_names_the_model_and_the_schedule(model, schedule, run, space):
    value, progress = run("generate", model, "--prompt", "abc", "-n", "1")
    assert value["model"] == str(space.runs / "full" / "step_00000001")
    assert value["schedule"] == schedule
    written = ",".join(map(str, schedule))
    assert f"model: {value['model']}, schedule {written}\n" in progress


@pytest.mark.slow
def test_what_is_tracked_has_the_keys_of_the_page(run, space, tmp_path):
    value, progress = run(*short("influence", "full"))
    _check("influence", value)
    assert [len(row) for row in value["values"]] == value["schedule"] == [2, 1]
    assert "influence (cosine): 3 corrections" in progress
    numbers = ["--batch-sizes", "1", "--contexts", "4", "--new-tokens", "2", "--repetitions", "1"]
    _check("benchmark", run("benchmark", "full", "-r", "0", *numbers)[0])
    _check("report", run("report", "two")[0])
    _check("pick", run("pick", "two", "--best", "--to", str(tmp_path / "picked"))[0])
    _check("import", run("import", str(tmp_path / "picked"), "--name", "again")[0])
    _check("ui --sync", run("ui", "--sync")[0])
    _check("doctor", run("doctor")[0])
    result = report(workspace=space, sweeps=["two"])
    ended = SweepResult(**dict(result), name="two", failures={}, stopped={})
    _check("sweep", ended.to_json())


class Numbers(Result):
    parts: dict[str, list[float]]


def test_numbers_that_are_not_finite_are_null_in_json():
    text = Numbers(parts={"a": [1.5, math.nan], "b": [math.inf, -math.inf]}).to_text()
    parts = json.loads(text, parse_constant=pytest.fail)["parts"]
    assert parts == {"a": [1.5, None], "b": [None, None]}


@pytest.fixture
def tasks(tmp_path) -> list[str]:
    """The options of a task with 16 items."""
    words = [f"{a} {b}" for a in "abcd" for b in "efgh"]
    return ["--suite", "letters", "--include-path", str(write_choices(tmp_path, "letters", words))]


@pytest.mark.slow
def test_evaluations_have_the_keys_of_the_page(run, tasks):
    _check("evaluate --dry-run", run("evaluate", "full", "--dry-run", *tasks)[0])
    evaluation, progress = run("evaluate", "full", "-r", "2,1", "-r", "0", *tasks)
    _check("evaluate", evaluation)
    assert [model["name"] for model in evaluation["models"]] == ["r=2,1", "r=0"]
    assert evaluation["models"][0]["tasks"]["letters"]["num_items"] == 16
    assert "evaluate: accuracy" in progress
    planned = run("evaluate", "full", "-r", "2,1", "-r", "0", *tasks, "--dry-run")[0]
    assert [row["state"] for row in planned["tasks"]] == 2 * ["16 items, stored"]
    difference = evaluation["differences"][0]
    accuracies = [model["quality"]["letters/acc_norm"] for model in evaluation["models"]]
    assert (difference["model"], difference["against"]) == ("r=0", "r=2,1")
    assert difference["difference"] == pytest.approx(accuracies[1] - accuracies[0])
    assert difference["low"] <= difference["difference"] <= difference["high"]


@pytest.mark.slow
def test_a_workspace_that_can_only_be_read_gives_the_same_answers(space, tasks, tmp_path, capfd):
    commands = [["generate", "full", "--prompt", "abc", "-n", "3"], ["report", "two"]]
    commands += [["report", "two", "--cost", "flops"], ["evaluate", "full", *tasks]]
    copy = Workspace(Path(shutil.copytree(space.root, tmp_path / "copy")))
    before = sorted(copy.root.rglob("*"))

    def answer(words: list[str]) -> tuple[dict[str, Any], str]:
        code = cli.main([*words, "--json", "--workspace", str(copy.root)])
        captured = capfd.readouterr()
        assert code == 0, captured.err
        values = json.loads(captured.out)
        values.pop("page", None)
        for result in values.get("results", ()):
            del result["run_id"], result["details"]["run_id"]  # MLflow's.
        return values, " ".join(captured.err.split())

    with only_readable(copy.root):
        answers = [answer(words) for words in commands]
    assert sorted(copy.root.rglob("*")) == before
    for words, (values, notes) in zip(commands, answers, strict=True):
        assert "copy cannot be written" in notes, words
        assert values == answer(words)[0]


@pytest.mark.slow
def test_trainings_have_the_keys_of_the_page(tmp_path, capfd):
    def result(*words: str) -> Any:
        assert cli.main([*words, "--json", "-w", str(tmp_path / "space")]) == 0
        return json.loads(capfd.readouterr().out)

    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"The square of {n} is {n * n}, and its cube {n**3}." for n in range(400))
    )
    data = [
        "data.source=files", f"data.files=[{text}]", "data.vocab_size=300",
        "data.passage_characters=1000", "model.dim=16", "model.num_layers=2",
        "model.num_heads=2", "model.num_kv_heads=2", "model.ffn_dim=32",
        "model.context_length=48",
    ]  # fmt: skip
    prepared = result("prepare", *settings_options(data, "prepare"))
    _check("prepare", prepared)
    assert prepared["vocab_size"] == 300
    assert prepared["num_tokens"] > prepared["num_documents"] > 1
    shape = settings_options(data, "pretrain")
    _check("pretrain", result(*short("pretrain", "-r", "2,1", "--local"), *shape))
    distilled = result(*short("distill", "-r", "1,0", "-r", "0", "-r", "0,0", "--local"))
    _check("distill", distilled)
    # `0` and `0,0` are the same student.
    assert [student["schedule"] for student in distilled["students"]] == ["1,0", "0,0"]
    for student in distilled["students"]:
        assert Path(student["checkpoint"]).is_dir()
        assert student["validation_loss"] > 0
