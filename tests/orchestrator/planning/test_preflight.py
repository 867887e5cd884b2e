"""`pretrain --dry-run` says what a run takes and starts nothing; too large runs end before they
begin."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from iiet.config import ModelConfig
from orchestrator import cli
from orchestrator.data.preparation import prepare
from orchestrator.pipelines import sweeps as procedure
from orchestrator.pipelines.context import Desk
from orchestrator.planning.fit import ResourceRequest, check_fit
from orchestrator.planning.preflight import (
    assign_trial_gpus,
    check_jobs_fit,
    check_trials_fit,
    request_of,
)
from orchestrator.planning.resources import FreeBytes, Resources, local_free_bytes
from orchestrator.settings import (
    ClusterSettings,
    Settings,
    SweepSettings,
    TrainingSettings,
    read_settings,
    resolve_settings,
)
from orchestrator.settings.shipped import shipped_sweeps
from orchestrator.sweeping.models import models_of, teacher_and_baselines, with_model
from orchestrator.sweeping.trials import SweepPlan
from orchestrator.terminal.progress import Progress
from orchestrator.training.job import TrainingJob
from orchestrator.training.model_config import build_model_config
from orchestrator.training.peak_flops import ASSUMED_GPU_BYTES, gpu_peak_flops, measure_cpu_flops
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import open_workspace


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


def test_a_dry_run_needs_neither_tokens_nor_gpus_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    lines = printed(capsys, "--config", "paper-340m", "-w", str(tmp_path / "ws"))
    assert not (tmp_path / "ws").exists()
    assert lines["parameters"] == "341,198,472"
    assert "assumed" in lines["vocabulary"]
    assert "15,728,640,000 in 30,000 steps of 524,288" in lines["tokens"]
    assert "256 sequences" in lines["a step"]
    assert "32 for each worker, in 8 passes of at most 4" in lines["a step"]
    assert "40% of 989 TFLOP/s" in lines["time"]
    assert "H100" in lines["time"]
    assert "no GPU" in lines["on this machine"]
    assert lines["on an H100"] == "there is room for it"
    half = printed(capsys, "--config", "paper-340m", "--mfu", "0.2", "-w", str(tmp_path / "ws"))
    hours = [float(re.match(r"[\d.]+", text["time"])[0]) for text in (lines, half)]  # type: ignore[index]
    # Of two printed figures; 24 hours are the larger one's unit still.
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.01)


def test_prepared_tokens_give_their_own_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert "to be written" in before["token files"]
    prepare(resolve_settings({}, chosen).data, open_workspace(tmp_path))
    after = printed(capsys, *options, "-w", str(tmp_path))
    assert "of the prepared tokens" in after["vocabulary"]
    assert "epochs of the prepared ones" in after["tokens"]
    assert "token files" not in after


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "1.3b"], "multiple of the context length 2048"),
        (["--preset", "huge"], "model.preset"),
        (["--set", "data.source=files"], "data.files"),
        (["--set", "data.tokenizer=missing.json"], "missing.json"),
        (["--workers", "3"], "3 workers cannot share evenly"),
    ],
)
def test_what_can_be_met_nowhere_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(["pretrain", "--dry-run", "-w", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_run_without_room_ends_before_text_is_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    little = {
        "memory": FreeBytes(memory=2**30, disk=None),
        "disk": FreeBytes(memory=None, disk=2**20),
    }[what]
    monkeypatch.setattr("orchestrator.planning.preflight.local_free_bytes", lambda *_, **__: little)
    options = ["--preset", "55m", "--set", "training.num_tokens_per_step=65536"]
    assert cli.main(["pretrain", "-w", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert ("GiB free" in error) == (what == "memory")
    assert "--preset tiny" in error or "--workspace" in error
    assert not (tmp_path / "tokens").exists()


def test_mfu_goes_with_a_plan_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--mfu", "0.3"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_room_is_that_of_the_machine_and_of_the_folders_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    one, two = (local_free_bytes(tmp_path / "not" / "there", num_workers=n) for n in (1, 2))
    assert one.memory is not None
    assert two.memory is not None
    assert two.memory == pytest.approx(one.memory / 2, rel=0.2)
    assert one.disk
    monkeypatch.setenv("RAY_ADDRESS", "ray.example:6379")
    assert local_free_bytes(tmp_path).memory is None


def test_peaks() -> None:
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3", "fp32") == 67e12
    assert gpu_peak_flops("GeForce", "bf16") is None
    speeds = measure_cpu_flops(count=3, seconds=0.005)
    assert len(speeds) == 3
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > 1e8


def test_trials_that_do_not_fit_side_by_side_are_counted_before_they_start(
    tiny_plan: SweepPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "orchestrator.planning.preflight.local_resources", lambda **_: Resources(cpus=8, gpus=0)
    )
    jobs = [TrainingJob.from_dict(trial.job) for trial in tiny_plan.trials if trial.job]
    # Each takes little more than a process does.
    for gigabytes, sweep, words in (
        (1.3, SweepSettings(), "sweep.trials_at_once=2"),
        (1.3, SweepSettings(trials_at_once=2), None),
        (0.1, SweepSettings(), "training would take"),
    ):
        free = FreeBytes(memory=int(gigabytes * 2**30), disk=None)
        monkeypatch.setattr(
            "orchestrator.planning.preflight.local_free_bytes", lambda *_, r=free, **__: r
        )
        if words is None:
            check_trials_fit(jobs, sweep)
            continue
        with pytest.raises(UserError, match=words):
            check_trials_fit(jobs, sweep)


def test_trainings_that_fit_on_the_disk_one_by_one_are_refused_together(
    tiny_plan: SweepPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [TrainingJob.from_dict(trial.job) for trial in tiny_plan.trials if trial.job]
    assert len(jobs) == 4
    one = 12 * 10_146  # bytes of a checkpoint

    def check(num_checkpoints: float, *, teacher_bytes: int = 0, **recipe: int) -> None:
        free = FreeBytes(memory=None, disk=int(num_checkpoints * one))
        monkeypatch.setattr(
            "orchestrator.planning.preflight.local_free_bytes", lambda *_, **__: free
        )
        own = [replace(job, recipe=job.recipe.model_copy(update=recipe)) for job in jobs]
        check_trials_fit(own, SweepSettings(), teacher_bytes=teacher_bytes)
        if not teacher_bytes:
            check_jobs_fit(own, ClusterSettings())

    check(4)
    with pytest.raises(
        UserError, match=r"4 trainings .* 475\.2 KiB together .* has 356\.7 KiB free"
    ):
        check(3)
    with pytest.raises(
        UserError, match=r"answers 118\.9 KiB.*--set distillation\.teacher_cache=live"
    ):
        check(4.5, teacher_bytes=one)
    check(5, teacher_bytes=one)
    # Two are kept of each, and one more is written by each that runs at the same time.
    often = {"checkpoint_every_steps": 10, "num_checkpoints_kept": 2}
    check(8 + 4, **often)
    with pytest.raises(UserError, match=r"--set distillation\.training\.num_checkpoints_kept=1;"):
        check(8, **often)


def job_of(
    config: ModelConfig, recipe: TrainingSettings, teacher: Path | None = None
) -> TrainingJob:
    """Return a job that is planned only: its tokens are not looked at."""
    return TrainingJob(
        run_folder="not/there",
        tokens_folder="not/there",
        model=config.to_dict(),
        recipe=recipe,
        teacher_folder=str(teacher) if teacher else None,
    )


def placed(*assignments: str, jobs: tuple[TrainingJob, ...] = ()) -> tuple[int, int | None]:
    """Return the GPUs of a trial, and how many trials run at once."""
    settings = assign_trial_gpus(
        resolve_settings({}, assignments), [request_of(job) for job in jobs]
    )
    return settings.sweep.gpus_per_trial or 0, settings.sweep.trials_at_once


def test_trials_take_the_gpus_of_the_run() -> None:
    assert placed() == (0, None)
    assert placed("cluster.num_workers=4") == (0, None)
    assert placed("cluster.num_gpus=8") == (1, 8)
    assert placed("cluster.num_gpus=8", "sweep.trials_at_once=3") == (1, 3)
    assert placed("cluster.num_gpus=8", "sweep.gpus_per_trial=3") == (3, 2)
    assert placed("cluster.num_gpus=8", "sweep.workers_per_trial=4") == (4, 2)
    assert placed("sweep.gpus_per_trial=2") == (2, None), "of a run on CPUs, as many as there are"


def test_a_trial_takes_the_fewest_gpus_on_which_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "orchestrator.planning.preflight.local_free_bytes", lambda *_, **__: FreeBytes(None, None)
    )
    settings = resolve_settings({}, ["model.preset=340m", "model.corrections=3"])
    config = build_model_config(settings.model, vocab_size=32_000)
    recipe = TrainingSettings(num_steps=10, num_tokens_per_step=16 * 2048, precision="bf16")
    # All sequences of a worker go through one pass: 16 on one GPU, 8 on each of two, 4, 2.
    free = FreeBytes(memory=ASSUMED_GPU_BYTES, disk=None)
    for number in (1, 2):
        with pytest.raises(UserError, match="would take about"):
            check_fit(
                ResourceRequest(config=config, recipe=recipe, num_workers=number, on_gpus=True),
                free,
            )
    check_fit(ResourceRequest(config=config, recipe=recipe, num_workers=4, on_gpus=True), free)
    jobs = (job_of(config, recipe),)
    # Three cannot share 16 sequences evenly.
    assert placed("cluster.num_gpus=8", jobs=jobs) == (4, 2)
    assert placed("cluster.num_gpus=2", jobs=jobs) == (2, 1), "what does not fit is refused later"


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["sweep.gpus_per_trial=0"], r"sweep\.gpus_per_trial=0 .* cluster\.num_gpus=8 names GPUs"),
        (["sweep.gpus_per_trial=9"], "asks for 9 GPUs"),
        (["sweep.workers_per_trial=16"], "asks for 16 GPUs"),
    ],
)
def test_nobody_gets_a_cpu_where_the_settings_name_gpus(assignments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        placed("cluster.num_gpus=8", *assignments)


def models_to_train(settings: Settings, teacher: Path) -> dict[str, list[TrainingJob]]:
    """Return what a sweep file trains: by the run itself, and in trials."""

    def config(own: Settings) -> ModelConfig:
        return build_model_config(own.model, vocab_size=32_000)

    if settings.sweep.kind == "iterations":
        models = [with_model(settings, **changes) for _, changes in models_of(settings)]
        return {"trials": [job_of(config(own), own.training) for own in models]}
    own = teacher_and_baselines(settings).values()
    full = config(settings)
    (teacher / "config.json").write_text(json.dumps(full.to_dict()))
    # The costliest student makes all corrections, beside its teacher.
    return {
        "run": [job_of(config(each), each.training) for each in own],
        "trials": [job_of(full, settings.distillation.training, teacher)],
    }


@pytest.mark.parametrize("name", shipped_sweeps())
def test_a_shipped_sweep_trains_where_it_says_and_fits_there(name: str, tmp_path: Path) -> None:
    settings = read_settings(shipped_sweeps()[name], [])
    on_gpus = settings.cluster.num_gpus > 0
    assert on_gpus == name.startswith("paper-")
    jobs = models_to_train(settings, tmp_path)
    sweep = assign_trial_gpus(settings, [request_of(job) for job in jobs["trials"]]).sweep
    assert sweep.gpus_per_trial == int(on_gpus), "each trial fits on one GPU"
    assert sweep.trials_at_once == (settings.cluster.num_gpus if on_gpus else None)
    if on_gpus:
        free = FreeBytes(memory=ASSUMED_GPU_BYTES, disk=None)
        for job in [*jobs["run"], *jobs["trials"]]:
            teacher = job.config() if job.teacher_folder else None
            request = ResourceRequest(
                config=job.config(), recipe=job.recipe, on_gpus=True, teacher=teacher
            )
            check_fit(request, free)


def test_students_without_room_are_refused_before_their_teacher_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the teacher is trained")

    text = tmp_path / "text.jsonl"
    rows = [{"text": f"A sentence about {n} and its square {n * n}."} for n in range(300)]
    text.write_text("\n".join(map(json.dumps, rows)))
    settings = resolve_settings(
        {},
        [
            "data.source=files", f"data.files=[{text}]", "data.vocab_size=300",
            "model={num_layers: 2, dim: 16, num_heads: 2, ffn_dim: 32, context_length: 16}",
            "training={num_steps: 10, num_tokens_per_step: 64, num_validation_tokens: 64}",
            "distillation.training={num_steps: 10, num_tokens_per_step: 64}",
            "sweep.num_schedules=5",
        ],
    )  # fmt: skip
    desk = Desk(open_workspace(tmp_path / "ws"), Progress(), Console(file=StringIO()))
    monkeypatch.setattr(procedure, "pretrain_models", never)
    monkeypatch.setattr(procedure, "ray_cluster", lambda **_: nullcontext())
    config = build_model_config(settings.model, vocab_size=300)
    one = job_of(config, settings.training)
    checkpoint = request_of(one).estimate().checkpoint_bytes
    # Three are pretrained, and five students at most follow.
    for num_checkpoints, error, words in (
        (8, AssertionError, "the teacher is trained"),
        (7.5, UserError, "8 trainings would write about"),
    ):
        free = FreeBytes(memory=None, disk=int(num_checkpoints * checkpoint))
        monkeypatch.setattr(
            "orchestrator.planning.preflight.local_free_bytes", lambda *_, r=free, **__: r
        )
        with pytest.raises(error, match=words):
            procedure.quickstart(settings, desk)
