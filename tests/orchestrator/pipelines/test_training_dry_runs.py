"""Dry runs of trainings, and what does not fit is refused before text is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from commands import settings_options
from local_servers import free_port
from pretended_cluster import pretended_cluster
from pretended_ray import idle_ray, train_here
from refusals import assert_names
from sample_texts import help_texts, lines_of
from small_size import SMALL

from orchestrator import cli
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import expected_tokens, prepare
from orchestrator.pipelines.training import plan_pretrain
from orchestrator.planning.estimate import Estimate
from orchestrator.settings import resolve_settings
from orchestrator.settings.files import read_settings
from orchestrator.sweeping.stages import plan_sweep
from orchestrator.sweeping.sweep import sweep
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.layout import open_workspace


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """Run a dry run and return its lines by name."""
    assert cli.main(["pretrain", "--dry-run", *arguments]) == 0
    lines: dict[str, str] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines()[1:]:
        if match := re.match(r"  (\S.*?)  +(\S.*)", line):
            name, text = match.groups()
            lines[name] = text.strip()
        elif line.strip():
            lines[name] += f" {line.strip()}"
    return lines


def test_a_dry_run_needs_no_tokens_and_no_gpus_and_writes_nothing(tmp_path, capsys, monkeypatch):
    lines = printed(capsys, "--config", "paper-340m", "-w", str(tmp_path / "ws"))
    assert not (tmp_path / "ws").exists()
    assert lines["parameters"] == "341,198,472"
    assert "assumed" in lines["vocabulary"]
    assert "15,728,640,000 in 30,000 steps of 524,288" in lines["tokens"]
    assert "256 sequences" in lines["a step"]
    assert_names(lines["a step"], "32 for each worker", "4 passes", "at most 8")
    assert "15 to 25% of 989 TFLOP/s" in lines["training time"]
    assert "H100" in lines["training time"]
    assert [name for name in lines if "time" in name] == ["training time"], "one range"
    assert "no GPU" in lines["on this machine"]
    assert lines["on an H100"] == "it fits"
    slow = printed(capsys, "--config", "paper-340m", "--mfu", "0.15", "-w", str(tmp_path / "ws"))
    training = [re.findall(r"[\d.]+", text["training time"])[:2] for text in (lines, slow)]
    (_, longest), (only, _) = training
    assert longest == only
    monkeypatch.setenv("COLUMNS", "80")
    words = ["pretrain", "--dry-run", "--config", "paper-340m"]
    assert cli.main([*words, "-w", str(tmp_path)]) == 0
    assert re.search(r"\n  parameters {2,24}341", capsys.readouterr().out), "room for the texts"


def test_a_dry_run_says_that_no_cluster_answers(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    for plan in (plan_pretrain, plan_sweep):
        settings = read_settings("toy", [f"cluster.address={address}", "cluster.num_gpus=8"])
        (place, problem), *_ = plan(settings, workspace=tmp_path).problems.items()
        assert address in place
        assert f"no Ray cluster answers at {address}" in str(problem)
    assert plan_pretrain(settings, workspace=tmp_path, local=True).problems["this machine"]


@pytest.mark.long
def test_a_dry_run_asks_the_cluster_for_its_gpus(tmp_path):
    with pretended_cluster() as environment:
        for num_gpus, fits in ((2, True), (8, False)):
            words = ["pretrain", "--dry-run", "--json", "--gpus", str(num_gpus), "-w", "space"]
            done = subprocess.run(
                [sys.executable, "-m", "orchestrator.cli", *words],
                env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            (place, problem), *_ = json.loads(done.stdout)["problems"].items()
            assert environment["RAY_ADDRESS"] in place
            assert (problem is None) is fits
            if not fits:
                assert_names(problem, "cluster.num_gpus=8", "4 CPUs and 2 GPUs")
    assert not (tmp_path / "space").exists()


SEVEN_BILLION = (
    "model.num_layers=32", "model.dim=4096", "model.ffn_dim=11008", "model.num_heads=32",
    "model.tie_embeddings=false", "model.context_length=4096", "training.num_steps=238000",
    "training.num_tokens_per_step=4194304",
)  # fmt: skip
LEAN = ("training.activation_checkpointing=true", "training.num_sequences_per_pass=2")


@pytest.mark.parametrize(
    ("changes", "fits"), [((), False), (LEAN, False), ((*LEAN, "cluster.parallel=fsdp"), True)]
)
def test_a_dry_run_of_seven_billion_parameters_on_256_gpus_says_what_does_not_fit(
    changes, fits, tmp_path, capsys, monkeypatch
):
    # A machine with a GPU would plan for that one.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = [part for value in (*SEVEN_BILLION, *changes) for part in ("--set", value)]
    words = ["pretrain", "--dry-run", "--json", "--config", "paper-340m", "--gpus", "256"]
    assert cli.main([*words, *options, "-w", str(tmp_path)]) == 0
    plan = json.loads(capsys.readouterr().out)
    price = plan["price"]
    assert price["num_devices"] == 256
    assert price["num_tokens"] == 238_000 * 4_194_304
    memory = price["memory"]
    assert (sum(memory.values()) < 79 * 2**30) is fits
    problem = plan["problems"]["an H100"]
    assert (problem is None) is fits
    if problem:
        missing = set(LEAN) - set(changes)
        remedies = {name.partition("=")[0] for name in missing} | {"cluster.parallel=fsdp"}
        assert all(name in problem for name in remedies)
    assert "cluster.num_gpus=256" in plan["problems"]["this machine"], "there are none here"


def test_prepared_tokens_replace_assumptions(tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    rows = [
        {"text": f"A sentence about the number {n} and its square {n * n}."} for n in range(300)
    ]
    text.write_text("\n".join(map(json.dumps, rows)))
    chosen = [f"data.files=[{text}]", "data.source=files", "data.vocab_size=300"]
    options = [part for value in chosen for part in ("--set", value)]
    before = printed(capsys, *options, "-w", str(tmp_path))
    assert "may give fewer" in before["vocabulary"]
    assert "epochs" not in before["tokens"]
    assert "tokens " in before["disk"]
    assert "not prepared" in before["state"]
    folder = prepare(resolve_settings({}, chosen).data, open_workspace(tmp_path))
    os.utime(text, (0, 0))  # Copying a file may change its time.
    assert (
        "`iiet-orch prepare` does only that"
        in printed(capsys, *options, "-w", str(tmp_path))["state"]
    )
    assert prepare(resolve_settings({}, chosen).data, open_workspace(tmp_path)) == folder
    after = printed(capsys, *options, "-w", str(tmp_path))
    assert "prepared tokens" in after["vocabulary"]
    assert "epochs" in after["tokens"]
    assert "tokens " not in after["disk"]
    assert after["state"] == "not begun"


def test_a_run_that_does_not_fit_is_refused_before_text_is_read(tmp_path, capsys, monkeypatch):
    def refused(*words: str) -> str:
        assert cli.main(["pretrain", "-w", str(tmp_path), *words]) == 2
        return capsys.readouterr().err

    assert "2048" in refused("--preset", "1.3b", "--dry-run")
    assert "3 workers" in refused("--workers", "3", "--dry-run")
    for wrong in ("256", "1", "a", "96"):  # The context has 128 tokens, a step 1024.
        for dry_run in ([], ["--dry-run"]):
            error = refused("--set", f"training.sequence_length={wrong}", *dry_run)
            assert "training.sequence_length" in error
    for memory, disk, words in ((2**30, 2**50, "GiB free"), (2**50, 2**20, "--workspace")):
        free = SimpleNamespace(available=memory)
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, d=disk: SimpleNamespace(free=d))
        options = ["--preset", "55m", "--set", "training.num_tokens_per_step=65536"]
        error = refused(*options)
        assert words in error
        assert "take a smaller model" in error or "--workspace" in error
    assert not (tmp_path / "tokens").exists()


@pytest.mark.slow
def test_students_that_do_not_fit_are_refused_before_their_teacher_is_trained(
    tmp_path, monkeypatch
):
    def never(_: object) -> None:
        raise AssertionError("the teacher is trained")

    text = tmp_path / "text.jsonl"
    text.write_text(lines_of(help_texts(120)))
    settings = resolve_settings(
        {},
        [
            "data.source=files", f"data.files=[{text}]", "data.vocab_size=300",
            "model={num_layers: 2, dim: 16, num_heads: 2, ffn_dim: 32, context_length: 64}",
            "training={num_steps: 10, num_tokens_per_step: 64, num_validation_tokens: 64}",
            "distillation.training={num_steps: 10, num_tokens_per_step: 64}",
            "sweep.num_schedules=5",
        ],
    )  # fmt: skip
    idle_ray(monkeypatch)
    train_here(monkeypatch, never)
    config = settings.model.build(vocab_size=300)
    new_tokens = expected_tokens(settings.data, None).new_bytes
    checkpoint = Estimate(config=config, recipe=settings.training).checkpoint_bytes
    # Three models are pretrained, and at most five students follow.
    for num_checkpoints, error, words in (
        (8, RunFailed, "the teacher is trained"),
        (7.5, UserError, "the run would write about"),
    ):
        usage = SimpleNamespace(free=int(num_checkpoints * checkpoint) + new_tokens)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, disk=usage: disk)
        with pytest.raises(error, match=words):
            sweep(settings, workspace=tmp_path / f"with room for {num_checkpoints}")


def test_a_dry_run_explains_rates_the_first_stage_and_how_often_the_text_is_read(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(lines_of(help_texts(40)))

    def notes(*changes: str) -> str:
        settings = resolve_settings(
            {},
            [
                "data.source=files", f"data.files=[{text}]", "data.vocab_size=300",
                "model={num_layers: 2, dim: 16, num_heads: 2, ffn_dim: 32, context_length: 64}",
                "training={num_steps: 10, num_tokens_per_step: 64}", *changes,
            ],
        )  # fmt: skip
        return "\n".join(plan_sweep(settings, workspace=tmp_path / "workspace").notes)

    lines = notes()
    assert "vanilla has learning rate 0.004, its default in sweep.learning_rates" in lines
    assert "no corrections before step 6 of 10 (training.iterate_from_fraction): teacher" in lines
    assert "times" not in lines, "nobody knows how many tokens the text has"
    lines = notes("sweep.learning_rates={vanilla: 0.003}", "training.iterate_from_fraction=0")
    assert "vanilla has learning rate" not in lines
    assert "step" not in lines

    lines = notes("sweep.teachers=[r = 1]", "sweep.seeds=[0, 1]")
    assert "4 models asked for" in lines, "seeds do not count"

    chosen = ["data.source=files", f"data.files=[{text}]", "data.vocab_size=300"]
    tokens = prepare(resolve_settings({}, chosen).data, open_workspace(tmp_path / "workspace"))
    num_tokens = len(open_data(tokens).train)
    expected = f"10 steps of 64 tokens read the {num_tokens:,} tokens of the text"
    assert f"{expected} {640 / num_tokens:.2g} times" in notes()


@pytest.mark.parametrize("kind", ["threshold", "iterations"])
def test_text_too_poor_for_its_tasks_ends_a_sweep_before_training(kind, tmp_path, capfd):
    text = tmp_path / "codes.txt"
    workspace = tmp_path / "workspace"
    text.write_text("<|endoftext|>".join(f"{i} " + f"0x{i:02x}; " * 40 for i in range(1, 60)))
    settings = [*SMALL, "data.source=files", f"data.files=[{text}]", f"sweep.kind={kind}"]
    changes = settings_options(settings, "sweep", kind)
    assert cli.main(["sweep", "toy", *changes, "--workspace", str(workspace)]) == 2
    printed = " ".join(capfd.readouterr().err.split())
    assert "no test items" in printed
    assert "Traceback" not in printed
    assert not [*workspace.glob("runs/*/*"), *workspace.glob("trials/*/*")]
