"""The depth study: its arms, its plan, its page, and two arms at a tiny size."""

from __future__ import annotations

import math
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import depth_study as study
import pytest
import torch
from depth_arms import Choices, select_arms, study_arms
from depth_figure import write_figure
from depth_results import (
    ArmResult,
    CheckpointReadings,
    Reading,
    SeedResult,
    StudyResults,
    other_corrections,
    read_checkpoint,
)
from depth_tables import study_markdown
from rich.console import Console

from iiet import Decoder, preset
from orchestrator import RunFailed, Settings, Trial, UserError, prepare, read_settings
from orchestrator.cli.session import Session
from orchestrator.data.sources import open_data
from orchestrator.terminal.progress import Progress
from orchestrator.training.pretraining_job import pretraining_job
from orchestrator.workspace.layout import Workspace, open_workspace

TINY = [
    "model.dim=16", "model.num_heads=2", "model.ffn_dim=32", "training.num_steps=4",
    "training.num_tokens_per_step=320", "training.warmup_steps=1",
    "training.num_validation_tokens=800", "evaluation.num_items=8",
]  # fmt: skip


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "space")


@pytest.fixture
def settings() -> Settings:
    return read_settings(study.SETTINGS, TINY)


def session_of(workspace: Workspace) -> Session:
    console = Console(file=StringIO(), width=140)
    return Session(workspace, Progress(), console, StringIO(), StringIO())


