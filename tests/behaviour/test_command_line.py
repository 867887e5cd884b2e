"""The program as its users meet it: mistakes, exit codes, completion, colours.

Invalid input gives one clear sentence, exit code 2, no traceback, and no partly written files.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from documented import ROOT
from terminal import run_in_terminal
from tokenizers import Tokenizer

import iiet
from orchestrator import cli
from orchestrator.settings import Settings
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.layout import open_workspace

FILES = {
    "a.txt": "A text.\n",
    "empty.txt": "  \n\n ",
    "s.yaml": "sweep:\n  kind: iterations\n",
    "plain/logs": "",
}
"""Files that lie where each command runs, beside `loop/logs`, a link to itself."""

MISTAKES = {
    # Settings
    "pretrain --set training.num_step=3": "did you mean training.num_steps?",
    "pretrain --set training.num_steps=many": "got 'many'",
    "pretrain --set training.num_steps=-1": "greater than 0",
    "pretrain --set data.files=[a.txt]": "only data.source=files",
    "sweep toy --set evaluation.suite=a --set evaluation.include_path=nowhere":
        "there is no folder nowhere",
    "pretrain --config toi": "did you mean toy?",
    "pretrain --config ~no-such-user/a.yaml": "there is no settings file",
    "sweep nothing": "shipped",
    "sweep toy --set sweep.thresholds=[-1]": "no influence by influence.metric=cosine is below 0",
    "sweep toy --set distillation.training.num_tokens_per_step=100":
        "distillation.training.num_tokens_per_step must be a multiple",
    "sweep toy --set distillation.training.sequence_length=4096":
        "distillation.training.sequence_length=4096",
    "sweep toy --set evaluation.sequence_length=4096": "evaluation.sequence_length=4096",
    # Options and arguments
    "no-such-command": "no-such-command",
    "pretrain --gpu 8": "Invalid value for '--gpu': '8' is not one of 'A100-40GB'",
    "pretrain training.num_steps=5": "training.num_steps=5",
    "distill 1": "--schedule says how many corrections",
    "pretrain -r 1 -r 2": "--schedule was given 2 times (1 and 2)",
    "pretrain --workers 0": "--workers",
    "pretrain --method vanilla -r 2": "--schedule 2 is read by no method of: vanilla",
    "prepare a.txt --set data.source=python": "data.source=python and FILES name different sources",
    "pretrain --name a/b": "--name 'a/b'",
    "pretrain --continue a --config toy": "use it without --config",
    "generate --temperature -1": "--temperature",
    "generate --prompt x --top-k 5 --seed 3": "add a --temperature above 0",
    "evaluate --limit 0": "--limit",
    "sweep-threshold --name ../runs": "begins with a letter or a digit",
    "report --cost time": "for '--cost': 'time' is not one of 'nfe', 'flops', 'ms', 'kv'",
    "pick --knee --best": "--knee and --best",
    "pick --dry-run --to there": "--dry-run exports nothing",
    # Schedules, thresholds, rates and seeds
    "sweep-iterations -r y": "'y' is not an iteration schedule",
    "sweep-iterations -r x": "keeps at least one layer",
    "pretrain -r x,0*5": "model.corrections",
    "pretrain --method looped -r 2..0": "repeats the whole stack",
    "sweep-threshold --thresholds a,b": "sweep.thresholds",
    "sweep-iterations --rates fast": "sweep.learning_rates",
    "sweep-iterations --rates -1": "settings: sweep.learning_rates: input should be greater than 0",
    "sweep-iterations --methods foo": "settings: sweep.methods: input should be 'vanilla',",
    "sweep-iterations --methods vanilla -r 2": "--schedule 2 is read by no method of: vanilla",
    "sweep-threshold --thresholds 0.1 --schedules 3": "--schedules and --thresholds exclude each",
    "sweep-iterations --asha": "no model has more than one; name several",
    # Devices
    "pretrain --gpus 8": "GPU",
    "pretrain --device cuda:1": "'cuda:1' is not one of 'cpu', 'cuda'",
    "sweep-threshold --device cpu --gpus-per-trial 1": "and --gpus-per-trial 1: leave",
    "evaluate --device tpu": "a device is cpu, cuda, or cuda:N",
    "generate -p x --device cuda:99": "--device cuda:99: this machine has",
    # What is missing or elsewhere
    "prepare no-such-file.txt": "no-such-file.txt",
    "prepare empty.txt": "empty",
    "prepare a.txt": "text",
    "prepare a.txt -w plain": "cannot use {here}/plain/logs",
    "prepare a.txt -w loop": "cannot use {here}/loop/logs",
    "pretrain --continue no-such-run": "there is no folder no-such-run",
    "sweep-threshold": "iiet-orch pretrain",
    "sweep-threshold missing-folder": "missing-folder",
    "evaluate": "iiet-orch pretrain",
    "evaluate missing-folder": "there is no folder",
    "import missing-folder": "is not a model folder",
    "report": "iiet-orch sweep-threshold",
    "ui --replace": "--replace is for --sync",
    "report ../../outside": "the sweep '../../outside': a name has letters",
}  # fmt: skip
"""Arguments of `iiet-orch` -> words of the sentence that it prints."""


def _run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(list(arguments))
    captured = capfd.readouterr()
    # Click draws a box around its messages, and breaks their lines.
    return code, " ".join((captured.out + captured.err).replace("│", " ").split())


def test_a_mistake_prints_one_sentence_and_exits_with_2(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IIET_WORKSPACE", str(tmp_path / "space"))
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "logs").symlink_to(tmp_path / "loop" / "logs")
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    problems = []
    for command, words in MISTAKES.items():
        code, printed = _run(capfd, *shlex.split(command))
        expected_words = words.format(here=tmp_path) if "{here}" in words else words
        if code != 2 or expected_words not in printed or "Traceback" in printed:
            problems.append(f"{command[:80]} ended with {code}: {printed[:400]}")
    assert not problems, "\n".join(problems)
    # Logs and locks stay. Hidden folders have texts that were begun, and are used again.
    space = tmp_path / "space"
    assert {path.parent.name for path in space.glob("*/[!.]*")} <= {"logs", "tokens"}
    assert {path.suffix for path in space.glob("tokens/[!.]*/*")} <= {".lock"}
    assert [path.name for path in space.glob("tokens/[!.]*")] == ["sources"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (Interrupted("saved at step 4"), 130),
        (RunFailed("it diverged"), 1),
        (ZeroDivisionError("a fault"), 1),
        (UserError("no such model"), 2),
    ],
)
def test_exit_codes(error, code, tmp_path, capfd, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Tokenizer, "train_from_iterator", fail)  # In the midst of the work.
    open_workspace(tmp_path)  # A mistake would leave nothing of a new one.
    (tmp_path / "a.txt").write_text(FILES["a.txt"] * 9)
    data = f"data={{source: files, files: [{tmp_path / 'a.txt'}]}}"
    exit_code, printed = _run(capfd, "prepare", "--workspace", str(tmp_path), "--set", data)
    assert exit_code == code
    assert (str(error) or "interrupted") in printed
    assert "resume" not in printed, "a command without state to resume from promises none"
    assert "Traceback" not in printed
    [log] = (tmp_path / "logs").glob("*.log")
    assert ("Traceback" in log.read_text()) == isinstance(error, ZeroDivisionError)
    os.fstat(2)  # Standard error is back in its place.


@pytest.mark.parametrize(
    ("command", "kind", "teacher"),
    [
        ("quickstart --config s.yaml", "iterations", None),
        ("sweep s.yaml", "iterations", None),
        ("sweep-threshold --config s.yaml", "threshold", Path("newest")),
        ("sweep-threshold run --config s.yaml", "threshold", Path("run")),
        ("sweep-threshold --schedules 3 --config s.yaml", "threshold", Path("newest")),
        ("sweep-threshold --search 2 --config s.yaml", "search", Path("newest")),
        ("sweep-iterations --config s.yaml", "iterations", None),
    ],
)
def test_a_command_runs_its_own_kind_of_sweep_or_that_of_its_file(
    command, kind, teacher, tmp_path, monkeypatch, capfd
):
    run: list[tuple[str, Path | None, str | None]] = []

    def sweep(settings: Settings, *, teacher: Path | None, name: str | None, **_: object) -> None:
        run.append((settings.sweep.kind, teacher, name))
        raise UserError("that is enough")

    monkeypatch.setattr("orchestrator.sweeping.stages.plan_sweep", sweep)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(FILES["s.yaml"])
    code, printed = _run(capfd, *command.split(), "--workspace", str(tmp_path / "space"))
    assert (code, "that is enough" in printed) == (2, True), printed
    assert run == [(kind, teacher, None)]


def test_there_is_one_version(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"iiet-orch {project['version']}\n"
    assert iiet.__version__ == project["version"]


def test_a_shell_completes_names_of_commands_options_runs_and_sweeps(monkeypatch, capsys, tmp_path):
    for folder in ("runs/my-run/step_00000005", "runs/other/step_00000001", "runs/empty",
                   "sweeps/narrow", "sweeps/wide"):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("IIET_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("_IIET_ORCH_COMPLETE", "complete_bash")
    for typed, offered in {
        "swe": {"sweep-threshold", "sweep-iterations", "sweep"},
        "pretrain --continu": {"--continue"},
        "export --dtype ": {"fp32", "bf16", "fp16"},
        "influence ": {"empty", "my-run", "other"},
        "evaluate my-run o": {"other"},
        "generate my-run/": {"my-run/step_00000005"},
        "report wide ": {"narrow", "wide"},
        "pick --workspace nowhere ": set(),
    }.items():
        monkeypatch.setenv("COMP_WORDS", f"iiet-orch {typed}")
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" "))))
        cli.main([])
        assert set(capsys.readouterr().out.split()) == offered, typed
    # zsh hands the line over in another variable.
    monkeypatch.delenv("COMP_WORDS")
    monkeypatch.setenv("_IIET_ORCH_COMPLETE", "complete_zsh")
    for typed, offered_option in {
        "pretrain --continu": "--continue",
        "config show --chan": "--changed",
    }.items():
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"iiet-orch {typed}")
        cli.main([])
        assert f'"{offered_option}"' in capsys.readouterr().out, typed


PROGRAM = """
import json, sys
from orchestrator.cli import main
for words in json.loads(sys.argv[1]):
    main(words)
"""
PRINTED = (
    ["--help"], ["pretrain", "--no-such-option"], ["config", "list"], ["list", "running"],
    ["sweep", "demo", "--dry-run"],
)  # fmt: skip
COLOR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[0-9;]*)?m")


@pytest.mark.slow
def test_a_pipe_gets_no_escape_sequence_and_a_terminal_colors_where_they_are_wanted(tmp_path):
    Path(os.environ["IIET_WORKSPACE"]).mkdir()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}

    def program(*commands: list[str]) -> list[str]:
        return [sys.executable, "-c", PROGRAM, json.dumps(commands)]

    done = subprocess.run(program(*PRINTED), capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0
    assert b"no-such-option" in done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    help_of = ["sweep-threshold", "--help"]
    mistake = ["pretrain", "--no-such-option"]
    _, printed = run_in_terminal(program(help_of), tmp_path, environment)
    assert COLOR.search(printed)
    without_color = {**environment, "NO_COLOR": "1"}
    _, printed = run_in_terminal(program(help_of, mistake), tmp_path, without_color)
    assert "threshold" in printed
    assert not COLOR.search(printed)
