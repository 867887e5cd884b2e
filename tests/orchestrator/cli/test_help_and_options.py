"""Every command's help ends with an example that the command accepts; options that all share."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from inspect import signature
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from commands import all_commands, settings_options
from small_size import SMALL

from orchestrator import cli
from orchestrator.cli.command import SettingOption
from orchestrator.records.metrics import BUDGET_METRICS, METRICS, NFE, QUALITIES
from orchestrator.settings import SearchSettings, Section, Settings, SweepSettings, find_field
from orchestrator.workspace.errors import UserError

COMMANDS = all_commands()


def _setting_options(name: str) -> dict[str, tuple[Any, SettingOption]]:
    """Return the options of a command that change a setting, each with its type."""
    options = {}
    for parameter in signature(COMMANDS[name].callback).parameters.values():
        value_type, *others = get_args(parameter.annotation) or (None,)
        for option in others:
            if isinstance(option, SettingOption):
                options[f"--{parameter.name.replace('_', '-')}"] = value_type, option
    return options


def test_each_help_has_an_example_that_the_command_accepts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name, command in COMMANDS.items():
        names = name.split()
        assert cli.main([*names, "--help"]) == 0
        printed = capsys.readouterr().out
        assert "\x1b" not in printed
        [example] = [line for line in printed.splitlines() if "Example: iiet-orch " in line]
        words = shlex.split(example.partition("iiet-orch ")[2])
        assert words[: len(names)] == names
        command.make_context(names[-1], words[len(names) :])  # Exits if one is unknown.


def test_the_list_of_commands_begins_with_quickstart(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    panels = [*dict.fromkeys(re.findall(r"─ ([A-Z][A-Za-z ]+) ─", printed))]
    assert panels == [
        "Options", "Start", "Train", "Sweep", "Measure", "See results", "Use models", "Keep order",
    ]  # fmt: skip
    assert printed.index("quickstart") < printed.index("pretrain") < printed.index("clean")
    assert len({name.split()[0] for name in COMMANDS}) == 21


@pytest.fixture
def settings_of(monkeypatch) -> Callable[..., Settings]:
    """Runs a command as far as its pipeline, and returns the settings that this would get."""

    def run(*words: str) -> Settings:
        received: list[Settings] = []

        def stop(settings: Settings, *_: object, **__: object) -> None:
            received.append(settings)
            raise UserError("that is enough")

        for pipeline in ("training.plan_pretrain", "training.plan_distill"):
            monkeypatch.setattr(f"orchestrator.pipelines.{pipeline}", stop)
        # Should a command get past its plan, then it shall not train. First, because `sweeps` takes
        # the plan's function when it is imported.
        monkeypatch.setattr("orchestrator.sweeping.sweep.run_sweep", pytest.fail)
        monkeypatch.setattr("orchestrator.sweeping.stages.plan_sweep", stop)
        assert cli.main([*words]) == 2
        return received[0]

    return run


def allowed(section: type[Section], field: str) -> tuple[str, ...]:
    """Return the values that a setting may have."""
    return get_args(section.model_fields[field].annotation)


def test_options_change_their_settings(settings_of, tmp_path):
    where = ["-w", str(tmp_path)]
    for option in ("--schedule", "-r"):
        assert settings_of("pretrain", option, "2,1", *where).model.corrections in ("2,1", (2, 1))
    sweep = settings_of(
        "sweep-iterations", "-r", "0", "--schedule", "3..0", "-r", "2,1", *where
    ).sweep
    assert sweep.iterations == (0, "3..0", "2,1")
    options = ["--seed", "3", "--lr", "1e-4", "--dtype", "bf16", *where]
    for recipe in (
        settings_of("pretrain", *options).training,
        settings_of("distill", "-r", "1", *options).distillation.training,
    ):
        assert (recipe.seed, recipe.learning_rate, recipe.precision) == (3, 1e-4, "bf16")
    objectives = {f"quality/{name}" for name in allowed(SearchSettings, "objective")}
    assert objectives < set(QUALITIES.values())
    assert settings_of("sweep-threshold", "full", "--search", "5", *where).sweep.kind == "search"
    for unit in allowed(SweepSettings, "budget_unit"):
        assert METRICS[BUDGET_METRICS.get(unit, NFE)].counted_as, (
            "schedules are compared before any model is measured"
        )
    for unit in ("nfe", "evaluations"):
        sweep = settings_of(
            "sweep-threshold", "full", "--budgets", "8", "--cost", unit, *where
        ).sweep
        assert sweep.budget_unit == "evaluations"
    sweep = settings_of(
        "sweep-threshold", "full", "--budgets", "8", "--cost", "flops", *where
    ).sweep
    assert sweep.budget_unit == "flops"
    for text, value in (("4", 4), ("all", "all"), ("none", "none")):
        sweep = settings_of("sweep-threshold", "full", "--leave-out-layers", text, *where).sweep
        assert sweep.leave_out_layers == value


OTHER_NAMES = {
    "--cost": "budget_unit", "--dtype": "precision", "--gpus": "num_gpus", "--hub": "hub_name",
    "--lr": "learning_rate", "--profile": "profile_steps", "--schedules": "num_schedules",
    "--search": "num_trials", "--steps": "num_steps", "--workers": "num_workers",
}  # fmt: skip
"""Options that are not named as their settings."""


def test_an_option_has_the_name_and_the_type_of_its_setting():
    for name in COMMANDS:
        for flag, (value_type, option) in _setting_options(name).items():
            expected = OTHER_NAMES.get(flag, flag.removeprefix("--").replace("-", "_"))
            assert option.key.rpartition(".")[2] == expected, f"{name} {flag}"
            annotation = find_field(option.key).annotation
            if get_origin(annotation) is tuple:
                assert value_type == str | None, f"{name} {flag}"
            else:
                assert _plain(value_type) == _plain(annotation), f"{name} {flag}"


def _plain(annotation: Any) -> Any:
    """Return a type without None and without what is annotated."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) is Literal or not get_args(annotation):
        return annotation
    members = [member for member in get_args(annotation) if member is not type(None)]
    # A number or a word is typed as a text, which the settings read.
    return _plain(members[0]) if len(members) == 1 else str