def test_the_arms_in_the_order_of_priority(settings: Settings, workspace: Workspace) -> None:
    arms = study_arms(settings, Choices())
    names = [arm.name for arm in arms]
    assert names[:7] == [
        "vanilla, 2 layers", "vanilla, 4 layers", "vanilla, 8 layers", "r = 0, 2 layers",
        "r = 1, 2 layers", "r = 3, 2 layers", "r = 3, 2 layers, two stages",
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert len({arm.slug for arm in arms}) == len(arms)
    models = [arm.model(rate=1e-3, seed=2) for arm in arms]
    jobs = [pretraining_job(model.settings, workspace, None) for model in models]
    assert len({job.run_folder for job in jobs}) == len(arms), "all are different trainings"
    by_name = {arm.name: job for arm, job in zip(arms, jobs, strict=True)}
    assert by_name["r = 3, 1 layer, two stages"].recipe.iterate_from_fraction == 0.5
    assert by_name["r = 3, 2 layers"].recipe.iterate_from_fraction == 0
    assert by_name["r = 3, 2 layers, schedules drawn"].recipe.elastic.num_drawn == 1
    assert by_name["looped, r = 3, 2 layers"].model.corrections.corrections == (3, 3)
    assert by_name["vanilla, 8 layers"].model.num_layers == 8
    damped = by_name["r = 3, 2 layers, learned damping"].model
    assert damped.options.learn_damping  # type: ignore[attr-defined]


def test_arms_are_selected_by_patterns(settings: Settings) -> None:
    arms = study_arms(settings, Choices())
    found = select_arms(arms, ["r = ?, 1 layer", "vanilla, 2 layers"])
    names = ["vanilla, 2 layers", "r = 0, 1 layer", "r = 1, 1 layer", "r = 3, 1 layer"]
    assert [arm.name for arm in found] == names
    assert select_arms(arms, []) == arms
    with pytest.raises(UserError, match=r"no arm has a name like 'r=3'; there are: vanilla, 2"):
        select_arms(arms, ["r=3"])


@pytest.mark.parametrize(("own", "others"), [(0, [1]), (1, [0, 2]), (3, [0, 4, 6])])
def test_models_are_read_below_and_beyond_their_corrections(own: int, others: list[int]) -> None:
    assert other_corrections(own) == others


@pytest.mark.parametrize("method", ["iiet", "looped", "vanilla"])
def test_a_reading_is_that_of_the_same_weights_under_another_schedule(
    method: str, settings: Settings, workspace: Workspace, tmp_path: Path
) -> None:
    data = open_data(prepare(settings, workspace=workspace))
    shape = {"dim": 16, "ffn_dim": 32, "num_heads": 2, "num_layers": 2}
    sizes = {"vocab_size": data.vocab_size, "context_length": 40}
    schedule = [0, 0] if method == "vanilla" else [1, 1]
    decoder = Decoder(preset("tiny", method=method, schedule=schedule, **shape, **sizes))
    decoder.save(tmp_path / "own")
    found = read_checkpoint(tmp_path / "own", data, num_sequences=20)
    assert list(found.others) == ([] if method == "vanilla" else [0, 2])
    for corrections, reading in found.others.items():
        other = decoder.schedule.uniform(2, corrections)
        decoder.with_schedule(other).save(tmp_path / f"{corrections}")
        own = read_checkpoint(tmp_path / f"{corrections}", data, num_sequences=20).own
        assert reading == own
        assert own != found.own
    batches = [*data.validation_batches(context_length=40, num_tokens=800, batch_size=20)]
    ids, targets = (
        torch.cat([getattr(one, name) for one in batches]) for name in ("input_ids", "targets")
    )
    logits, counted = decoder(ids), targets >= 0
    loss = torch.nn.functional.cross_entropy(logits[counted], targets[counted])
    assert found.own.loss == pytest.approx(loss.item(), rel=1e-5)
    right = logits.argmax(-1)[counted] == targets[counted]
    assert found.own.accuracy == pytest.approx(right.float().mean().item(), abs=1e-6)


def arm_of(name: str, accuracy: float, *, layers: int = 2, nfe: float = 2.0) -> ArmResult:
    def seed(shift: float) -> SeedResult:
        own = Reading(loss=1 - accuracy + shift, accuracy=accuracy - shift)
        others = {0: Reading(loss=2.0, accuracy=0.5)} if name.startswith("r = ") else {}
        readings = CheckpointReadings(own=own, others=others)
        return SeedResult(readings=readings, heldout_accuracy=accuracy, seconds=60.0)

    return ArmResult(
        name=name, key="", num_layers=layers, evaluations=nfe, num_parameters=1000,
        training_flops=1e12,
        losses_by_rate={1e-3: 0.5, 2e-3: 0.4}, best_rate=2e-3,
        mean_losses={2e-3: 0.41}, seeds={number: seed(0.01 * number) for number in (2, 3, 4)},
    )  # fmt: skip


def test_the_page_and_the_picture_of_some_arms(settings: Settings, tmp_path: Path) -> None:
    arms = {
        arm.name: arm
        for arm in (
            arm_of("vanilla, 2 layers", 0.7),
            arm_of("vanilla, 8 layers", 1.0, layers=8, nfe=8),
            arm_of("r = 0, 2 layers", 0.65),
            arm_of("r = 3, 2 layers", 0.99, nfe=8),
            arm_of("vanilla, 1 layer", 0.55, layers=1, nfe=1),
            arm_of("looped, r = 3, 1 layer", 0.8, layers=1, nfe=4),
        )
    }
    results = StudyResults(arms=arms, not_run={"pcformer, 2 layers": "not selected"})
    text = study_markdown(results, Choices(), settings, copied=0.513)
    assert "- does iteration pay in 'r = 3, 2 layers': yes; in 3 of 3 seeds (seed 2: 97.0%," in text
    assert "is the answer in 51.3%" in text
    assert "| r = 3, 2 layers | 0 | 50.0 | 2 | 96.0 ± 0.6 | 0.04 ± 0.006 |" in text
    assert "- pcformer, 2 layers: not selected" in text
    assert "vanilla, 2 layers: the best rate is the lowest or the highest that was tried" in text
    pictures = write_figure(arms, Choices(), tmp_path / "accuracy")
    assert [path.suffix for path in pictures] == [".png", ".svg"]


def test_its_dry_run_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = [f"--set={change}" for change in TINY]
    arms = ["--arms", "r = ?, 2 layers", "--seeds", "5", "6"]
    assert study.main(["--workspace", str(tmp_path / "ws"), "--dry-run", *changes, *arms]) == 0
    shown = capfd.readouterr().out
    assert len([line for line in shown.splitlines() if "r = " in line]) == 3
    assert "  r = 3, 2 layers           6 " in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "iiet"], "no arm has a name like 'iiet'"),
        (["--seeds", "2", "2"], "a value is given twice"),
        (["--set", "sweep.seeds=[]"], "sweep.seeds is empty"),
        (
            ["--set", "data.source=python", "--set", "data.depth.tasks=[]"],
            "data.source is python, and the study counts answers",
        ),
        (["--set", "data.depth.length=10"], "too short for phop_5"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert study.main(["--workspace", str(tmp_path), "--dry-run", *arguments]) == 2
    shown = " ".join(capfd.readouterr().err.split())
    assert words in shown
    assert "Traceback" not in shown


BEST_RATE = {"vanilla": 4e-3, "r = 0": 9e-3, "r = 1": 1e-9}
"""Rates with the lowest made-up loss: tried, one beyond the tried ones, and far below them."""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of all models that made-up sweeps train."""
    labels: list[str] = []

    def result_of(trial: Trial) -> Trial:
        assert trial.job
        best = BEST_RATE[trial.label.split(",")[0]]
        # An IIET with one correction is worth half as many layers again.
        worth = trial.model.num_layers * (1.5 if trial.label.startswith("r = 1") else 1.0)
        loss = 1 / worth + 1e-9 * abs(math.log(trial.job.recipe.learning_rate / best))
        # The folder's name tells `read` the loss.
        made = trial.model_copy(update={"checkpoint": f"/{loss}"})
        made = made.with_numbers("quality", {"validation_loss": loss, "accuracy": 0.5})
        return made.with_numbers("train", {"flops": 1e9, "seconds": 1, "steps": 4, "tokens": 1280})

    def sweep(settings: Settings, **options: Any) -> SimpleNamespace:
        if options["name"].startswith("depth-r-2"):
            raise RunFailed("all trials failed")
        plan = study.plan_sweep(settings, **options)
        for state in plan.states:
            if state.name != "finished":
                labels.append(state.trial.label)
                result_of(state.trial).write(state.trial.result_path)
        return SimpleNamespace(trials=[s.trial.result() for s in plan.states], failures={})

    def read(folder: Path, *_: object) -> CheckpointReadings:
        return CheckpointReadings(own=Reading(loss=float(folder.name), accuracy=0.6), others={})

    monkeypatch.setattr(study, "sweep", sweep)
    monkeypatch.setattr(study, "ray_cluster", lambda *_, **__: nullcontext())
    monkeypatch.setattr(study, "read_checkpoint", read)
    return labels


def test_the_best_rate_is_inside_the_tried_ones_or_one_more_is_tried(
    settings: Settings, workspace: Workspace, trained: list[str]
) -> None:
    own = study.DepthStudy(settings, Choices(), session_of(workspace))
    own.run(select_arms(own.arms, ["vanilla, 2 layers", "r = [01], 2 layers"]))
    best = {name: (arm.best_rate, arm.has_inner_rate) for name, arm in own.results.arms.items()}
    assert best == {
        "vanilla, 2 layers": (4e-3, True),
        "r = 0, 2 layers": (8e-3, True),
        "r = 1, 2 layers": (5e-4, False),
    }
    # Four rates, and two of them with two more seeds; in two arms one more rate, which is among
    # the two best there.
    assert len(trained) == 3 * (4 + 2 * 2) + 2 * (1 + 2)
    assert len(set(trained)) == len(trained)
    again = study.DepthStudy(settings, Choices(), session_of(workspace))
    again.run(again.arms[:1])
    assert again.results == own.results
    assert len(trained) == 30


def test_the_page_says_what_corrections_are_worth(
    settings: Settings, workspace: Workspace, trained: list[str]
) -> None:
    own = study.DepthStudy(settings, Choices(), session_of(workspace))
    own.run(select_arms(own.arms, ["vanilla, [24] layers", "r = 1, 2 layers"]))
    text = (workspace.overlays / "depth" / "results.md").read_text()
    # The loss 1/3 lies two thirds of the way from 1/2 to 1/4.
    assert "| r = 1, 2 layers | 2 | 2 | 3 | 0.3333 | 3.17 layers | 0.67 (0.67 to 0.67) |" in text
    assert "Validation loss of vanilla: 2 layers 0.5, 4 layers 0.25." in text


def test_a_rate_that_suits_the_first_seed_alone_does_not_decide(
    settings: Settings, workspace: Workspace, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlucky(name: str) -> float:
        """A loss that the other seeds have at the first seed's best rate."""
        return 9.0 if "rate 0.004" in name and "seed 2" not in name else 0.0

    own = study.DepthStudy(settings, Choices(), session_of(workspace))
    plain = study.sweep

    def sweep(settings: Settings, **options: Any) -> SimpleNamespace:
        found = plain(settings, **options)
        for trial in found.trials:
            loss = trial.numbers["quality/validation_loss"] + unlucky(trial.label)
            changed = trial.with_numbers("quality", {"validation_loss": loss})
            changed.write(trial.result_path)
        return SimpleNamespace(trials=[t.result() for t in found.trials], failures={})

    monkeypatch.setattr(study, "sweep", sweep)
    own.run(select_arms(own.arms, ["vanilla, 2 layers"]))
    arm = own.results.arms["vanilla, 2 layers"]
    assert min(arm.losses_by_rate, key=lambda rate: arm.losses_by_rate[rate]) == 4e-3
    assert arm.best_rate == 2e-3
    assert arm.mean_losses[4e-3] > 6 > arm.mean_losses[2e-3]
    assert f"({arm.mean_losses[4e-3]:.3g})" in (own.folder / "results.md").read_text()


def test_known_arms_of_other_settings_are_run_again(
    settings: Settings, workspace: Workspace, tmp_path: Path, trained: list[str]
) -> None:
    own = study.DepthStudy(settings, Choices(), session_of(workspace))
    own.run(select_arms(own.arms, ["vanilla, [24] layers"]))
    num_trained, stored = len(trained), workspace.overlays / "depth" / "results.json"

    elsewhere = session_of(open_workspace(tmp_path / "elsewhere"))
    same = study.DepthStudy(settings, Choices(), elsewhere)
    same.take_over(stored)
    same.run(select_arms(same.arms, ["vanilla, 2 layers"]))
    assert same.results.arms == own.results.arms
    assert len(trained) == num_trained
    assert "known" in printed_plan(same)

    longer = settings.training.model_copy(update={"num_steps": 5})
    other = study.DepthStudy(settings.model_copy(update={"training": longer}), Choices(), elsewhere)
    other.take_over(stored)
    other.run(select_arms(other.arms, ["vanilla, 2 layers"]))
    assert list(other.results.arms) == ["vanilla, 2 layers"]
    assert len(trained) > num_trained
    with pytest.raises(UserError, match="there is no file"):
        other.take_over(tmp_path / "none.json")


def printed_plan(own: study.DepthStudy) -> str:
    own.print_plan(own.arms[:1])
    assert isinstance(own.session.console.file, StringIO)
    return own.session.console.file.getvalue()


def test_an_arm_that_fails_does_not_end_the_study(
    settings: Settings, workspace: Workspace, trained: list[str]
) -> None:
    own = study.DepthStudy(settings, Choices(corrections=(1, 2)), session_of(workspace))
    with pytest.raises(RunFailed, match="1 trials failed"):
        own.run(select_arms(own.arms, ["r = [12], 2 layers"]))
    assert list(own.results.arms) == ["r = 1, 2 layers"]
    assert own.results.not_run["r = 2, 2 layers"] == "failed"
    assert own.results.not_run["r = 0, 2 layers"] == "not selected"


def test_no_arm_begins_that_would_not_end_in_time(
    settings: Settings, workspace: Workspace, trained: list[str]
) -> None:
    own = study.DepthStudy(settings, Choices(), session_of(workspace))
    few, many = "vanilla, 2 layers", "vanilla, 16 layers"
    arms = select_arms(own.arms, [few, many])
    own.results = own.results.model_copy(update={"flops": 1e20, "seconds": 1e20})
    assert own._most_hours(arms[1]) > 7 * own._most_hours(arms[0])
    own.run(arms, hours=2 * own._most_hours(arms[0]))
    assert list(own.results.arms) == [few]
    assert own.results.not_run[many].startswith("it takes ")


@pytest.mark.long
def test_two_arms_one_after_the_other_and_nothing_is_trained_twice(
    workspace: Workspace, ray_session: None
) -> None:
    settings = read_settings(
        study.SETTINGS,
        [
            *TINY,
            "sweep.seeds=[2, 3]",
            "sweep.learning_rates={iiet: 1.0e-3, vanilla: [1.0e-3, 2.0e-3]}",
        ],
    )

    def run(*names: str, hours: float | None = None) -> StudyResults:
        own = study.DepthStudy(settings, Choices(), session_of(workspace))
        own.run(select_arms(own.arms, names), hours=hours)
        return own.results

    vanilla, corrected = "vanilla, 2 layers", "r = 1, 2 layers"
    first = run(vanilla)
    arm = first.arms[vanilla]
    assert list(first.arms) == [vanilla]
    assert len(arm.losses_by_rate) == 3, "one rate beyond the tried ones"
    assert list(arm.seeds) == [2, 3]
    assert first.seconds > 0
    runs = len([*workspace.runs.glob("*/done.json")])
    # Two rates, one beyond them, and the second seed of the two best; of another one if the
    # further rate is among these.
    assert list(arm.mean_losses) != []
    assert runs == 5 + any(rate not in (1e-3, 2e-3) for rate in arm.mean_losses)

    assert "hours, and" in run(corrected, hours=0.0).not_run[corrected]
    both = run(corrected)
    assert both.arms[vanilla] == arm
    assert list(both.arms) == [vanilla, corrected]
    assert len([*workspace.runs.glob("*/done.json")]) == runs + 2
    again = run(vanilla, corrected)
    assert again == both
    text = (workspace.overlays / "depth" / "results.md").read_text()
    assert "'vanilla, 4 layers' is missing" in text
    assert "- r = 0, 2 layers: not selected" in text
