"""Settings: sources in order, all problems at once, suggestions for misspelled names."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from orchestrator.settings import (
    Settings,
    find_field,
    flatten,
    read_settings,
    resolve_settings,
    to_yaml,
)
from orchestrator.workspace.errors import UserError


def test_later_sources_win() -> None:
    settings = resolve_settings({"training": {"num_steps": 7, "seed": 3}}, ["training.num_steps=9"])
    assert (settings.training.num_steps, settings.training.seed) == (9, 3)
    assert settings.training.learning_rate == Settings().training.learning_rate


def test_options_win_over_assignments_and_keep_their_types() -> None:
    options = {"training.num_steps": 9, "sweep.seeds": [0, 1], "model.corrections": "017"}
    settings = resolve_settings({}, ["training.num_steps=7"], options)
    assert settings.training.num_steps == 9
    assert settings.sweep.seeds == (0, 1)
    assert settings.model.corrections == "017", "YAML would read it as octal"


def test_one_setting_of_a_recipe_keeps_its_other_defaults() -> None:
    settings = resolve_settings({}, ["distillation.training.seed=3"])
    usual = Settings().distillation.training
    assert settings.distillation.training == usual.model_copy(update={"seed": 3})
    assert usual.num_steps != Settings().training.num_steps


@pytest.mark.parametrize("text", ["", "\n# training:\n#   num_steps: 3\n"])
def test_a_file_without_settings_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml holds no settings; `iiet-orch init`"):
        read_settings(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("sweep.stop_dominated=true", "asha, asha_first_rung"),
        ("distillation.warm_start=true", "teacher_until_step, teacher_cache"),
        ("sweep.budget_unit=ms", "'evaluations', 'flops' or 'kv'"),
    ],
)
def test_a_removed_setting_is_an_error_that_lists_the_known_ones(setting: str, known: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve_settings({}, [setting])
    assert known in str(refused.value)


def test_a_misspelled_name_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"did you mean training\.learning_rate\?"):
        resolve_settings({}, ["training.learning_rat=1e-3"])
    with pytest.raises(UserError, match=r"did you mean training\?"):
        resolve_settings({"trainin": {}})


def test_all_problems_are_reported_at_once_with_their_values() -> None:
    with pytest.raises(UserError) as caught:
        resolve_settings(
            {"training": {"num_steps": 0, "decay": "slow"}, "data": {"vocab_size": "many"}}
        )
    text = str(caught.value)
    assert "3 problems" in text
    for part in (
        "training.num_steps",
        "got 0",
        "training.decay",
        "'slow'",
        "data.vocab_size",
        "'many'",
    ):
        assert part in text


def test_of_many_problems_the_first_and_their_number_are_shown() -> None:
    with pytest.raises(UserError, match="3000 problems") as caught:
        resolve_settings({"training": {f"x{number}": 1 for number in range(3000)}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  - and 2980 more"


def test_broken_assignments_are_reported_with_the_other_problems() -> None:
    with pytest.raises(UserError, match="4 problems") as caught:
        resolve_settings({}, ["training", "model.dim=[", "a.b=&x [*x]", "training.num_steps=0"])
    for part in ("got 'training'", "--set model.dim", "--set a.b", "training.num_steps: "):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="3 problems") as caught:
        resolve_settings({"data": 7}, ["data.seed=1"], {"training.num_steps": 0})
    for part in ("cannot set data.seed: data is a value", "data: input", "training.num_steps: "):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("training.num_steps=on", "training.num_steps: input should be a valid integer; got True"),
        ("cluster.num_workers='3'", "valid integer; got '3'"),
        ("sweep.thresholds=[0.1, yes]", "sweep.thresholds: input should be a valid number; got Tr"),
        ("sweep.learning_rates={iiet: on}", "sweep.learning_rates: input should be a valid number"),
        ("model.corrections=yes", "model.corrections: input should be a valid integer; got True"),
        ("training.compile=1", "input should be a valid boolean; got 1"),
        ("evaluation.num_fewshot=017", "valid integer; got 17.0"),
        ("training.num_steps=1:30", "valid integer; got '1:30'"),
        ("training.num_steps=2026-02-30", "valid integer; got '2026-02-30'"),
        ("training.seed=9007199254740993", "this number is too large"),
        ("training.num_steps=18446744073709551616", "valid integer; got 1.844"),
        ("training.num_steps=!!int ''", "it holds a value that cannot be read"),
        ("training.compile=!!bool maybe", "holds a value that cannot be read ('maybe')"),
        ("training.seed=!!timestamp x", "holds a value that cannot be read"),
        ("training.learning_rate=.nan", "input should be a finite number; got nan"),
        ("training.num_steps=1000000000", "less than or equal to 1000000"),
        ("data.vocab_size=1000000000", "less than or equal to 1000000"),
        ("model.num_layers=1000000000", "less than or equal to 1000"),
        ("search.seed=4294967296", "less than or equal to 4294967295"),
        ("sweep.seeds=[-1]", "greater than or equal to 0"),
        ("evaluation.include_path=''", "at least 1 character"),
        ("training.num_steps=" + "9" * 5000, "training.num_steps: input should be"),
        ("training.num_steps=" + "[" * 5000, "nested too deeply"),
        ("training.num_steps=" + "x" * 5000, "training.num_steps: input should be"),
        ("x" * 5000 + "=1", "is not a setting"),
        ("sweep.selection=remeasured", "input should be 'threshold' or 'knapsack'"),
    ],
)
def test_a_surprising_value_is_refused_in_a_short_message(assignment: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_settings({}, [assignment])
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes("training:\n  num_steps: 3\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"cannot read the settings file .*codec can't decode"):
        read_settings(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    "assignment",
    ["training", "=3", "training.=3", "training.num_steps.x=3", "a=[", "model.dim=1.5"],
)
def test_a_bad_assignment_is_an_error(assignment: str) -> None:
    with pytest.raises(UserError, match=r"--set|not a setting|model\.dim|num_steps"):
        resolve_settings({}, [assignment])


@pytest.mark.parametrize(
    ("text", "number"),
    [("3e-4", 3e-4), ("1E2", 100), (".5", 0.5), ("2.", 2), ("1", 1), ("1_000.5", 1000.5)],
)
def test_numbers_have_the_usual_forms(text: str, number: float) -> None:
    found = resolve_settings({}, [f"training.learning_rate={text}"])
    assert found.training.learning_rate == number
    assert resolve_settings(yaml.safe_load(to_yaml(found))) == found


@pytest.mark.parametrize("text", ["1e5", "017", "089", "1:30", "2026-02-28", "no", "~", ".inf", ""])
def test_texts_that_look_like_numbers_survive_yaml(text: str, tmp_path: Path) -> None:
    settings = resolve_settings({}, options={"data.text_field": text})
    (tmp_path / "s.yaml").write_text(to_yaml(settings))
    assert read_settings(tmp_path / "s.yaml") == settings


def test_a_schedule_is_a_number_a_text_or_a_list() -> None:
    for text, value in (("3", 3), ("'2,2,1'", "2,2,1"), ("[2,2,1]", (2, 2, 1))):
        assert resolve_settings({}, [f"model.corrections={text}"]).model.corrections == value
    with pytest.raises(UserError, match=r"model\.corrections"):
        resolve_settings({}, ["model.corrections={a: 1}"])


def test_settings_are_frozen_and_survive_yaml(tmp_path: Path) -> None:
    settings = resolve_settings(
        {}, ["sweep.thresholds=[0.1, 0.01]", "model.corrections=[1,2,3,1,1,1]"]
    )
    with pytest.raises(ValidationError):
        settings.training.num_steps = 3  # type: ignore[misc]
    (tmp_path / "s.yaml").write_text(to_yaml(settings))
    assert read_settings(tmp_path / "s.yaml") == settings


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "must hold names")]
)
def test_a_file_that_is_not_a_mapping_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(path)
    with pytest.raises(UserError, match="cannot read"):
        read_settings(tmp_path / "missing.yaml")


def test_flatten_returns_every_leaf() -> None:
    flat = flatten(Settings())
    assert flat["distillation.training.learning_rate"] == str(
        Settings().distillation.training.learning_rate
    )
    assert len(flat) == sum(1 for _ in _leaves(yaml.safe_load(to_yaml(Settings()))))


def _leaves(tree: object) -> list[object]:
    if isinstance(tree, dict) and tree:
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    return [tree]


def test_every_setting_has_a_description() -> None:
    def walk(section: type) -> None:
        for name, field in section.model_fields.items():  # type: ignore[attr-defined]
            assert field.description, f"{section.__name__}.{name} has no description"
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                walk(field.annotation)

    walk(Settings)


def test_a_field_is_found_by_its_key() -> None:
    field = find_field("distillation.training.elastic.num_drawn")
    assert (field.annotation, field.default) == (int, 1)
    assert str(field.description).startswith("Members of each step")
    for key in ("num_steps", "training.steps", "training.num_steps.x", ""):
        with pytest.raises(KeyError):
            find_field(key)


def test_a_duplicate_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("training:\n  num_steps: 5\ndata:\n  seed: 1\ntraining:\n  num_steps: 7\n")
    with pytest.raises(UserError, match="training appears more than once"):
        read_settings(path)


def test_an_empty_section_keeps_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("sweep:\ntraining:\n  num_steps: 5\n")
    assert read_settings(path).sweep == Settings().sweep
    assert read_settings(path, ["sweep.trials_at_once=3"]).sweep.trials_at_once == 3


@pytest.mark.parametrize(
    ("changes", "names_the_file"),
    [
        ({"assignments": ["sweep.num_schedules=0"]}, False),
        ({"options": {"training.learning_rate": -1}}, False),
        ({}, True),
        ({"assignments": ["sweep.num_schedules=0", "training.num_steps=3"]}, False),
        ({"assignments": ["training.batch_size=3"]}, False),
        ({"assignments": ["sweep.num_schedules=4"]}, True),
    ],
)
def test_a_file_is_blamed_for_its_own_problems_only(
    tmp_path: Path, changes: dict[str, Any], names_the_file: bool
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"training: {{num_steps: {-5 if names_the_file else 5}}}")
    with pytest.raises(UserError) as caught:
        read_settings(path, **changes)
    assert (str(path) in str(caught.value)) == names_the_file


def _bomb() -> str:
    """Return nine levels of nine aliases each: 387 million values in 20 lines."""
    lines = ["a: &a [" + ", ".join("x" * 9) + "]"]
    for below, above in pairwise("abcdefghi"):
        lines.append(f"{above}: &{above} [" + ", ".join([f"*{below}"] * 9) + "]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_bomb(), "more than 1,000,000 characters with its anchors written out"),
        ("a: 1\n" * 100_000, "a appears more than once (line 1, column 1)"),
        ("a: &a [*a]", "with its anchors written out"),
        ("a: &a {<<: *a}", "with its anchors written out"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: " + "x" * 1_000_000, "more than 1,000,000 characters"),
        ("a: \0", "special characters are not allowed"),
        ("a: 1\n---\na: 2", "expected a single document"),
    ],
)
def test_a_file_beyond_a_limit_is_refused_in_a_short_message(
    text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_settings(tmp_path / "s.yaml")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000
