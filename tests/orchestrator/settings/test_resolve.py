"""Settings: sources in order, all problems at once, suggestions for misspelled names."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from refusals import refused

from orchestrator.settings import Settings, flatten, read_settings, resolve_settings, to_yaml
from orchestrator.workspace.errors import UserError


def test_later_sources_win_and_keep_the_other_defaults():
    settings = resolve_settings({"training": {"num_steps": 7, "seed": 3}}, ["training.num_steps=9"])
    assert (settings.training.num_steps, settings.training.seed) == (9, 3)
    assert settings.training.learning_rate == Settings().training.learning_rate
    options = {"training.num_steps": 9, "sweep.seeds": [0, 1], "model.corrections": "017"}
    settings = resolve_settings({}, ["training.num_steps=7"], options)
    assert settings.training.num_steps == 9
    assert settings.sweep.seeds == (0, 1)
    assert settings.model.corrections == "017", "YAML would read it as octal"
    settings = resolve_settings({}, ["distillation.training.seed=3"])
    usual = Settings().distillation.training
    assert settings.distillation.training == usual.model_copy(update={"seed": 3})
    assert usual.num_steps != Settings().training.num_steps


def test_all_problems_are_reported_at_once_with_their_values():
    tree = {"training": {"num_steps": 0, "decay": "slow"}, "data": {"vocab_size": "many"}}
    with pytest.raises(UserError, match="3 problems") as caught:
        resolve_settings(tree)
    for part in ("training.num_steps", "got 0", "training.decay", "'slow'", "'many'"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="300 problems") as caught:
        resolve_settings({"training": {f"x{number}": 1 for number in range(300)}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  - and 280 more"
    with pytest.raises(UserError, match="4 problems") as caught:
        resolve_settings({}, ["training", "model.dim=[", "a.b={", "training.num_steps=0"])
    for part in ("got 'training'", "--set model.dim", "--set a.b", "training.num_steps: "):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="3 problems") as caught:
        resolve_settings({}, ["data=7", "data.seed=1"], {"training.num_steps": 0})
    for part in ("cannot set data.seed: data is a value", "data: input", "training.num_steps: "):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("training.learning_rat=1e-3", "did you mean training.learning_rate?"),
        ("trainin={}", "did you mean training?"),
        ("sweep.budget_unit=watts", "'flops', 'kv' or 'parameters'"),
        ("sweep.budget_unit=ms", "pick --budget 5 --cost ms"),
        ("sweep.leave_out_layers=some", "settings: sweep.leave_out_layers: write a number of"),
        ("training.num_steps=on", "training.num_steps: input should be a valid integer; got True"),
        ("cluster.num_workers='3'", "valid integer; got '3'"),
        ("sweep.thresholds=[0.1, yes]", "sweep.thresholds: input should be a valid number; got Tr"),
        ("sweep.learning_rates={iiet: on}", "sweep.learning_rates: input should be a valid number"),
        ("model.corrections=yes", "model.corrections: input should be a valid integer; got True"),
        # Of a list, the wrong item is told alone.
        ("model.corrections=[2, yes]", "settings: model.corrections: input should be a valid int"),
        ("training.compile=1", "input should be a valid boolean; got 1"),
        ("training.seed=9007199254740993", "this number is too large"),
        ("training.learning_rate=.nan", "input should be a finite number; got nan"),
        ("training.num_steps=1000000000", "less than or equal to 1000000"),
        pytest.param(  # Deeper than Python calls, also where its limit is somewhat higher.
            "training.num_steps=" + "[" * 1_000, "maximum recursion depth", id="nested too deeply"
        ),
        pytest.param(
            "training.num_steps=" + "x" * 5000, "training.num_steps: input should be", id="long"
        ),
        ("training", "--set takes section.key=value"),
        ("training.num_steps.x=3", "training.num_steps: input should be"),
        ("a=[", "--set a: cannot read the value"),
    ],
)
def test_a_wrong_value_is_refused_in_a_short_message(assignment, words):
    with pytest.raises(UserError) as caught:
        resolve_settings({}, [assignment])
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_numbers_texts_and_lists_survive_yaml(tmp_path):
    path = tmp_path / "s.yaml"
    for text, number in (
        ("3e-4", 3e-4), ("1E2", 100), (".5", 0.5), ("2.", 2), ("1", 1), ("1_000.5", 1000.5),
    ):  # fmt: skip
        resolved = resolve_settings({}, [f"training.learning_rate={text}"])
        assert resolved.training.learning_rate == number
        path.write_text(to_yaml(resolved))
        assert read_settings(path) == resolved
    for text in ("1e5", "017", "089", "1:30", "2026-02-28", "no", "~", ".inf", ""):
        settings = resolve_settings({}, options={"data.text_field": text})
        path.write_text(to_yaml(settings))
        assert read_settings(path) == settings
    for text, value in (("3", 3), ("'2,2,1'", "2,2,1"), ("[2,2,1]", (2, 2, 1))):
        settings = resolve_settings({}, [f"model.corrections={text}", "sweep.thresholds=[0.1]"])
        assert settings.model.corrections == value
        path.write_text(to_yaml(settings))
        assert read_settings(path) == settings
    with pytest.raises(ValidationError):
        settings.training.num_steps = 3


def test_flatten_returns_every_leaf():
    def leaves(tree: object) -> list[object]:
        if isinstance(tree, dict) and tree:
            return [leaf for value in tree.values() for leaf in leaves(value)]
        return [tree]

    flat = flatten(Settings())
    rate = Settings().distillation.training.learning_rate
    assert flat["distillation.training.learning_rate"] == str(rate)
    assert len(flat) == len(leaves(yaml.safe_load(to_yaml(Settings()))))


def test_a_file_is_blamed_for_its_own_problems_only(tmp_path):
    path = tmp_path / "mine.yaml"
    changes: list[tuple[dict[str, Any], bool]] = [
        ({"assignments": ["sweep.num_schedules=1"]}, False),
        ({"options": {"training.learning_rate": -1}}, False),
        ({}, True),
        ({"assignments": ["training.batch_size=3"]}, False),
        ({"assignments": ["sweep.num_schedules=4"]}, True),
    ]
    for change, names_the_file in changes:
        path.write_text(f"training: {{num_steps: {-5 if names_the_file else 5}}}")
        with pytest.raises(UserError) as caught:
            read_settings(path, **change)
        assert (str(path) in str(caught.value)) == names_the_file


def test_an_empty_section_keeps_its_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("sweep:\ntraining:\n  num_steps: 5\n")
    assert read_settings(path).sweep == Settings().sweep
    assert read_settings(path, ["sweep.trials_at_once=3"]).sweep.trials_at_once == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no settings; `iiet-orch config init`"),
        ("\n# training:\n#   num_steps: 3\n", "holds no settings; `iiet-orch config init`"),
        ("training: {num_steps: 3}".encode("utf-16"), "cannot read the settings file"),
        ("a: [", "not valid YAML"),
        ("- 1", "must hold names"),
        ("training: {seed: 5}\ndata: {seed: 1}\ntraining: {}", "training appears more than once"),
        pytest.param("a: 1\n" * 1000, "a appears more than once (line 2)", id="a name twice"),
        ("a: \0", "special characters are not allowed"),
        ("a: 1\n---\na: 2", "expected a single document"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_in_a_short_message(text, words, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_settings(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    with refused(UserError, "settings file"):
        read_settings(tmp_path / "missing.yaml")
