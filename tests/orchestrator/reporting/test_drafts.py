"""Which full model a trial drafts for, and which draft is the fastest."""

from __future__ import annotations

from typing import Any

import pytest
from sample_trials import sample_front, sample_trial

from orchestrator.records.trial import Trial
from orchestrator.reporting.findings import findings
from orchestrator.reporting.front_tables import models_table
from orchestrator.reporting.pick_rules import (
    best_drafts,
    draft_sentences,
    draft_targets,
    pick_draft,
)
from orchestrator.workspace.errors import UserError


def trial(
    label: str, evaluations: int, checkpoint: str, speed_up: float | None = None, **values: Any
) -> Trial:
    numbers = {"acceptance": 0.8, "exact_ms_per_token": 5.0 / speed_up} if speed_up else {}
    return sample_trial(
        key=f"key of {label}",
        label=label,
        checkpoint=checkpoint,
        cost={"evaluations": evaluations},
        quality={"accuracy": 0.5},
        decoding={**numbers, "speed_up": speed_up},
        **values,
    )


TEACHER = trial("teacher", 8, "t", role="teacher")
ELASTIC = trial("elastic 3,3", 8, "e")


def test_a_trial_drafts_for_the_costliest_schedule_of_its_weights_or_for_the_teacher() -> None:
    results = [
        TEACHER,
        ELASTIC,
        trial("elastic 1,3", 6, "e"),
        trial("elastic 0,0", 2, "e"),
        trial("pruned 0,3", 5, "t"),
        trial("student 3,3", 8, "s1"),
        trial("student 0,3", 5, "s2"),
        trial("vanilla", 2, "v", role="baseline"),
    ]
    targets = {
        key.removeprefix("key of "): full.label for key, full in draft_targets(results).items()
    }
    assert targets == {
        "elastic 1,3": "elastic 3,3",
        "elastic 0,0": "elastic 3,3",
        "pruned 0,3": "teacher",
        "student 0,3": "teacher",
    }
    assert draft_targets([ELASTIC, trial("vanilla", 2, "v", role="baseline")]) == {}


def test_the_fastest_draft_of_each_full_model_is_picked() -> None:
    results = [
        TEACHER,
        ELASTIC,
        trial("elastic 1,3", 6, "e", 1.2),
        trial("elastic 0,0", 2, "e", 1.25),
        trial("elastic 0,1", 3, "e"),
        trial("student 0,3", 5, "s", 0.8),
    ]
    assert {name: best.label for name, best in best_drafts(results).items()} == {
        "elastic 3,3": "elastic 0,0",
        "teacher": "student 0,3",
    }
    assert pick_draft(results, "elastic 3,3").label == "elastic 0,0"
    with pytest.raises(UserError, match=r"no draft speeds up teacher: .* 1\.25 times as long"):
        pick_draft(results, "teacher")
    with pytest.raises(
        UserError, match=r"no draft of 'full' was measured; say elastic 3,3; teacher"
    ):
        pick_draft(results, "full")
    with pytest.raises(UserError, match="no measured drafts"):
        pick_draft([TEACHER, trial("student 0,3", 5, "s")], "teacher")
    front = sample_front(results)
    said = [sentence for sentence in findings(front) if "draft" in sentence]
    assert said == draft_sentences(front.results)
    assert said == [
        "The exact output of elastic 3,3 takes 4.00 ms a token with elastic 0,0 as its draft (80% "
        "of the drafted tokens kept), plain decoding 1.25 times as long.",
        "No draft speeds up the exact output of teacher; the best is student 0,3 as its draft (80% "
        "of the drafted tokens kept).",
    ]
    table = models_table(front).to_markdown().splitlines()
    assert "exact ms" in table[0]
    assert any("80% | 4.00 |" in line for line in table)
    assert draft_sentences([TEACHER]) == []
