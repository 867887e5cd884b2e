"""Findings of a front in sentences: which model to take, its cost, and whether it beats baselines.

A model is called better or worse only where the 95% interval of the difference excludes zero. The
interval is that of the draws; without values of single items it is 1.96 standard errors of separate
measurements, which is wider, so the sentences err on the careful side.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from orchestrator.records.trial import Trial
from orchestrator.reporting.front import Front, Row, is_accuracy, known, metric_title
from orchestrator.reporting.pick_rules import draft_sentences
from orchestrator.reporting.statistics import INTERVAL_LEVEL, KEPT_SHARE, ON_FRONT_METRIC
from orchestrator.reporting.tables import confidence_text, cost_text, quality_text
from orchestrator.terminal.render import join_names

COST_NOUNS = {
    "cost/evaluations": "NFE",
    "cost/relative_evaluations": "NFE",
    "cost/flops_per_token": "FLOPs",
    "cost/relative_flops": "FLOPs",
    "cost/kv_bytes_per_token": "key/value cache",
    "cost/decode_ms_per_token": "decoding time",
}
_KEPT = f"{KEPT_SHARE:.0%} of the full model's quality"
HIGH_CONFIDENCE = 0.95


def findings(front: Front) -> list[str]:
    """Return what the front says, the most useful sentence first."""
    full = front.full
    if full is None:
        return [f"No trial has been measured in {front.axes.in_words} yet."]
    kept = front.cheapest_keeping(KEPT_SHARE)
    kept = None if kept is full else kept
    sentences = _about_keeping(front, full, kept)
    if front.knee is not None and front.knee is not kept:
        sentences.append(f"The knee of the front is {describe_model(front, front.knee)}.")
    if front.best is not None and all(front.best is not row for row in (kept, front.knee, full)):
        sentences.append(f"The best model is {describe_model(front, front.best)}.")
    choice = kept or full
    for baseline in (row for row in front.rows if row["role"] == "baseline" and row is not choice):
        peer = None
        if baseline["trial"].is_distilled_baseline:
            # It was made to match the cost of a schedule.
            peer = min(
                (row for row in front.rows if row["role"] == "trial"),
                key=lambda row: (abs(row["cost"] - baseline["cost"]), -row["goodness"]),
                default=None,
            )
        sentences.append(
            _comparison(front, baseline, peer, ", the schedule of the nearest cost,")
            if peer
            else _comparison(front, baseline, choice)
        )
    sentences += _about_random_start(front, full["trial"])
    sentences += draft_sentences(front.trials)
    if front.unmeasured:
        names = join_names([row["name"] for row in front.unmeasured])
        sentences.append(f"Models that lack a measurement are not on the front: {names}.")
    if any(measured == front.axes.quality for _, measured, _ in front.intervals):
        sentences.append(_about_confidence(front))
    return sentences


def describe_model(front: Front, row: Row) -> str:
    """Return one clause on a model: its name, quality, cost and confidence."""
    full, share = front.full, front.share(row)
    text = f"{row['label']} with {_quality(front, row)}"
    if full is not None and share is not None and full["cost"]:
        noun = COST_NOUNS.get(front.axes.cost, metric_title(front.axes.cost))
        text += (
            f", {share:.1%} of the full model's, at {row['cost'] / full['cost']:.0%} of its {noun} "
            f"({cost_text(row['cost'])} of {cost_text(full['cost'])})"
        )
    if row is full:
        return text
    claims = {
        f"keeps {100 * front.kept_share:.4g}%": front.keeps(row),
        "is on the front": known(row, ON_FRONT_METRIC),
    }
    certain = [
        f"{claim} with confidence {confidence_text(number)}"
        for claim, number in claims.items()
        if number is not None
    ]
    return f"{text}; it {' and '.join(certain)}" if certain else text


def _about_keeping(front: Front, full: Row, kept: Row | None) -> list[str]:
    keeps = {
        row["key"]: sure
        for row in front.rows
        if row["is_candidate"] and (sure := front.keeps(row)) is not None
    }
    cheaper = [row for row in front.rows if row["key"] in keeps and row["cost"] < full["cost"]]
    if kept is not None:
        sentences = [f"The cheapest model that keeps {_KEPT} is {describe_model(front, kept)}."]
    else:
        sentences = [f"No cheaper model keeps {_KEPT}."]
        likeliest = max(cheaper, key=lambda row: keeps[row["key"]], default=None)
        if likeliest is not None:
            likely = describe_model(front, likeliest)
            sentences.append(f"The model that most likely keeps it is {likely}.")
    if keeps and not (kept is not None and keeps.get(kept["key"], 0.0) >= HIGH_CONFIDENCE):
        confident = [row for row in cheaper if keeps[row["key"]] >= HIGH_CONFIDENCE]
        at_least = f"with a confidence of {HIGH_CONFIDENCE} or more"
        if confident:
            cheapest = describe_model(front, min(confident, key=lambda row: row["cost"]))
            sentences.append(f"The cheapest model that keeps it {at_least} is {cheapest}.")
        elif kept is not None:
            sentences.append(f"No cheaper model keeps {_KEPT} {at_least}.")
    return sentences


def _about_confidence(front: Front) -> str:
    basis = front.basis
    assert basis is not None
    left_out = f"; {basis.num_left_out:,} items that only some answered are left out"
    covered = (
        "It covers the seeds of models that have several, but no other trainings."
        if any(len(row["seeds"]) > 1 for row in front.rows)
        else "It does not cover other trainings."
    )
    return (
        f"A confidence is the share of {basis.num_resamples:,} draws in which the claim holds. "
        f"Each draw samples {basis.num_items:,} of the {basis.num_items:,} items that all models "
        f"answered, with replacement{left_out if basis.num_left_out else ''}. {covered}"
    )


def _about_random_start(front: Front, full: Trial) -> list[str]:
    """Say on how many tokens distilled baselines trained that did not start from the teacher."""
    trials = [row["trial"] for row in front.rows]
    fresh = [
        trial.numbers.get("train/tokens", 0)
        for trial in trials
        if trial.is_distilled_baseline and trial.job and not trial.job.initial_folder
    ]
    if not fresh:
        return []
    seen = full.numbers.get("train/tokens")
    of_teacher = f"{seen:,.0f} tokens" if seen else "all tokens"
    return [
        f"The distilled vanilla models started from random weights and trained on "
        f"{max(fresh):,.0f} tokens; the students' weights also saw {of_teacher} of the teacher's "
        "training. sweep.distilled_vanilla_steps gives those models more steps."
    ]


def _comparison(front: Front, baseline: Row, choice: Row, about: str = "") -> str:
    """Compare a baseline with a model; `about` says more of the model."""
    scale, unit = (100, " points") if is_accuracy(front.axes.quality) else (1, "")
    sign = 1 if front.axes.higher_is_better else -1
    paired = front.intervals.get((choice["key"], front.axes.quality, baseline["label"]))
    if paired is not None:
        better, is_significant = sign * paired.value, paired.excludes_zero
        # The size is positive, so the interval of a worse choice is turned around.
        side = sign if better >= 0 else -sign
        low, high = sorted(side * scale * bound for bound in (paired.low, paired.high))
        digits = 1 if unit else 3
        size = (
            f"{abs(scale * better):.{digits}f}{unit}, {low:.{digits}f} to {high:.{digits}f} in "
            f"{INTERVAL_LEVEL:.0%} of the draws"
        )
    else:
        better = choice["goodness"] - baseline["goodness"]
        error = math.hypot(known(choice, "error") or 0.0, known(baseline, "error") or 0.0)
        reach = NormalDist().inv_cdf((1 + INTERVAL_LEVEL) / 2) * error
        is_significant = abs(better) > reach
        size = f"{abs(scale * better):.2g}{unit}"
        if error:
            low, high = (scale * (abs(better) + side * reach) for side in (-1, 1))
            size += f", {low:.2g} to {high:.2g} at {INTERVAL_LEVEL:.0%}, unpaired"

    other = choice["label"] + about
    claim = f"and {other} differ by less than these items can resolve ({size})"
    if is_significant:
        claim = f"is {'worse' if better > 0 else 'better'} than {other} by {size}"
    beaten = [row["label"] for row in front.members_beaten_by(baseline)]
    also = f"; it beats {join_names(beaten)} on the front" if beaten else ""
    return f"{baseline['label']} ({_quality(front, baseline)}) {claim}{also}."


def _quality(front: Front, row: Row) -> str:
    name = metric_title(front.axes.quality).lower()
    return f"{name} {quality_text(front, row)}{'%' if is_accuracy(front.axes.quality) else ''}"
