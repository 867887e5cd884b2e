"""How far each trial of a plan is, and the plan in a terminal: a table, and sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table

from iiet.cost import inference_cost
from orchestrator.planning.estimate import Estimate
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.settings import SweepSettings
from orchestrator.sweeping.trials import (
    early_stops,
    full_config,
    num_distilled_baselines,
    num_models,
)
from orchestrator.terminal.render import ResponsiveLayout, format_bytes, format_count
from orchestrator.training.job import finished_outcome


@dataclass(frozen=True, kw_only=True)
class TrialState:
    """How far a trial is."""

    trial: Trial
    name: Literal["finished", "stopped early", "to measure", "to train"]
    """Its state, or what is done next."""
    training: Estimate | None = None
    """Its training, if that is not finished."""

    @property
    def steps_done(self) -> int:
        """Training steps that it resumes after."""
        return self.training.steps_done if self.training else 0

    @property
    def text(self) -> str:
        """The state in a table."""
        return f"from step {self.steps_done:,}" if self.steps_done else self.name


def trial_states(plan: SweepPlan, sweep: SweepSettings) -> list[TrialState]:
    """Return how far each trial of a plan is."""
    stops, states = early_stops(plan, sweep), []
    for trial in plan.trials:
        if trial.result():
            states.append(TrialState(trial=trial, name="finished"))
        elif trial.key in stops:
            states.append(TrialState(trial=trial, name="stopped early"))
        elif trial.job is None or finished_outcome(trial.job):
            states.append(TrialState(trial=trial, name="to measure"))
        else:
            training = Estimate.of(trial.job)
            states.append(TrialState(trial=trial, name="to train", training=training))
    return states


def requested_noun(plan: SweepPlan, sweep: SweepSettings) -> str:
    """Return what `num_requested` of a plan counts."""
    if plan.kind == "iterations":
        return "model"
    return "threshold" if sweep.thresholds else "budget" if sweep.budgets else "schedule"


def plan_table(plan: SweepPlan, states: Sequence[TrialState]) -> ResponsiveLayout:
    """Return a table of a plan's trials and their states; narrow terminals show fewer columns.

    Learning rates and numbers of layers are shown if they differ.
    """
    without: list[set[str]] = [set()]
    for title in ("KV/token", "FLOPs", "thresholds", "rate", "layers"):
        without.append({*without[-1], title})
    return ResponsiveLayout(*(_plan_table(plan, states, titles) for titles in without))


def _plan_table(plan: SweepPlan, states: Sequence[TrialState], left_out: Container[str]) -> Table:
    trials = [state.trial for state in states]  # A plan may lack those that the run pretrains.
    rates = [trial.job.recipe.learning_rate if trial.job else None for trial in trials]
    full_flops = inference_cost(full_config(plan)).decode_flops_per_token
    costs = [inference_cost(state.trial.model) for state in states]
    columns = {
        "model": [state.trial.label for state in states],
        "thresholds": [state.trial.threshold_text for state in states],
        "rate": ["" if rate is None else f"{rate:g}" for rate in rates],
        "layers": [str(trial.model.num_layers) for trial in trials],
        "NFE": [str(cost.evaluations_per_token) for cost in costs],
        "FLOPs": [f"{cost.decode_flops_per_token / full_flops:.0%}" for cost in costs],
        "KV/token": [format_bytes(cost.kv_bytes_per_token) for cost in costs],
        "state": [state.text for state in states],
    }
    if not any(columns["thresholds"]):
        del columns["thresholds"]
    if len(set(rates) - {None}) <= 1:
        del columns["rate"]
    if len(set(columns["layers"])) <= 1:
        del columns["layers"]
    columns = {title: cells for title, cells in columns.items() if title not in left_out}
    table = Table(title=f"Plan of {plan.name}", title_justify="left", box=box.SIMPLE_HEAD)
    for title in columns:
        justify: Literal["left", "right"] = (
            "left" if title in ("model", "thresholds", "state") else "right"
        )
        if title == "model":
            table.add_column(title, overflow="fold")
        else:
            table.add_column(title, justify=justify, no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def plan_sentences(plan: SweepPlan, noun: str, states: Sequence[TrialState]) -> list[str]:
    """Say what was merged, and what is reused.

    Args:
        noun: What the plan's `num_requested` counts, such as `threshold`.
    """
    made = "" if noun == "model" else " schedule" if plan.num_distinct == 1 else " schedules"
    asked = (
        f"{format_count(plan.num_requested, noun)} asked for, {plan.num_distinct:,} distinct{made}"
    )
    num_seeds = len({trial.seed for trial in plan.trials if trial.seed is not None})
    asked += f", each under {format_count(num_seeds, 'seed')}" if num_seeds else ""
    if num_baselines := num_distilled_baselines(plan.trials):
        asked += f"; {format_count(num_baselines, 'distilled baseline')}"
    num_more = num_models(plan.trials) - plan.num_distinct
    asked += f"; {num_more:,} more that the search suggested" if num_more else ""

    names = Counter(state.name for state in states)
    are = "is" if len(states) == 1 else "are"
    found = (
        f"{names['finished']:,} of {format_count(len(states), 'trial')} {are} finished and reused"
    )
    if num_stopped := names["stopped early"]:
        found += f", {num_stopped:,} stopped early and left so"
    if num_begun := sum(bool(state.steps_done) for state in states):
        found += f", {num_begun:,} partly trained"
    return [asked, found] if plan.num_distinct else [found]
