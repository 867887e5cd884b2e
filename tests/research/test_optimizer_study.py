"""The study of optimizers: equal FLOPs, the rules on made-up results, and a run at toy size."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import optimizer_study
import pytest
from optimizer_study import (
    ADAMW,
    CORRECTED,
    CORRECTED_EQUAL_TOKENS,
    MIX,
    MUON,
    PAGE,
    RESULTS,
    SEEDS,
    VANILLA,
    Measured,
    Study,
    Training,
    filled,
    which_optimizers,
)

from iiet.cost import training_flops_per_token


def result(training: Training, quality: float, selection_loss: float = 1.0) -> Measured:
    return Measured(
        training=training, num_steps=1, training_flops=1.0, evaluations=6,
        selection_loss=selection_loss, loss=1.0, accuracy=None, bits_per_byte=-quality,
        cpu_seconds=1.0,
    )  # fmt: skip


def of_arm(arm: str, optimizer: str, rate: float = 2e-3, seed: int = 0) -> Training:
    return Training(task="text", arm=arm, optimizer=optimizer, rate=rate, seed=seed)


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(tmp_path, tmp_path / "results.json")


@pytest.mark.slow
def test_the_arms_have_equal_flops_and_one_has_equal_tokens(study):
    for task, arms in (("text", (VANILLA, MIX, CORRECTED)), ("depth", (VANILLA, CORRECTED))):
        flops = [
            study.num_steps(task, arm) * training_flops_per_token(study.config(task, arm))
            for arm in arms
        ]
        assert flops == pytest.approx(len(arms) * [flops[0]], rel=5e-3)
    assert study.num_steps("text", CORRECTED_EQUAL_TOKENS) == study.num_steps("text", VANILLA)


def test_rates_are_tried_until_the_best_is_inside(study):
    # The best rate of vanilla is 1e-3, and no loss of r = 0 is the lowest inside.
    losses = {VANILLA: lambda rate: abs(rate - 1e-3), MIX: lambda rate: rate}
    rates: dict[str, list[float]] = {VANILLA: [], MIX: []}
    for training in study.trainings("text", [ADAMW]):
        if training.seed != SEEDS[0]:
            break
        rates[training.arm].append(training.rate)
        study.store(result(training, -1.0, losses[training.arm](training.rate)))
    assert rates[VANILLA] == [2e-3, 4e-3, 8e-3, 1e-3, 5e-4]
    assert rates[MIX] == [2e-3, 4e-3, 8e-3, 1e-3, 5e-4]
    assert study.best("text", VANILLA, ADAMW).rate == 1e-3


def test_other_seeds_train_at_the_best_rate_and_give_the_verdicts(study):
    for training in study.trainings("text"):
        is_better = training.optimizer == ADAMW and training.arm != VANILLA
        quality = -1.6 + 0.1 * is_better + 0.001 * training.seed
        study.store(result(training, quality, abs(training.rate - 4e-3)))
    by_seed = study.by_seed("text", MIX, ADAMW)
    assert [one.training.rate for one in by_seed.values()] == len(SEEDS) * [4e-3]
    assert study.verdict("text", MIX, VANILLA, ADAMW) == "holds"
    assert study.verdict("text", MIX, VANILLA, MUON) == "does not hold"
    assert study.verdict("text", CORRECTED_EQUAL_TOKENS, VANILLA, MUON) == "not tried"
    page = filled(PAGE.read_text("utf-8"), study)
    assert "| +0.100 (+0.100 to +0.100) | holds | +0.000 (+0.000 to +0.000) |" in page
    assert "does not hold | AdamW only |" in page
    assert "`tokens`: 0 stored, next: text, corrected, equal tokens, adamw" in page
    assert Study(study.folder, study.results_file).measured == study.measured


def test_other_defaults_leave_the_rate_of_the_matrices(study):
    for arm in (VANILLA, MIX):
        study.store(result(of_arm(arm, MUON), -1.6, 1.0))
    trainings = list(study.trainings("defaults"))
    assert {t.rate * t.muon_rate_factor for t in trainings} == {8e-3}
    for training in trainings:
        study.store(result(training, -1.5, 0.9 if training.muon_momentum == 0.9 else 1.1))
    assert study.best("text", VANILLA, MUON) == of_arm(VANILLA, MUON)  # Not one of the others.
    page = filled(PAGE.read_text("utf-8"), study)
    assert "| `muon_momentum` 0.9 | 0.9000 | 0.9000 | 0.9000 |" in page


@pytest.mark.parametrize(
    ("adamw", "muon", "words"),
    [
        ("holds", "holds", "both"),
        ("does not hold", "does not hold", "neither"),
        ("holds", "does not hold", "AdamW only"),
        ("does not hold", "holds", "Muon only"),
        ("holds", "not decided", "AdamW; Muon not decided"),
        ("not decided", "not decided", "not decided"),
        ("holds", "not tried", "not tried"),
    ],
)
def test_a_claim_names_the_optimizers_that_it_holds_for(adamw, muon, words):
    assert which_optimizers({ADAMW: adamw, MUON: muon}) == words


def test_the_page_is_made_from_the_stored_results():
    text = PAGE.read_text("utf-8")
    assert filled(text, Study(Path("unused"), RESULTS)) == text, (
        "python research/optimizer_study.py --page"
    )


@pytest.mark.long
def test_the_study_resumes(tmp_path, capsys):
    file = tmp_path / "results.json"
    arguments = ["--folder", str(tmp_path), "--results", str(file), "--steps-factor", "0.002"]
    assert optimizer_study.main([*arguments, "--seconds", "0"]) == 0
    assert not file.exists()
    study = Study(tmp_path, file, 0.002)
    for piece in ("text", "depth"):
        for training in islice(study.trainings(piece), 2):
            study.store(study.make(training))
    assert optimizer_study.main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "depth: 2 stored, next: depth, vanilla, adamw, rate 0.008, seed 0" in printed
    qualities = {training.task: one.quality for training, one in study.measured.items()}
    assert qualities["text"] < -1
    assert 0 < qualities["depth"] < 100
