"""What a dry run tells of a sweep, against numbers made by hand.

The tiny model's training FLOPs of a token are 114,816 under 2,1, then 97,728, 80,448 and 63,264
under 1,1, 1,0 and 0,0; its forward pass takes a third; it has 10,146 parameters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from changed_trials import stop_early, with_job
from rich.console import Console

from iiet.influence import InfluenceTable
from orchestrator.models.folder import load_config
from orchestrator.planning.estimate import (
    LEAST_SECONDS,
    WRITE_BYTES_PER_SECOND,
    Price,
    assign_trial_gpus,
    on_trial_devices,
    price_of_trials,
)
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import SweepPlan, Trial, TrialSuite
from orchestrator.reporting.command_tables import price_rows
from orchestrator.settings import Settings, resolve_settings
from orchestrator.sweeping.plan import SweepModel, choose_members, iterations_plan, threshold_plan
from orchestrator.sweeping.trial_states import (
    plan_sentences,
    plan_table,
    requested_noun,
    trial_states,
)
from orchestrator.sweeping.trials import checkpoint_trial
from orchestrator.training.trainer import run_job
from orchestrator.workspace.layout import open_workspace

STEP = 64
"""Tokens of a step."""
ALL_FOUR = 114_816 + 97_728 + 80_448 + 63_264
TEACHER = 38_272


def settings(*assignments: str) -> Settings:
    return resolve_settings({}, assignments)


def price_left(plan: SweepPlan, chosen: Settings, teachers: Path) -> Price:
    trainings = [state.training for state in trial_states(plan, chosen.sweep) if state.training]
    placed = assign_trial_gpus(chosen)
    return price_of_trials(on_trial_devices(trainings, placed), placed, teachers)


def told(plan: SweepPlan, chosen: Settings) -> list[str]:
    states = trial_states(plan, chosen.sweep)
    return plan_sentences(plan, requested_noun(plan, chosen.sweep), states)


def rows(plan: SweepPlan, chosen: Settings, width: int = 80) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(plan_table(plan, trial_states(plan, chosen.sweep)))
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def finish(trial: Trial) -> None:
    trial.model_copy(update={"label": "another sweep's"}).write(trial.result_path)


def begin(trial: Trial, num_steps: int) -> float:
    """Train a trial until it is stopped, and return the FLOPs so far."""
    done = 0

    def should_stop() -> bool:
        nonlocal done
        done += 1
        return done > num_steps

    assert trial.job
    outcome = run_job(trial.job, should_stop=should_stop)
    assert outcome.step == num_steps
    return outcome.training_flops


def of_one(plan: SweepPlan, **recipe: Any) -> SweepPlan:
    """A plan of the costliest student alone, trained as a control without teacher."""
    student = with_job(plan.trials[1], recipe, objective="cross_entropy", teacher_folder=None)
    return plan.model_copy(update={"trials": (student,)})


def test_each_trial_is_a_row(tiny_plan: SweepPlan) -> None:
    finish(tiny_plan.trials[-1])
    found = rows(tiny_plan, settings())
    assert "model thresholds NFE FLOPs KV/token state" in found
    # Keys and values of 16 numbers in each evaluation; FLOPs beside the 40,672 of the full model.
    assert "teacher 5 100% 640 B to measure" in found
    assert "2,1 <=0.1 5 100% 640 B to train" in found
    assert "1,1 0.1 to 0.3 4 85% 512 B to train" in found
    assert "1,0 0.3 to 0.5 3 69% 384 B to train" in found
    assert "0,0 >0.5 2 54% 256 B finished" in found


def test_models_that_are_pretrained_before_a_plan_stand_in_its_table(tiny_plan: SweepPlan) -> None:
    teacher, first, *others = tiny_plan.trials
    rated = with_job(first, {"learning_rate": 1.0})
    plan = tiny_plan.model_copy(update={"trials": (teacher, rated, *others)})
    beside = tiny_plan.model_copy(update={"trials": (first,)})
    sweep, console = settings().sweep, Console(width=120)
    with console.capture() as captured:
        console.print(plan_table(plan, [*trial_states(plan, sweep), *trial_states(beside, sweep)]))
    assert captured.get().count("to train") == 5


def test_the_price_by_hand(tiny_plan: SweepPlan, tmp_path: Path) -> None:
    chosen = settings("sweep.trials_at_once=1", "distillation.teacher_cache=true")
    price = price_left(tiny_plan, chosen, tmp_path)
    assert price.num_tokens == 4 * 40 * STEP
    assert price.num_teacher_tokens == 40 * STEP, "its answers are stored once"
    assert price.flops == 40 * STEP * (ALL_FOUR + TEACHER)
    shortest, longest = price.hours
    assert price.rate
    highest = price.rate.peak_flops * price.rate.shares[1] * price.num_devices
    assert shortest == pytest.approx(price.flops / highest / 3600)
    assert longest == pytest.approx(5 * shortest), "a CPU reaches 10 to 50% of its peak"
    assert price.disk == {
        "checkpoints": 4 * 12 * 10_138,
        "teacher outputs": 40 * STEP * (300 * 4 + 4),  # Logits in float32, and the token.
    }
    words = dict(price_rows(price, {"this machine": None}))
    assert words["to train"] == (
        "4 trainings: 10,240 tokens, and the teacher reads 2,560; 1.01e+09 FLOPs"
    )
    assert "at 10 to 50% of 0.1 TFLOP/s each (a CPU core, assumed)" in words["time"]
    assert words["disk"].startswith(
        "at most 3.4 MiB: checkpoints 475 KiB, teacher outputs 2.94 MiB; "
    )
    assert words["on this machine"] == "it fits"
    assert words["stop"].startswith("at most 4 s after the step of the signal, to save two")
    # Two that are stopped at the same time write on the same disk.
    both = price_left(tiny_plan, settings("sweep.trials_at_once=2"), tmp_path)
    writing = 2 * 12 * 10_138 / WRITE_BYTES_PER_SECOND
    assert price.stop_seconds == pytest.approx(LEAST_SECONDS + writing, abs=writing / 4)
    assert both.stop_seconds == pytest.approx(LEAST_SECONDS + 2 * writing, abs=writing / 4)
    assert "of each of the 2 that train at once" in dict(price_rows(both, {}))["stop"]


def test_a_teacher_that_is_asked_live_reads_for_each(tiny_plan: SweepPlan, tmp_path: Path) -> None:
    live, two = "distillation.teacher_cache=false", ["gpus_per_trial=1", "trials_at_once=2"]
    chosen = settings(live, *(f"sweep.{one}" for one in two))
    cheapest_first = tiny_plan.model_copy(update={"trials": tiny_plan.trials[::-1]})
    price = price_left(cheapest_first, chosen, tmp_path)
    assert price.num_teacher_tokens == 4 * 40 * STEP
    assert "teacher outputs" not in price.disk
    assert price.flops == 40 * STEP * (ALL_FOUR + 4 * TEACHER)
    assert price.uses_gpus
    # The longest training starts first: one GPU trains 2,1 and 0,0, the other one 1,1 and 1,0.
    assert price.rate
    seconds = 3600 * price.hours[0] * price.rate.peak_flops * price.rate.shares[1]
    assert seconds == pytest.approx(40 * STEP * (97_728 + 80_448 + 2 * TEACHER))


@pytest.mark.parametrize(
    ("recipe", "flops"),
    [
        ({"iterate_from_fraction": 0.0}, 10 * 114_816),
        ({"iterate_from_fraction": 0.6}, 6 * 63_264 + 4 * 114_816),
        (
            {"iterate_from_fraction": 0.6, "iterate_ramp_fraction": 0.2},
            6 * 63_264 + 97_728 + 3 * 114_816,
        ),
    ],
)
def test_each_stage_has_its_own_price(
    tiny_plan: SweepPlan, tmp_path: Path, recipe: dict[str, float], flops: int
) -> None:
    plan, chosen = of_one(tiny_plan, num_steps=10, **recipe), settings()
    assert price_left(plan, chosen, tmp_path).flops == STEP * flops


def test_only_what_is_left_has_a_price(tiny_plan: SweepPlan, tmp_path: Path) -> None:
    chosen = settings("distillation.teacher_cache=false")
    student = tiny_plan.trials[1]
    spent = begin(student, 30)
    states = trial_states(tiny_plan, chosen.sweep)
    assert [state.steps_done for state in states] == [0, 30, 0, 0, 0]
    price = price_left(tiny_plan, chosen, tmp_path)
    assert price.num_tokens == (3 * 40 + 10) * STEP
    assert spent == 30 * STEP * (114_816 + TEACHER)
    assert spent + price.flops == 40 * STEP * (ALL_FOUR + 4 * TEACHER)
    assert "2,1 <=0.1 5 100% 640 B from step 30" in rows(tiny_plan, chosen)
    assert told(tiny_plan, chosen)[1] == ("0 of 5 trials are finished and reused, 1 partly trained")
    begin(student, 40)
    assert trial_states(tiny_plan, chosen.sweep)[1].name == "to measure"


def test_what_is_finished_or_was_stopped_costs_nothing(
    tiny_plan: SweepPlan, tmp_path: Path
) -> None:
    for trial in tiny_plan.trials[:3]:
        finish(trial)
    better, worse = tiny_plan.trials[3:]
    rated = with_job(better, {"learning_rate": 1.0})
    worse = worse.model_copy(update={"job": rated.job})
    tiny_plan = tiny_plan.model_copy(
        update={"kind": "iterations", "trials": (*tiny_plan.trials[:3], better, worse)}
    )
    chosen = settings("sweep.asha=true")
    stop_early(worse, better, chosen.sweep, 20)
    price = price_left(tiny_plan, chosen, tmp_path)
    assert price.num_tokens == 40 * STEP
    assert told(tiny_plan, chosen)[1] == (
        "3 of 5 trials are finished and reused, 1 stopped early and left so"
    )
    finish(better)
    finish(worse)
    assert told(tiny_plan, chosen)[1:] == ["5 of 5 trials are finished and reused"]
    nothing = price_left(tiny_plan, chosen, tmp_path)
    assert list(price_rows(nothing, {})) == [("to train", "nothing is left")]


def test_fifty_thresholds_come_to_nine_schedules(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    recipe = settings("training.num_steps=1", "training.num_tokens_per_step=64").training
    model = {**tiny_model, "num_layers": 4, "schedule": [2, 2, 2, 2]}
    folder = str(tmp_path / "teacher")
    job = TrainingJob(run_folder=folder, tokens_folder=str(tiny_tokens), model=model, recipe=recipe)
    teacher = Path(str(run_job(job).checkpoint))
    table = InfluenceTable(
        metric="cosine",
        value_rows=((0.8, 0.4), (0.7, 0.3), (0.6, 0.2), (0.5, 0.1)),
        error_rows=((0.0, 0.0),) * 4,
        num_tokens=64,
    )

    suite = TrialSuite(suite="x", tokens_folder=str(tiny_tokens))

    def first_line(*assignments: str) -> str:
        chosen = settings("distillation.training.num_tokens_per_step=64", *assignments)
        plan = threshold_plan(
            chosen,
            open_workspace(tmp_path),
            teacher=teacher,
            members=choose_members(table, chosen.sweep),
            suite=suite,
            baselines=[
                checkpoint_trial(
                    "baseline",
                    "vanilla",
                    teacher,
                    load_config(teacher),
                    suite,
                    open_workspace(tmp_path),
                )
            ],
        )
        return told(plan, chosen)[0]

    fifty = f"sweep.thresholds={[round(0.02 * n, 2) for n in range(50)]}"
    assert first_line(fifty) == "50 thresholds asked for, 9 distinct schedules"
    assert first_line(fifty, "sweep.seeds=[0, 1, 2]") == (
        "50 thresholds asked for, 9 distinct schedules, each under 3 seeds"
    )
    assert first_line("sweep.budgets=[12]") == "1 budget asked for, 1 distinct schedule"
    assert first_line("sweep.num_schedules=20") == "20 schedules asked for, 9 distinct schedules"


def test_models_from_scratch_are_counted_with_baselines_and_without_seeds(
    tiny_model: dict[str, Any], tiny_tokens: Path, tmp_path: Path
) -> None:
    chosen = settings("training.num_steps=10", "training.num_tokens_per_step=64")

    def plan_under(*seeds: int) -> SweepPlan:
        changes_of = {
            "vanilla": {"method": "vanilla", "schedule": None},
            "r = 1": {"schedule": [1, 1]},
            "1,1": {"schedule": [1, 1]},
        }
        models, jobs = [], []
        for label, changes in changes_of.items():
            for seed in seeds:
                group = label if len(seeds) > 1 else None
                models.append(
                    SweepModel(label=f"{label}, seed {seed}", settings=chosen, group=group)
                )
                job = TrainingJob(
                    run_folder=str(tmp_path / f"{changes}-{seed}"),
                    tokens_folder=str(tiny_tokens),
                    model={**tiny_model, **changes},
                    recipe=chosen.training.model_copy(update={"seed": seed}),
                )
                jobs.append(job)
        suite = TrialSuite(suite="x", tokens_folder=str(tiny_tokens))
        return iterations_plan(models, jobs, suite=suite)

    alone, seeded = plan_under(0), plan_under(0, 1)
    assert told(alone, chosen)[0] == "3 models asked for, 2 distinct"
    assert told(seeded, chosen)[0] == "3 models asked for, 2 distinct, each under 2 seeds"
    assert "thresholds" not in " ".join(rows(alone, chosen))


def test_learning_rates_are_shown_where_they_differ(
    tiny_model: dict[str, Any], tiny_tokens: Path, tmp_path: Path
) -> None:
    chosen = settings("training.num_steps=10", "training.num_tokens_per_step=64")

    def plan_at(*rates: float) -> SweepPlan:
        jobs = [
            TrainingJob(
                run_folder=str(tmp_path / f"{number}"),
                tokens_folder=str(tiny_tokens),
                model={**tiny_model, "schedule": [number, number]},
                recipe=chosen.training.model_copy(update={"learning_rate": rate}),
            )
            for number, rate in enumerate(rates)
        ]
        models = [SweepModel(label=f"r = {n}", settings=chosen) for n in range(len(rates))]
        suite = TrialSuite(suite="x", tokens_folder=str(tiny_tokens))
        return iterations_plan(models, jobs, suite=suite)

    found = rows(plan_at(2e-3, 4e-3), chosen)
    assert "model rate NFE FLOPs KV/token state" in found
    assert any(row.startswith("r = 1 0.004 4 ") for row in found), found
    assert "model NFE FLOPs KV/token state" in rows(plan_at(2e-3, 2e-3), chosen)


def test_a_first_stage_in_common_is_paid_once(
    tiny_model: dict[str, Any], tiny_tokens: Path, tmp_path: Path
) -> None:
    chosen = settings("training.num_steps=10", "training.iterate_from_fraction=0.6")

    schedules = [2, 1], [1, 1], [0, 0]
    jobs = [
        TrainingJob(
            run_folder=str(tmp_path / str(schedule)),
            tokens_folder=str(tiny_tokens),
            model={**tiny_model, "schedule": schedule},
            recipe=chosen.training.model_copy(update={"num_tokens_per_step": STEP}),
            first_stages=str(tmp_path / "first_stages"),
        )
        for schedule in schedules
    ]
    models = [SweepModel(label=str(schedule), settings=chosen) for schedule in schedules]
    suite = TrialSuite(suite="x", tokens_folder=str(tiny_tokens))
    plan = iterations_plan(models, jobs, suite=suite)
    price = price_left(plan, chosen, tmp_path)
    behind = 4 * (114_816 + 97_728 + 63_264)
    assert price.num_tokens == (6 + 3 * 4) * STEP
    assert price.flops == STEP * (6 * 63_264 + behind)
    first = plan.trials[0]
    assert first.job
    run_job(first.job)
    states = trial_states(plan, chosen.sweep)
    assert [state.text for state in states] == ["to measure", "from step 6", "from step 6"]
    price = price_left(plan, chosen, tmp_path)
    assert price.flops == STEP * 4 * (97_728 + 63_264)


def test_what_a_search_adds_is_told_apart(tiny_plan: SweepPlan, tmp_path: Path) -> None:
    first = tiny_plan.model_copy(update={"kind": "search", "num_requested": 3, "num_distinct": 3})
    assert told(first, settings("sweep.num_schedules=3"))[0] == (
        "3 schedules asked for, 3 distinct schedules; 1 more that the search suggested"
    )


def test_a_plan_is_strict_json(tiny_plan: SweepPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    tiny_plan.write(path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    stored = json.loads(path.read_text(), parse_constant=refuse)
    trials = [Trial.parse(values, path) for values in stored["trials"]]
    assert trials == list(tiny_plan.trials), "-infinity is back"
    assert [trial.threshold_text for trial in trials] == [
        "", "<=0.1", "0.1 to 0.3", "0.3 to 0.5", ">0.5",
    ]  # fmt: skip
