"""Invalid input: one clear sentence, exit code 2, no traceback, no partly written files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.main import get_command

from orchestrator import cli
from orchestrator.pipelines import training
from orchestrator.settings import Settings
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError

COMMANDS = get_command(cli.build_app()).commands


def _run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(list(arguments))
    captured = capfd.readouterr()
    # Click draws a box around its messages, and breaks their lines.
    printed = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert "Traceback" not in printed
    return code, printed


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
def test_exit_codes(
    error: BaseException,
    code: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(training, "prepare", fail)
    found, printed = _run(capfd, "prepare", "--workspace", str(tmp_path))
    assert found == code
    assert (str(error) or "interrupted") in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "--set", "training.num_step=3"], "did you mean training.num_steps?"),
        (["pretrain", "--set", "training.num_steps=many"], "got 'many'"),
        (["pretrain", "--set", "training.num_steps=-1"], "greater than 0"),
        (["pretrain", "--config", "toi"], "did you mean toy?"),
        (["pretrain", "--gpus", "8"], "GPU"),
        (["pretrain", "--workers", "0"], "--workers"),
        (["pretrain", "--gpu", "8"], "--gpus"),
        (["pretrain", "training.num_steps=5"], "training.num_steps=5"),
        (["sweep-threshold", "training.num_steps=5"], "training.num_steps=5"),
        (["distill", "2,1", "my-run"], "my-run"),
        (["distill", "1"], "--schedule says how many corrections"),
        (["distill", "my-run"], "--schedule says how many corrections"),
        (["compare", "a", "b", "--json", "c.json"], "c.json"),
        (["pretrain", "-r", "1", "-r", "2"], "--schedule was given 2 times (1 and 2)"),
        (["generate", "-p", "x", "-r", "1", "-r", "2"], "--schedule was given 2 times"),
        (["evaluate", "--device", "tpu"], "a device is cpu, cuda, or cuda:N"),
        (["generate", "-p", "x", "--device", "tpu"], "a device is cpu, cuda, or cuda:N"),
        (["generate", "-p", "x", "--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["pretrain", "--device", "cuda:1"], "'cuda:1' is not one of 'cpu', 'cuda'"),
        (["pretrain", "--device", "cpu", "--gpus", "2"], "--device cpu and --gpus 2"),
        (
            ["sweep-threshold", "--device", "cpu", "--gpus-per-trial", "1"],
            "and --gpus-per-trial 1: leave",
        ),
        (["pretrain", "--lr", "0"], "training.learning_rate"),
        (["pretrain", "--dtype", "fp16"], "--dtype"),
        (["distill", "-r", "1", "--seed", "-1"], "--seed"),
        (["sweep-iterations", "-r", "x"], "'x' is not an iteration schedule"),
        (["prepare", "no-such-file.txt"], "no-such-file.txt"),
        (["pretrain", "--set", "data.files=[a.txt]"], "only source files"),
        (["sweep-threshold"], "iiet-orch pretrain"),
        (["sweep-threshold", "missing-folder"], "missing-folder"),
        (["sweep-threshold", "--thresholds", "a,b"], "sweep.thresholds"),
        (["sweep-threshold", "--thresholds", "nan"], "sweep.thresholds"),
        (["sweep-threshold", "--thresholds", "-1"], "no influence of this metric is below 0"),
        (
            ["sweep", "toy", "--set", "sweep.thresholds=[-1]"],
            "no influence of this metric is below 0",
        ),
        (["sweep-threshold", "--seeds", "4294967296"], "sweep.seeds"),
        (["sweep-iterations", "--schedule", "²"], "'²' is not an iteration schedule"),
        (["sweep-iterations", "--schedule", "9" * 5000], "is not an iteration schedule"),
        (["sweep-iterations", "--schedule", "1000000000"], "is not an iteration schedule"),
        (["sweep-iterations", "--schedule", "3*1000000000"], "is not an iteration schedule"),
        (["pretrain", "--schedule", "3*999999999"], "is for 999999999 layers"),
        (["pretrain", "--method", "looped", "--schedule", "2..0"], "repeats the whole stack"),
        (["pretrain", "--schedule", "1001"], "must be an integer from 0 to 1000"),
        (["sweep-threshold", "--search", "9" * 5000], "--search"),
        (["pretrain", "--config", "x" * 5000], "there is no settings file"),
        (["pretrain", "--config", "~no-such-user/a.yaml"], "there is no settings file"),
        (["pretrain", "--workspace", "x" * 5000], "cannot use the workspace"),
        (["evaluate", "~no-such-user/a"], "cannot use the path ~no-such-user/a"),
        (["evaluate", "x" * 5000], "File name too long"),
        (["evaluate", "--include-path", "nowhere"], "there is no folder nowhere"),
        (["pretrain", "--set", "evaluation.include_path=nowhere"], "there is no folder nowhere"),
        (["generate", "--seed", "4294967296"], "--seed"),
        (["generate", "--top-k", "99999999999999999999"], "--top-k"),
        (["benchmark", "--batch-sizes", "1,²"], "--batch-sizes"),
        (["benchmark", "--contexts", "99999999999"], "--contexts takes whole numbers from 1 to"),
        (["sweep-iterations", "--rates", "fast"], "sweep.learning_rates"),
        (["sweep-iterations", "--rates", "1e-3,-2"], "sweep.learning_rates"),
        (
            ["sweep-iterations", "--set", "sweep.learning_rates={vanila: 1}"],
            "is not a model",
        ),
        (["sweep-iterations", "--asha"], "no model has more than one; name several"),
        (["sweep-iterations", "--asha", "--seeds", "0,1"], "leave seeds out"),
        (["sweep-threshold", "--name", "../runs"], "begins with a letter or a digit"),
        (["pretrain", "--name", "a/b"], "--name 'a/b'"),
        (["pretrain", "--continue", "no-such-run"], "there is no folder no-such-run"),
        (["pretrain", "--continue", "a", "--config", "toy"], "use it without --config"),
        (["pretrain", "--profile", "-1"], "--profile"),
        (["distill", "-r", "1", "--profile", "many"], "--profile"),
        (["import", "folder", "--name", ""], "--name ''"),
        (
            ["sweep", "toy", "--set", "distillation.training.num_tokens_per_step=100"],
            "distillation.training.num_tokens_per_step must be a multiple",
        ),
        (["sweep", "toy", "--set", "sweep.budgets=[2]"], "the cheapest costs 6"),
        (["sweep", "toy", "--set", "evaluation.include_path=nowhere"], "there is no folder"),
        (["evaluate"], "iiet-orch pretrain"),
        (["evaluate", "missing-folder"], "there is no folder"),
        (["evaluate", "--limit", "0"], "--limit"),
        (["evaluate", "--batch-size", "0"], "--batch-size"),
        (["benchmark"], "iiet-orch pretrain"),
        (["benchmark", "--batch-sizes", "1,x"], "--batch-sizes"),
        (["benchmark", "--contexts", "0"], "--contexts"),
        (["benchmark", "missing-folder"], "there is no folder"),
        (["report"], "iiet-orch sweep-threshold"),
        (["report", "nothing"], "nothing"),
        (["report", "nothing", "other"], "nothing"),
        (["report", "../../outside"], "the sweep '../../outside': a name has letters"),
        (["report", "../a", "../b"], "the sweep '../a': a name has letters"),
        (["pick", "../../outside"], "the sweep '../../outside': a name has letters"),
        (["report", "--cost", "time"], "'evaluations', 'flops', 'ms', 'kv'"),
        (["report", "--quality", "f1"], "'f1' is not one of 'accuracy', 'bits'"),
        (["sweep", "nothing"], "shipped"),
        (["no-such-command"], "no-such-command"),
        (["generate", "--prompt", "x"], "iiet-orch pretrain"),
        (["generate", "--temperature", "-1"], "--temperature"),
        (["generate", "--kv", "none"], "--kv"),
        (["generate", "--prompt", "x", "--draft-tokens", "3"], "--draft-tokens 3 needs --draft"),
        (["import", "missing-folder"], "is not a model folder"),
        (["import"], "folder"),
        (["export"], "iiet-orch pretrain"),
        (["export", "missing-folder"], "missing-folder"),
        (["pick"], "iiet-orch sweep-threshold"),
        (["pick", "--knee", "--best"], "--knee and --best"),
        (["pick", "--dry-run", "--to", "there"], "--dry-run exports nothing"),
        (["pick", "--keep", "99"], "--keep"),
        (["influence", "--check"], "--check"),
        (["pick", "--knee", "--confidence", "0.5"], "--confidence can be used with --keep"),
        (["submit", "ui"], "`iiet-orch ui` does not run on a cluster"),
        (["submit", "no-such-command"], "no-such-command"),
        (["submit", "pretrain", "--gpu", "8"], "--gpus"),
        (["submit", "pretrain", "--workspace", "here"], "by an absolute path (got here)"),
        (["submit", "--name", "a/b", "pretrain"], "--name 'a/b'"),
        (["submit", "--server", "ray://a", "pretrain"], "is not an address such as"),
        (["submit", "--server", "127.0.0.1:1", "pretrain"], "takes no job"),
    ],
)
def test_a_mistake_prints_one_sentence_and_exits_with_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IIET_WORKSPACE", str(tmp_path / "space"))
    code, printed = _run(capfd, *arguments)
    assert code == 2, printed
    assert words in printed
    left = [
        path for path in (tmp_path / "space").glob("*/*") if path.parent.name in ("runs", "sweeps")
    ]
    assert not left


def test_help_shows_every_option_uncut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name, command in COMMANDS.items():
        assert cli.main([name, "--help"]) == 0
        printed = capsys.readouterr().out
        assert "…" not in printed
        assert all(len(line) <= 80 for line in printed.splitlines())
        words = set(printed.replace("/", " ").replace(",", " ").split())
        for parameter in command.params:
            for option in {*parameter.opts, *parameter.secondary_opts}:
                is_argument = parameter.param_type_name == "argument"
                shown = (parameter.metavar or option) if is_argument else option
                is_shown = bool({shown, f"{shown}..."} & words)
                assert is_shown != getattr(parameter, "hidden", False), (name, option)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "empty"), ("   \n\n ", "empty"), ("Too short to be a corpus.\n", "text")],
)
def test_an_unusable_text_is_refused(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("IIET_WORKSPACE", str(tmp_path / "space"))
    (tmp_path / "text.txt").write_text(text)
    code, printed = _run(capfd, "prepare", str(tmp_path / "text.txt"))
    assert code == 2, printed
    assert words in printed
    assert not list((tmp_path / "space" / "tokens").glob("*/manifest.json"))


def test_a_workspace_that_is_a_file_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    code, printed = _run(capfd, "prepare", "--workspace", str(tmp_path / "file"))
    assert (code, "--workspace" in printed) == (2, True)


@pytest.mark.parametrize("name", ["logs", "tokens"])
@pytest.mark.parametrize("how", ["a file", "a link to itself"])
def test_an_error_names_what_is_not_a_folder(
    name: str, how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "space" / name
    path.parent.mkdir()
    (tmp_path / "a.txt").write_text("A text.")
    if how == "a file":
        path.write_text("")
    else:
        path.symlink_to(path)
    options = ["--workspace", str(path.parent)]
    code, printed = _run(capfd, "prepare", str(tmp_path / "a.txt"), *options)
    assert code == 2, printed
    assert f"cannot use {path}" in printed


def test_an_unexpected_error_leaves_its_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("orchestrator.pipelines.training.prepare", break_down)
    code, printed = _run(capfd, "prepare", "--workspace", str(tmp_path))
    assert code == 1
    assert "the disk is on fire" in printed
    [log] = (tmp_path / "logs").glob("*.log")
    assert "Traceback" in log.read_text()
    os.fstat(2)  # standard error is back in its place


@pytest.mark.parametrize(
    ("command", "kind", "teacher"),
    [
        ("quickstart --config {file}", "iterations", None),
        ("sweep {file}", "iterations", None),
        ("sweep-threshold --config {file}", "threshold", "newest"),
        ("sweep-threshold run --config {file}", "threshold", Path("run")),
        ("sweep-threshold --search 2 --config {file}", "search", "newest"),
        ("sweep-iterations --config {file}", "iterations", None),
    ],
)
def test_a_command_runs_its_own_kind_of_sweep_or_that_of_its_file(
    command: str,
    kind: str,
    teacher: Path | str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run: list[tuple[str, Path | str | None]] = []

    def sweep(settings: Settings, *, teacher: Path | str | None = None, **_: object) -> None:
        run.append((settings.sweep.kind, teacher))
        raise UserError("that is enough")

    monkeypatch.setattr("orchestrator.pipelines.sweeps.sweep", sweep)
    file = tmp_path / "s.yaml"
    file.write_text("sweep:\n  kind: iterations\n")
    arguments = command.format(file=file).split()
    code, printed = _run(capfd, *arguments, "--workspace", str(tmp_path / "space"))
    assert (code, "that is enough" in printed) == (2, True), printed
    assert run == [(kind, teacher)]
