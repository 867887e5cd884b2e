"""A dry run's sentences, table and price of a sweep equal numbers made by hand.

The tiny model's training FLOPs of a token are 114,816 under 2,1, then 97,728, 80,448 and 63,264
under 1,1, 1,0 and 0,0; its forward pass takes a third; it has 10,146 parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from changed_trials import stop_early, with_job
from refusals import assert_names, refused
from rich.console import Console
from same_run import stop_at

from iiet.cost import inference_cost
from iiet.iiad.pruning import InfluenceTable
from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.planning import price as pricing
from orchestrator.planning.price import Price, price_of
from orchestrator.planning.trial_gpus import assign_trial_gpus, on_trial_devices
from orchestrator.records.evaluation import Suite
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.reporting.command_tables import price_rows
from orchestrator.reporting.costs import exact_cost
from orchestrator.settings import EvaluationSettings, Settings, resolve_settings
from orchestrator.sweeping.plan_text import plan_sentences, plan_table
from orchestrator.sweeping.states import trial_states
from orchestrator.sweeping.suite import load_tasks, plan_suite
from orchestrator.sweeping.trials import mean_influence, trials_of_jobs
from orchestrator.terminal.progress import Progress
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError

STEP = 64
"""Tokens of a step."""
ALL_FOUR = 114_816 + 97_728 + 80_448 + 63_264
"""FLOPs of a token in the trainings of all four students, without their teacher."""
TEACHER = 38_272
"""FLOPs of a token that the teacher reads for a student: a third of those of 2,1."""


def settings(*assignments: str) -> Settings:
    return resolve_settings({}, assignments)


def price_left(plan: SweepTrials, chosen: Settings, folder: Path) -> Price:
    trainings = [state.training for state in trial_states(plan, chosen.sweep) if state.training]
    placed = assign_trial_gpus(chosen)
    return price_of(on_trial_devices(trainings, placed), folder)


def sentences_of(plan: SweepTrials, chosen: Settings) -> list[str]:
    return plan_sentences(plan, chosen.sweep, trial_states(plan, chosen.sweep))


def rows(plan: SweepTrials, chosen: Settings, *others: SweepTrials) -> list[str]:
    states = [
        state for each_plan in (plan, *others) for state in trial_states(each_plan, chosen.sweep)
    ]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(plan_table(plan, states))
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def begin(trial: Trial, num_steps: int) -> float:
    """Train a trial until it is stopped, and return the FLOPs so far."""
    outcome = run_job(trial.job, should_stop=stop_at(num_steps))
    assert outcome.step == num_steps
    return outcome.training_flops


# Tables and prices


def test_each_trial_is_a_row_also_one_that_is_pretrained_before(tiny_plan):
    tiny_plan.trials[-1].write(tiny_plan.trials[-1].result_path)
    lines = rows(tiny_plan, settings())
    assert "model thresholds NFE FLOPs KV/token state" in lines
    # Keys and values of 16 numbers in each evaluation; FLOPs beside the 40,672 of the full model.
    assert "teacher 5 100% 640 B to measure" in lines
    assert "2,1 <=0.1 5 100% 640 B to train" in lines
    assert "1,1 0.1 to 0.3 4 85% 512 B to train" in lines
    assert "1,0 0.3 to 0.5 3 69% 384 B to train" in lines
    assert "0,0 >0.5 2 54% 256 B finished" in lines
    rated = with_job(tiny_plan.trials[1], {"learning_rate": 1.0})
    with_rates = tiny_plan.model_copy(update={"trials": (rated,)})
    lines = rows(tiny_plan, settings(), with_rates)
    assert "model thresholds rate NFE FLOPs KV/token state" in lines
    assert "2,1 <=0.1 1 5 100% 640 B to train" in lines


def test_a_plan_says_how_many_schedules_it_has(tiny_plan):
    [contents, *_] = sentences_of(tiny_plan, settings())
    assert f"{tiny_plan.num_distinct} distinct schedules" in contents
    single_plan = tiny_plan.model_copy(update={"trials": tiny_plan.trials[1:2], "num_distinct": 1})
    [contents, *_] = sentences_of(single_plan, settings())
    assert contents.endswith("1 distinct schedule")


def test_the_price_by_hand(tiny_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(pricing, "SECONDS_PER_EVALUATION", (0.0, 0.0))
    price = price_left(tiny_plan, settings("sweep.trials_at_once=1"), tmp_path)
    assert price.num_tokens == price.num_teacher_tokens == 4 * 20 * STEP
    assert price.flops == 20 * STEP * (ALL_FOUR + 4 * TEACHER)
    shortest, longest = price.hours
    highest = price.rate.peak_flops * price.rate.shares[1] * price.num_devices
    assert shortest == pytest.approx(price.flops / highest / 3600)
    assert longest == pytest.approx(4 * shortest), "a CPU reaches 20 to 80% of its peak"
    assert price.disk == {"checkpoints": 4 * 12 * 10_138}
    words = dict(price_rows(price, {"this machine": None}))
    assert words["to train"] == (
        "4 trainings: 5,120 tokens, and the teacher reads 5,120 for its students; 6.52e+08 FLOPs"
    )
    assert "at 20 to 80% of 0.1 TFLOP/s each (a CPU core, assumed)" in words["training time"]
    assert [name for name in words if "time" in name] == ["training time"]
    assert words["disk"].count("475 KiB") == 2
    resumed = dict(price_rows(price.model_copy(update={"disk": {}}), {}))
    assert resumed["disk"].startswith("nothing more; ")
    assert words["on this machine"] == "it fits"

    # The longest training starts first: one GPU trains 2,1 and 0,0, the other one 1,1 and 1,0.
    on_gpus = settings("sweep.gpus_per_trial=1", "sweep.trials_at_once=2")
    cheapest_first = tiny_plan.model_copy(update={"trials": tiny_plan.trials[::-1]})
    price = price_left(cheapest_first, on_gpus, tmp_path)
    assert price.uses_gpus
    seconds = 3600 * price.hours[0] * price.rate.peak_flops * price.rate.shares[1]
    assert seconds == pytest.approx(20 * STEP * (97_728 + 80_448 + 2 * TEACHER))


def test_only_what_is_left_has_a_price(tiny_plan, tmp_path):
    chosen = settings()
    teacher, *students = tiny_plan.trials
    students = [with_job(student, {"num_steps": 4}) for student in students]
    plan = tiny_plan.model_copy(update={"trials": (teacher, *students)})
    spent = begin(students[0], 3)
    states = trial_states(plan, chosen.sweep)
    assert [state.steps_done for state in states] == [0, 3, 0, 0, 0]
    price = price_left(plan, chosen, tmp_path)
    assert price.num_tokens == (3 * 4 + 1) * STEP
    assert spent == 3 * STEP * (114_816 + TEACHER)
    assert spent + price.flops == 4 * STEP * (ALL_FOUR + 4 * TEACHER)
    assert "2,1 <=0.1 5 100% 640 B from step 3" in rows(plan, chosen)
    assert_names(sentences_of(plan, chosen)[1], "0 of 5 trials", "1 partly trained")
    begin(students[0], 4)
    assert trial_states(plan, chosen.sweep)[1].status == "to measure"


def test_what_is_finished_or_was_stopped_costs_nothing(tiny_plan, tmp_path):
    *finished_trials, better, worse = tiny_plan.trials
    rated = with_job(better, {"learning_rate": 1.0})
    worse = worse.model_copy(update={"job": rated.job})
    trials = (*finished_trials, better, worse)
    plan = tiny_plan.model_copy(update={"kind": "iterations", "trials": trials})
    chosen = settings("sweep.asha=true")
    for trial in finished_trials:
        trial.write(trial.result_path)
    stop_early(worse, better, chosen.sweep, 10)
    assert price_left(plan, chosen, tmp_path).num_tokens == 20 * STEP
    assert sentences_of(plan, chosen)[1] == (
        "3 of 5 trials are finished and reused, 1 stopped early and left so"
    )
    for trial in (better, worse):
        trial.write(trial.result_path)
    assert "5 of 5 trials" in sentences_of(plan, chosen)[1]
    nothing = price_left(plan, chosen, tmp_path)
    assert list(price_rows(nothing, {})) == [("to train", "nothing is left")]


# Models from scratch


@pytest.fixture
def plan_of(tiny_model, tiny_tokens, tmp_path) -> Any:
    """A function that plans models from scratch, each given by changes of the model, and the recipe
    of all; `seeds` and `rates` multiply them."""

    def make(
        models: list[dict[str, Any]], *, seeds: tuple[int, ...] = (), rates: tuple[float, ...] = (),
        **recipe: Any,
    ) -> SweepTrials:  # fmt: skip
        usual_recipe = settings(
            "training.num_steps=10", "training.num_tokens_per_step=64",
            "training.num_validation_tokens=64",
        ).training  # fmt: skip
        jobs = {}
        for number, model in enumerate(models):
            for seed in seeds or (None,):
                changes = {**recipe, **({} if seed is None else {"seed": seed})}
                if rates:
                    changes["learning_rate"] = rates[number]
                jobs[f"model {number}, seed {seed}"] = TrainingJob(
                    run_folder=str(tmp_path / f"{model}-{seed}"),
                    tokens_folder=str(tiny_tokens),
                    model={**tiny_model, **model},
                    recipe=usual_recipe.model_copy(update=changes),
                )
        return trials_of_jobs(jobs, Suite(suite="x", tokens_folder=str(tiny_tokens)))

    return make


def test_each_model_pays_for_its_steps_without_corrections(plan_of, tmp_path):
    models = [{"schedule": schedule} for schedule in ([2, 1], [1, 1], [0, 0])]
    plan = plan_of(models, iterate_from_fraction=0.6)
    price = price_left(plan, settings(), tmp_path)
    behind = 4 * (114_816 + 97_728 + 63_264)
    assert price.num_tokens == 3 * 10 * STEP
    assert price.flops == STEP * (3 * 6 * 63_264 + behind)
    run_job(plan.trials[0].job)
    states = trial_states(plan, settings().sweep)
    assert [(s.status, s.steps_done) for s in states] == [
        ("to measure", 0), ("to train", 0), ("to train", 0)
    ]  # fmt: skip
    price = price_left(plan, settings(), tmp_path)
    assert price.flops == STEP * (2 * 6 * 63_264 + 4 * (97_728 + 63_264))


# Costs and keys


def test_relative_costs_relate_to_the_full_model(tiny_model):
    full = ModelConfig.from_dict(tiny_model)
    without_corrections = ModelConfig.from_dict({**tiny_model, "schedule": [0, 0]})
    cost = exact_cost(without_corrections, full)
    assert (cost["evaluations"], cost["relative_evaluations"]) == (2, 2 / 5)
    full_flops = inference_cost(full).decode_flops_per_token
    assert (
        cost["relative_flops"]
        == inference_cost(without_corrections).decode_flops_per_token / full_flops
    )
    assert cost["relative_flops"] != 2 / 5, "the head is not evaluated more often"
    assert exact_cost(full, full)["relative_flops"] == 1.0
    # One token after a full context: a forward pass over one gives its tokens less attention.
    assert exact_cost(full, full)["flops_per_token"] == full_flops == 40_672
    assert without_corrections.corrections == IterationSchedule((0, 0))


TASK = """task: first
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: acc}}]
"""


def test_other_items_under_the_same_name_and_another_precision_are_other_trials(
    tmp_path, tiny_tokens, tiny_model
):
    config = ModelConfig.from_dict(tiny_model)

    def suite_of(folder: str, words: str, *changes: tuple[str, str], **options: Any) -> Any:
        file = tmp_path / folder / "first.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'{{"context": "a", "target": " {words}"}}\n')
        text = TASK.format(file=file)
        for old, new in changes:
            text = text.replace(old, new)
        (file.parent / "first.yaml").write_text(text)
        evaluation = EvaluationSettings(suite="first", include_path=str(file.parent), **options)
        suite = plan_suite(
            evaluation, tiny_tokens, config, load_tasks(evaluation, tiny_tokens, config, Progress())
        )
        values = suite.model_dump(mode="json").items()
        return {name: value for name, value in values if not name.endswith("_folder")}

    expected = suite_of("one", "b")
    assert suite_of("one", "b") == expected
    assert suite_of("two", "b") == expected, "where the files stand does not matter"
    assert suite_of("two", "c") != expected
    assert suite_of("one", "b", precision="fp32") == expected
    assert suite_of("one", "b", precision="bf16") == {**expected, "precision": "bf16"}
    with_instruction = suite_of("one", "b", system_instruction="Answer.")
    assert with_instruction["fingerprints"] != expected["fingerprints"]
    long = ("metric: acc}]", "metric: exact_match}]\ngeneration_kwargs: {max_gen_toks: 999}")
    with refused(UserError, "first", "999"):
        suite_of("one", "b", long, (": loglikelihood", ": generate_until"))


def test_the_mean_influence_of_seeds_is_a_mean_of_all_that_was_measured():
    def table(value: float) -> InfluenceTable:
        rows = ((value, value / 2), (), (value / 4,))
        layers = (value, value / 8, 0.0)
        return InfluenceTable(
            "loss",
            value_rows=rows,
            error_rows=rows,
            num_tokens=64,
            residual_rows=rows,
            layer_values=layers,
            layer_errors=layers,
            layer_accuracy_lost=layers,
            accuracy_lost_rows=rows,
        )

    assert mean_influence([table(1.0), table(3.0)]) == table(2.0)