def test_the_range_and_the_help_of_an_option_are_those_of_its_setting():
    options = {name: option for name, (_, option) in _setting_options("pretrain").items()}
    assert (options["--steps"].min, options["--steps"].max) == (1, 1_000_000)
    assert (options["--gpus"].min, options["--gpus"].max) == (0, None)
    assert options["--preset"].help == find_field("model.preset").description
    assert _setting_options("sweep-threshold")["--schedules"][1].min == 0


@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("pretrain", {"--steps": 7, "--seed": 3, "--lr": 1e-4, "--workers": 2}),
        ("distill full -r 1", {"--steps": 7, "--seed": 3, "--lr": 1e-4}),
        ("sweep-threshold full", {"--schedules": 4, "--metric": "relative", "--seeds": "3,4"}),
        ("sweep-iterations", {"--steps": 7, "--trials-at-once": 3, "--workers-per-trial": 2}),
    ],
)
def test_an_option_changes_its_own_setting_alone(command, values, settings_of, tmp_path):
    name, *words = command.split()
    where = [name, *words, "-w", str(tmp_path)]
    before = _flat(settings_of(*where))
    for option, value in values.items():
        after = _flat(settings_of(*where, option, str(value)))
        changed = {key for key in before if before[key] != after[key]}
        assert changed == {_setting_options(name)[option][1].key}


def _flat(settings: Settings) -> dict[str, Any]:
    """Return all settings by their keys."""
    sections = settings.model_dump()
    sections["distillation.training"] = sections["distillation"].pop("training")
    return {
        f"{section}.{name}": value
        for section, values in sections.items()
        if values is not None  # A section may be left out.
        for name, value in values.items()
    }


def test_the_device_of_a_training_is_an_option(settings_of, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("cluster: {num_gpus: 4, min_gpus: 2}\nsweep: {gpus_per_trial: 1}\n")
    where = ["-c", str(file), "-w", str(tmp_path)]
    for device, gpus in (("cpu", 0), ("cuda", 4)):
        settings = settings_of("pretrain", "--device", device, *where)
        assert settings.cluster.num_gpus == gpus
        assert settings.trials_use_gpus == (device == "cuda")
        assert settings.training.precision == ("bf16" if gpus else "fp32")
    assert settings_of("pretrain", "--device", "cuda", "-w", str(tmp_path)).cluster.num_gpus == 1
    assert (
        settings_of("sweep", "toy", "--device", "cuda", "-w", str(tmp_path)).cluster.num_gpus == 1
    )


def test_a_quiet_command_prints_its_result_only(tmp_path, capsys):
    command = ["prepare", "--workspace", str(tmp_path), *settings_options(SMALL, "prepare")]
    assert cli.main([*command, "--quiet"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("tokens: ")
    assert cli.main(command) == 0
    assert "found again" in capsys.readouterr().out
    assert "\x1b" not in line, "no colours in a pipe"
