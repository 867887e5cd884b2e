"""The study's sentences: differences are taken seed by seed."""

from __future__ import annotations

import statistics

import pytest
from sample_trials import sample_trial
from study_tables import Phases, Ways, losses_by_seed, study_markdown

from orchestrator.records.trial import Trial
from orchestrator.reporting.results import result_table

# Seeds differ by more than models do: only differences of one seed show which is better.
LOSSES = {"vanilla": [4.1, 3.9, 4.3], "r = 0": [4.0, 3.81, 4.19], "r = 1": [4.01, 3.82, 4.2]}


def results(losses: dict[str, list[float]]) -> list[Trial]:
    return [
        sample_trial(
            key=f"{group} {seed}",
            role="baseline" if group == "vanilla" else "trial",
            method="vanilla" if group == "vanilla" else "iiet",
            label=f"{group}, seed {seed}" if len(own) > 1 else group,
            group=group if len(own) > 1 else None,
            seed=seed if len(own) > 1 else None,
            cost={"evaluations": 6.0},
            quality={"validation_loss": loss, "accuracy": 0.5, "accuracy_stderr": 0.01},
            train={"flops": 1e9, "tokens": 1e6},
        )
        for group, own in losses.items()
        for seed, loss in enumerate(own)
    ]


def said(losses: dict[str, list[float]], accuracy: float = 0.5) -> str:
    found = results(losses)
    joined = {result.label: result for result in result_table(found)["trial"]}
    teacher = sample_trial(
        key="teacher", role="teacher", method="iiet", schedule=(1,), cost={"evaluations": 2.0},
        quality={"validation_loss": 4.0, "accuracy": accuracy},
    )  # fmt: skip
    student = sample_trial(
        key="student",
        schedule=(0,),
        cost={"evaluations": 1.0},
        quality={"validation_loss": 4.0, "accuracy": accuracy},
    )
    phases = Phases(by_rate={}, best=joined, tokens=joined, losses=losses_by_seed(found), flops={})
    ways = Ways(
        teacher=teacher,
        results={"cosine": [teacher, student]},
        schedule_sweeps=[],
        training_sweeps=[],
    )
    return study_markdown(phases, ways, [])


def test_losses_are_compared_seed_by_seed() -> None:
    text = said(LOSSES)
    differences = [a - b for a, b in zip(LOSSES["r = 0"], LOSSES["vanilla"], strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / 3**0.5
    assert error < 0.01 < statistics.stdev(LOSSES["vanilla"]) / 3**0.5
    assert f"- r = 0 against vanilla at equal tokens: loss {mean:+.3f} ± {error:.3f}, " in text
    assert "- r = 1 against r = 0 at equal tokens: loss +0.010 ± 0.000, accuracy +0.00 ±" in text
    assert "vanilla against" not in text


@pytest.mark.parametrize("number", range(3))
def test_one_seed_has_no_error(number: int) -> None:
    text = said({name: own[number : number + 1] for name, own in LOSSES.items()})
    difference = LOSSES["r = 1"][number] - LOSSES["r = 0"][number]
    assert f"- r = 1 against r = 0 at equal tokens: loss {difference:+.3f}, accuracy" in text


def test_no_share_is_given_of_a_teacher_with_accuracy_0() -> None:
    assert "keeps 100.0% of its teacher's accuracy" in said(LOSSES)
    assert "of its teacher's accuracy" not in said(LOSSES, accuracy=0.0)
