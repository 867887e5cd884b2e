"""The paper's claims on small tables whose answers are known."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from refusals import assert_names
from rich.console import Console
from sample_trials import sample_front, sample_trial
from stored_texts import assert_as_stored

from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial
from orchestrator.reporting.claims import (
    CONFIDENCE,
    PAPER_SHARE_OF_FULL,
    Claim,
    claim_metrics,
    claims_section,
    find_claims,
)
from orchestrator.reporting.front import busy_machine, with_confidence
from orchestrator.reporting.results import model_results
from orchestrator.reporting.sections import render_terminal
from orchestrator.settings import TrainingSettings

HARDNESS = np.random.default_rng(0).permutation(2000) / 2000
"""The hardness of each item. A model answers items right whose hardness is below its accuracy."""
KEYS = (
    *("iiet_over_vanilla", "iiet_over_r_0", "iiet_over_pcformer", "saved_overhead_nfe"),
    *("saved_overhead_ms", "student_over_vanilla_nfe", "student_over_r_0_nfe"),
    *("student_over_vanilla_ms", "student_over_r_0_ms", "kept_over_pcformer"),
)
ACCURACIES = {
    "vanilla": 0.70, "r = 0": 0.71, "pcformer": 0.80, "pc 1,1": 0.72, "pc 1,0": 0.60,
    "r = 2": 0.90, "1,1": 0.899, "1,0": 0.81, "0,0": 0.75,
}  # fmt: skip
"""Two layers: vanilla, r = 0, two teachers, and their students. By default all claims hold."""


def model(name: str, accuracy: float, **more: Any) -> Trial:
    method = {"vanilla": "vanilla", "p": "pcformer"}.get(name if name == "vanilla" else name[0])
    schedule = tuple(map(int, name[-3:].split(","))) if "," in name else (2, 2)
    schedule = (0, 0) if name in ("vanilla", "r = 0") else schedule
    teacher = "pcformer" if method == "pcformer" else "r = 2"
    nfe = 2 + sum(schedule)
    if method != "vanilla" and "," in name:
        more = {"parent": f"weights of {teacher}", "checkpoint": teacher, **more}
    roles = {"vanilla": "baseline", "r = 0": "baseline", "r = 2": "teacher", "pcformer": "teacher"}
    fields = {
        "key": name,
        "label": name,
        "method": method or "iiet",
        "schedule": schedule,
        "role": roles.get(name, "trial"),
        "checkpoint": name,
        "cost": {"evaluations": nfe, "decode_ms_per_token": 0.9 + 0.1 * nfe - (nfe == 2) * 0.06},
        "quality": {"accuracy": accuracy},
    }
    if method == "vanilla":
        fields["cost"]["decode_ms_per_token"] = 1.0
    trial = sample_trial(**{**fields, **more})
    job = TrainingJob(
        run_folder="", tokens_folder="", model=trial.model, recipe=TrainingSettings(),
        objective="distill" if trial.parent else "pretrain",
        teacher_folder=trial.parent and trial.checkpoint,
    )  # fmt: skip
    return trial.model_copy(update={"job": job})


def answers(trial: Trial) -> EvaluationResult:
    right = (trial.numbers["quality/accuracy"] > HARDNESS).astype(float)
    task = TaskResult(
        name="hops", version="1", num_items=len(right), metrics={"acc": float(right.mean())},
        items=[f"item {n}" for n in range(len(right))], values={"acc": right.tolist()},
    )  # fmt: skip
    bits = TaskResult(  # This task has no accuracy.
        name="bits_per_byte", version="1", num_items=50, metrics={"bits_per_byte": 1.0},
        items=[f"text {n}" for n in range(50)], values={"bits_per_byte": [(-7.0, 10.0)] * 50},
    )  # fmt: skip
    return EvaluationResult(results={"hops": task, "bits_per_byte": bits})


def claims_of(trials: Sequence[Trial]) -> dict[str, Claim]:
    items = {trial.key: answers(trial) for trial in trials}
    front = with_confidence(sample_front(trials), items)
    return {claim.key: claim for claim in find_claims(front)}


def trials_with(changes: dict[str, float | None]) -> list[Trial]:
    accuracies = {**ACCURACIES, **changes}
    return [model(name, accuracy) for name, accuracy in accuracies.items() if accuracy is not None]


def test_all_claims_hold_by_what_was_made_up():
    claims = claims_of(trials_with({}))
    assert [*claims] == [*KEYS]
    assert {claim.verdict for claim in claims.values()} == {"holds"}
    difference_of_shares = (0.899 / 0.9 + 0.81 / 0.9) / 2 - (0.72 / 0.8 + 0.60 / 0.8) / 2
    expected = [20, 19, 10, 50, 40, 5, 4, 5, 4, 100 * difference_of_shares]
    for (key, claim), number in zip(claims.items(), expected, strict=True):
        assert claim.here == pytest.approx(number, abs=2.0 if "student" in key else 1e-6), key
        if claim.number != 3:
            assert 0 < claim.low < claim.here < claim.high < claim.here + 5
    # What is saved is exact; the interval is that of the kept share.
    saved = claims["saved_overhead_nfe"]
    assert saved.low is None
    assert saved.kept == pytest.approx(100 * 0.899 / 0.9)
    assert (saved.kept_low, saved.kept_high) == pytest.approx((99.6, 100.1), abs=0.1)
    assert saved.over == "items of one seed"
    assert_names(saved.about, "1,1 (89.9%, 4 NFE)", "2 of 4 NFE")
    assert "1.04 times" in claims["student_over_vanilla_ms"].about
    metrics = claim_metrics(claims.values())
    assert metrics["claims/iiet_over_vanilla"] == pytest.approx(20)
    assert metrics["claims/iiet_over_vanilla_verdict"] == 1
    assert metrics["claims/saved_overhead_nfe_kept"] == saved.kept
    assert "claims/saved_overhead_nfe_low" not in metrics


def test_beside_a_source_no_claim_is_judged():
    source = model("source", 0.70, role="source")
    assert claims_of([*trials_with({}), source]) == {}


@pytest.mark.parametrize(("num_students", "verdict"), [(1, "holds"), (6, "not decided")])
def test_the_luck_of_the_best_of_several_students_does_not_count_for_it(num_students, verdict):
    trials = trials_with(dict.fromkeys(("1,1", "1,0", "0,0")))
    trials += [model(f"{number} 0,0", 0.7) for number in range(num_students)]
    items = {trial.key: answers(trial) for trial in trials}
    # Right on eight items more than vanilla, which is 2.5 standard errors.
    vanilla = items["vanilla"].results["hops"]
    values = np.array(vanilla.values["acc"])
    values[np.flatnonzero(values == 0)[:8]] = 1
    lucky = vanilla.model_copy(update={"values": {"acc": values.tolist()}})
    items["0 0,0"] = EvaluationResult(results={"hops": lucky})
    front = with_confidence(sample_front(trials), items)
    claim = {claim.key: claim for claim in find_claims(front)}["student_over_vanilla_nfe"]
    assert (claim.here, claim.verdict) == (pytest.approx(0.4), verdict)
    assert f"the best of {num_students} student" in claim.about


@pytest.mark.parametrize(("num_others", "verdict"), [(0, "holds"), (2, "not decided")])
def test_a_student_that_keeps_the_accuracy_by_little_is_not_sure_among_several(num_others, verdict):
    # It loses 5 of 1,800 right answers, and may lose 10.8: alone it has a confidence of 0.965.
    trials = trials_with({"1,1": 0.9 - 5.5 / 2000, **dict.fromkeys(("1,0", "0,0"))})
    trials += [model(f"{number} 0,0", 0.7) for number in range(num_others)]
    claim = claims_of(trials)["saved_overhead_nfe"]
    assert claim.verdict == verdict
    assert claim.about.startswith("1,1 ")


@pytest.mark.parametrize(("num_items", "verdict"), [(2000, "holds"), (100, "not decided")])
def test_equal_answers_to_few_items_decide_nothing(num_items, verdict):
    missing = ("1,1", "1,0", "pcformer", "pc 1,1", "pc 1,0")
    trials = trials_with({"0,0": 0.9, **dict.fromkeys(missing)})
    items = {}
    for trial in trials:
        task = answers(trial).results["hops"]
        values = {"acc": task.values["acc"][:num_items]}
        changes = {"num_items": num_items, "items": task.items[:num_items], "values": values}
        items[trial.key] = EvaluationResult(results={"hops": task.model_copy(update=changes)})
    front = with_confidence(sample_front(trials), items, demanded_share=PAPER_SHARE_OF_FULL)
    claims = find_claims(front)
    saved = next(claim for claim in claims if claim.key == "saved_overhead_nfe")
    # `pick` is as sure, though its models are more than the claim's one student.
    [student] = [row for row in front.placed if row.key == "0,0"]
    confidence = front.confidence_keeps(student)
    assert confidence is not None
    assert (confidence >= CONFIDENCE) == (verdict == "holds")
    assert (saved.here, saved.verdict, saved.kept) == (100, verdict, 100)
    assert saved.low is saved.high is None, "an overhead is exact"
    assert 100 - 600 / num_items < saved.kept_low < 100 < saved.kept_high


LACKING_PCFORMERS = dict.fromkeys(["pcformer", "pc 1,1", "pc 1,0"])
LACKING_VANILLA = ("iiet_over_vanilla", "student_over_vanilla_nfe", "student_over_vanilla_ms")
OTHERS: dict[str, tuple[dict[str, float | None], dict[str, str | None]]] = {
    "on the other side": (
        {"vanilla": 0.95, "r = 0": 0.95, "pcformer": 0.97, "pc 1,1": 0.97, "pc 1,0": 0.97,
         "1,1": 0.8},
        # The teacher shows no gain.
        {**dict.fromkeys(KEYS, "does not hold"), "saved_overhead_nfe": None,
         "saved_overhead_ms": None},
    ),
    "students that lose": ({"1,1": 0.8}, {"saved_overhead_nfe": "does not hold"}),
    "equal models": (
        {"vanilla": 0.9, "r = 0": 0.9, "0,0": 0.9, "pcformer": 0.9, "pc 1,1": 0.9, "pc 1,0": 0.9,
         "1,1": 0.8946, "1,0": 0.9},
        # The teacher shows no gain, though 0,0 keeps all of it.
        {**dict.fromkeys(KEYS, "not decided"), "saved_overhead_nfe": None,
         "saved_overhead_ms": None, "kept_over_pcformer": "does not hold"},
    ),
    "at the border": ({"1,1": 0.8946}, {"saved_overhead_nfe": "not decided"}),
    "r = 0 as good as the teacher": (
        {"r = 0": 0.9},
        {"iiet_over_vanilla": "holds", "iiet_over_r_0": "not decided", "saved_overhead_nfe": None,
         "student_over_vanilla_nfe": "holds", "student_over_r_0_nfe": "does not hold"},
    ),
    "no r = 0": (
        {"r = 0": None},
        {"iiet_over_vanilla": "holds", "iiet_over_r_0": None, "student_over_r_0_nfe": None,
         "student_over_r_0_ms": None},
    ),
    "no PCformer": (
        LACKING_PCFORMERS, {"iiet_over_pcformer": None, "kept_over_pcformer": None},
    ),
    "no vanilla": (
        {"vanilla": None},
        {**dict.fromkeys(LACKING_VANILLA), "saved_overhead_ms": None,
         "saved_overhead_nfe": "holds"},
    ),
    "no IIET": (dict.fromkeys(["r = 2", "1,1", "1,0", "0,0"]), dict.fromkeys(KEYS)),
    "no students": (
        dict.fromkeys(["1,1", "1,0", "0,0"]),
        {"saved_overhead_nfe": None, "kept_over_pcformer": None, "student_over_vanilla_nfe": None},
    ),
    "no right answers of the teacher": ({"r = 2": 0.0}, {"saved_overhead_nfe": None}),
    "no equal shares": ({"1,1": None, "pc 1,0": None}, {"kept_over_pcformer": None}),
}  # fmt: skip
"""Case -> accuracies that differ, and verdicts; None where the models do not answer a claim."""


@pytest.mark.parametrize("case", OTHERS)
def test_each_verdict_follows_from_the_interval_where_the_models_answer_a_claim(case):
    changes, expected = OTHERS[case]
    claims = claims_of(trials_with(changes))
    verdicts = {key: claims[key].verdict if key in claims else None for key in expected}
    assert verdicts == expected
    metrics = claim_metrics(claims.values())
    assert {key for key in KEYS if f"claims/{key}_verdict" in metrics} == claims.keys()


@pytest.mark.parametrize("objective", [None, "cross_entropy", "pretrain"])
def test_controls_of_the_distillation_are_no_students(objective):
    trials = []
    for trial in trials_with({}):
        job = trial.job
        if trial.parent:
            changes = {"objective": objective}
            job = trial.job.model_copy(update=changes) if objective and trial.job else None
        trials.append(trial.model_copy(update={"job": job}))
    assert [*claims_of(trials)] == ["iiet_over_vanilla", "iiet_over_r_0", "iiet_over_pcformer"]


def test_what_a_model_is_too_small_for_and_what_does_not_compare_is_not_measured():
    trials = trials_with({})
    slow = [
        t.with_numbers("cost", {"decode_ms_per_token": 1.3}) if t.key == "0,0" else t
        for t in trials
    ]
    assert "student_over_vanilla_ms" not in claims_of(slow)
    untimed = [
        t.model_copy(update={"numbers": {n: v for n, v in t.numbers.items() if "_ms" not in n}})
        for t in trials
    ]
    claims = claims_of(untimed)
    assert not {"saved_overhead_ms", "student_over_vanilla_ms"} & claims.keys()
    assert (
        claims["saved_overhead_nfe"].verdict
        == claims["student_over_vanilla_nfe"].verdict
        == "holds"
    )
    # Students of one share of corrections are compared only if both were distilled alike.
    with_elastic = [
        t.model_copy(update={"is_elastic": True}) if t.key == "pc 1,0" else t for t in trials
    ]
    assert "kept_over_pcformer" not in claims_of(with_elastic)
    assert find_claims(sample_front(trials)) == [], "no values of single items"


@pytest.mark.parametrize(("spread", "is_measured"), [(0.09, True), (0.11, False)])
def test_times_of_a_busy_machine_decide_nothing(spread, is_measured):
    trials = [
        t.with_numbers("cost", {"decode_ms_spread": spread * t.numbers["cost/decode_ms_per_token"]})
        if t.key == "1,0"
        else t
        for t in trials_with({})
    ]
    claims = claims_of(trials)
    assert claims["saved_overhead_nfe"].verdict == "holds"
    for key in ("saved_overhead_ms", "student_over_vanilla_ms"):
        assert (key in claims) == is_measured


def test_of_models_that_are_timed_as_one_the_same_is_told_in_any_order():
    times = {"decode_ms_per_token": 1.0, "decode_ms_spread": 0.5}
    models = model_results(
        sample_trial(key=label, label=label, cost=times) for label in ("teacher", "2,2,2")
    )
    sentence = busy_machine(models)
    assert sentence is not None
    assert busy_machine(models[::-1]) == sentence


def test_seeds_of_a_student_are_compared_with_their_own_teachers():
    trials = []
    for seed, share in enumerate((1.0, 0.9, 0.8)):
        for name in ("vanilla", "r = 2", "1,1"):
            accuracy = share * (0.7 if name == "vanilla" else 0.9)
            fields = {
                "key": f"{name}, {seed}",
                "label": f"{name}, {seed}",
                "seed": seed,
                "group": name,
            }
            fields["checkpoint"] = f"{name if name == 'vanilla' else 'r = 2'}, {seed}"
            if name == "1,1":
                fields["parent"] = f"weights {seed}"
            trials.append(model(name, accuracy, **fields))
    claims = claims_of(trials)
    saved = claims["saved_overhead_nfe"]
    assert (saved.verdict, saved.here, saved.kept) == ("holds", 50, 100)
    assert saved.kept_low == pytest.approx(100, abs=0.3), "all items answered alike"
    assert saved.over == "seeds and items"
    over = claims["iiet_over_vanilla"]
    assert over.here == pytest.approx(18, abs=0.1)
    # Student's t over differences of 20, 18 and 16 points.
    reach = 4.303 * 2 / math.sqrt(3)
    assert (over.low, over.high) == pytest.approx((18 - reach, 18 + reach), abs=0.1)


def test_the_table_of_claims_reads_as_stored(tmp_path):
    claims = [*claims_of(trials_with(dict.fromkeys(["pcformer", "pc 1,1", "pc 1,0"]))).values()]
    section = claims_section(claims, "Claims")
    console = Console(width=80, record=True, file=io.StringIO())
    for part in render_terminal([section]):
        console.print(part)
    parts = {
        "80 columns": console.export_text().splitlines(),
        "Markdown": [line for table in section.tables for line in table.to_markdown().splitlines()],
    }
    assert all(len(line) <= 80 for line in parts["80 columns"])
    assert_as_stored("claims.txt", parts, tmp_path)
