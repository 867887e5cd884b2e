"""What the `config` commands print and write is read back as the same settings."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from commands import all_commands
from file_modes import only_readable

from orchestrator import cli
from orchestrator.cli.session import is_read
from orchestrator.cli.train import READ_BY_KIND
from orchestrator.settings import Settings, find_field, read_settings
from orchestrator.settings.files import marked_yaml, shipped_sweeps, starting_settings
from orchestrator.settings.schema import fields_of


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("Some text.")
    (tmp_path / "text" / "b.pdf").touch()
    return tmp_path


def _printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert cli.main([*words]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_show_marks_what_differs_from_the_defaults_and_the_schema_describes_all(tmp_path, capsys):
    printed = _printed(capsys, "config", "show", "demo", "--set", "training.seed=7")
    assert "  seed: 7  # default: 0\n" in printed
    assert "  method: iiet\n" in printed
    (tmp_path / "shown.yaml").write_text(printed)
    assert read_settings(tmp_path / "shown.yaml") == read_settings("demo", ["training.seed=7"])
    assert "default:" not in _printed(capsys, "config", "show")
    options = ("--changed", "--set", "training.elastic.num_drawn=2")
    changed = _printed(capsys, "config", "show", *options)
    assert "  elastic:  # default: null\n    num_drawn: 2  # default: 1\n" in changed
    assert "weight" not in changed, "a section that is off has the defaults of its own settings"
    changed = _printed(capsys, "config", "show", "--changed", "--set", "training.elastic={}")
    assert changed == "training:\n  elastic: {}  # default: null\n"
    options = ("--changed", "--json", "--set", "source_training.num_steps=9")
    changed = _printed(capsys, "config", "show", *options)
    assert json.loads(changed)["settings"] == {"source_training": {"num_steps": 9}}
    schema = json.loads(_printed(capsys, "config", "schema"))
    assert set(schema["properties"]) == set(Settings.model_fields)
    assert schema["$defs"]["InfluenceSettings"]["properties"]["metric"]["description"]


def test_what_is_shown_is_valid_and_the_same(tmp_path):
    for name in shipped_sweeps():
        settings = read_settings(name, ['evaluation.system_instruction="a: b\\n#c"'])
        for only_changed in (True, False):
            (tmp_path / "a.yaml").write_text(marked_yaml(settings, only_changed=only_changed))
            assert read_settings(tmp_path / "a.yaml") == settings, name


def test_shipped_sweeps_are_listed_and_copied(tmp_path, capsys):
    listed = _printed(capsys, "config", "list")
    assert all(name in listed for name in shipped_sweeps())
    _printed(capsys, "config", "init", "--from", "depth")
    assert read_settings(tmp_path / "depth.yaml") == read_settings("depth")
    assert "--force" in _printed(capsys, "config", "init", "--from", "depth", code=2)
    _printed(capsys, "config", "init", "--from", "toy", "depth.yaml", "--force")
    assert read_settings(tmp_path / "depth.yaml") == read_settings("toy")
    assert "depth" in _printed(capsys, "config", "init", "--from", "depht", code=2)


def test_a_file_with_the_name_of_a_shipped_sweep_is_used_and_said(tmp_path, capsys):
    (tmp_path / "depth").write_text("training: {num_steps: 3}")
    assert cli.main(["config", "show", "depth"]) == 0
    captured = capsys.readouterr()
    assert "num_steps: 3 " in captured.out
    assert f"settings: the file {tmp_path / 'depth'}, not the shipped sweep depth" in captured.err
    _printed(capsys, "config", "init", "--from", "depth")
    assert read_settings(tmp_path / "depth.yaml") == read_settings(shipped_sweeps()["depth"])


@pytest.mark.parametrize("size", ["tiny", "55m", "340m"])
def test_init_writes_a_valid_commented_file(size, tmp_path, capsys):
    options = ["--data", "text", "--size", size, "--steps", "2000", "--gpus", "1"]
    printed = _printed(capsys, "config", "init", "mine.yaml", *options)
    assert "next: iiet-orch sweep mine.yaml --dry-run" in printed
    assert "1 other file is not read (.pdf 1)" in printed
    settings = read_settings(tmp_path / "mine.yaml")
    assert (settings.data.source, settings.data.files) == ("files", ("text",))
    assert (settings.model.preset, settings.training.num_steps) == (size, 2000)
    assert settings.cluster.num_gpus == 1
    expected = starting_settings(
        size,
        {
            "data.source": "files", "data.files": ["text"], "training.num_steps": 2000,
            "cluster.num_gpus": 1, "data.validation_fraction": 0.2,  # The text is small.
        },
    )  # fmt: skip
    assert settings == expected, "the file says what was asked for"
    text = (tmp_path / "mine.yaml").read_text()
    assert "# Peak learning rate" in text
    tree = yaml.safe_load(text)
    assert "hub_name" not in tree["data"]
    assert tree["sweep"]["kind"] == "threshold"


def test_a_mistake_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    before = sorted(tmp_path.rglob("*"))
    for words, phrase in (
        (["config", "init"], "--data PATH"),
        (["config", "init", "--data", "nowhere"], "nowhere"),
        (["config", "init", "--data", "binary.txt"], "binary.txt: this is not UTF-8 text"),
        (["config", "init", "--data", "text", "--hub", "a/b"], "leave all but one out"),
        (["config", "init", "--data", "text", "--size", "9m"], "--size"),
        (["config", "init", "--data", "text", "--tokenizer", "text/a.txt"], "is not a tokenizer"),
        (["config", "init", "text", "--data", "text"], "exists"),
        (["config", "show", "nothing"], "there is no settings file"),
        (["config", "show", "--set", "training.num_step=1"], "did you mean training.num_steps"),
    ):
        assert phrase in " ".join(_printed(capsys, *words, code=2).split())
    with only_readable(tmp_path / "text"):
        refused = _printed(capsys, "config", "init", "text/x.yaml", "--from", "toy", code=2)
    assert "text/x.yaml (Permission denied)" in refused
    typed = io.StringIO("nowhere\n")
    typed.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", typed)
    assert "'nowhere'" in _printed(capsys, "config", "init", code=2)
    assert sorted(tmp_path.rglob("*")) == before


KEYS = {f"{section}.{name}" for section in Settings.model_fields for name in fields_of([section])}
"""All settings."""
READS = {name: command.callback.reads for name, command in all_commands().items()}
READS |= READ_BY_KIND
"""What commands read, or sweeps of a kind."""


def _read(name: str) -> set[str]:
    return {key for key in KEYS if is_read(key, READS[name])}


def _of(*sections: str) -> set[str]:
    """Return the settings of some sections."""
    return {key for key in KEYS if key.partition(".")[0] in sections}


def test_what_a_command_reads_are_settings():
    for name, reads in READS.items():
        for part in reads:
            assert part in Settings.model_fields or find_field(part), name


def test_a_command_that_does_the_work_of_others_reads_what_they_read():
    """Where the work is done, the section `cluster`, is left to the next test."""
    pretrain = _read("pretrain")
    influence = _read("influence")
    evaluate = _read("evaluate")
    sweep = _of("sweep")
    students = _read("distill") | influence | evaluate | sweep
    measured_before = {"influence.num_tokens", "influence.one_at_a_time"}
    works = {
        "inspect": pretrain | influence - measured_before,
        "export": influence - measured_before | evaluate,
        "sweep-threshold": students | _of("search"),
        "sweep-iterations": pretrain | evaluate | sweep,
        "threshold": pretrain | students | _of("source_training"),
        "search": pretrain | students | _of("source_training", "search"),
        "iterations": pretrain | evaluate | sweep,
    }
    for name, keys in works.items():
        assert _read(name) - _of("cluster") == keys - _of("cluster"), name
    for name in ("sweep", "quickstart", "config show"):  # The former two then ask the kind.
        assert _read(name) == KEYS
    for name in ("prepare", "pretrain", "distill", "inspect", "influence", "evaluate", "export"):
        assert not _read(name) & _of("sweep", "search", "source_training"), name


def test_trainings_have_workers_and_only_what_measures_chooses_its_device():
    anywhere = {"cluster.address", "cluster.env"}
    measuring = {*anywhere, "cluster.num_gpus", "cluster.device"}
    training = _of("cluster") - {"cluster.device"}
    assert _read("prepare") & _of("cluster") == anywhere
    for name in ("influence", "evaluate", "export"):
        assert _read(name) & _of("cluster") == measuring, name
    trainings = ("pretrain", "distill", "sweep-threshold", "sweep-iterations", "inspect")
    for name in (*trainings, *READ_BY_KIND):
        assert _read(name) & _of("cluster") == training, name


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("distill run -r 1", ["model.num_layers=3", "training.num_steps=7"]),
        ("distill run -r 1", ["cluster.device=cpu"]),
        ("distill run -r 1", ["influence.metric=loss"]),
        ("evaluate run", ["model={corrections: 1}"]),
        ("evaluate run", ["data.vocab_size=300"]),
        ("export run", ["influence.num_tokens=64"]),
        ("export run --no-measure", ["evaluation.limit=3", "cluster.device=cpu"]),
        ("influence run", ["cluster={num_gpus: 1, num_shards: 2}"]),
        ("prepare", ["model.dim=8", "evaluation.limit=3"]),
        ("pretrain", ["sweep.seeds=[1]"]),
        ("sweep-iterations", ["distillation.kl_weight=2"]),
        ("sweep-threshold run", ["training.seed=1"]),
        ("sweep-threshold run", ["search.seed=1"]),
        ("sweep toy", ["search.seed=1"]),
        ("sweep iterations", ["influence.metric=loss"]),
        ("quickstart", ["search.seed=1"]),
    ],
)
def test_a_setting_that_a_command_does_not_read_is_refused(words, changes, capsys):
    options = [f"--set={change}" for change in changes]
    command = words.split()[0]
    printed = _printed(capsys, *words.split(), *options, "--workspace", "space", code=2)
    for change in changes:
        assert f"--set {change.partition('=')[0]}" in printed
    assert f"{command} " in printed or "a sweep of kind " in printed
    assert not Path("space").exists()


def test_an_option_of_such_a_setting_is_refused_as_well(capsys):
    words = "export run --no-measure --device cpu --workspace space"
    printed = _printed(capsys, *words.split(), code=2)
    assert "--device (cluster.device): export --no-measure" in printed
    assert not Path("space").exists()


def test_what_is_no_setting_is_refused_with_the_nearest(capsys):
    printed = _printed(capsys, "evaluate", "run", "--set=evaluation.limt=3", "-w", "space", code=2)
    assert "evaluation.limit" in printed
    assert "training" in _printed(capsys, "pretrain", "--set=trainin.seed=3", code=2)


def test_a_file_may_have_what_a_command_does_not_read(tmp_path, capsys):
    (tmp_path / "all.yaml").write_text(
        "data: {source: files, files: [text/a.txt]}\nsearch: {seed: 1}\nmodel: {num_layers: 3}\n"
    )
    words = ["prepare", "--config", "all.yaml", "--workspace", "space"]
    printed = _printed(capsys, *words, code=2)  # There is too little text.
    assert "does not read" not in printed


def test_settings_are_shown_as_json(capsys):
    printed = json.loads(_printed(capsys, "config", "show", "demo", "--json"))["settings"]
    assert Settings.model_validate_json(json.dumps(printed)) == read_settings("demo")
    words = ["config", "show", "--changed", "--json", "--set", "training.elastic.num_drawn=2"]
    changed = json.loads(_printed(capsys, *words, "--set", "sweep.seeds=[3]"))
    assert changed["settings"]["sweep"] == {"seeds": [3]}
    assert changed["settings"]["training"]["elastic"]["num_drawn"] == 2
    assert {*changed["settings"]} == {"training", "sweep"}
