"""What commands print beside the front: plans with their price, evaluations with their errors,
influence tables.
"""

from __future__ import annotations

from rich import box
from rich.table import Table

from iiet.cost import training_flops_per_token
from iiet.influence import InfluenceTable
from orchestrator.analysis.evaluation import EvaluationResult
from orchestrator.plan import SweepPlan, exact_cost, full_config
from orchestrator.training.job import TrainingJob

ASSUMED_FLOPS_PER_SECOND = 20e9
"""What one CPU core does at the toy's sizes; only for the plan's rough hours."""


def plan_table(plan: SweepPlan) -> Table:
    """Return a plan's trials, in their order."""
    table = Table(title=f"Plan of {plan.name}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("thresholds")
    for title in ("evals", "FLOPs", "KV/token"):
        table.add_column(title, justify="right")
    table.add_column("state")
    full = full_config(plan)
    for trial in plan.trials:
        cost = exact_cost(trial.config(), full)
        thresholds = ""
        if trial.threshold_up_to is not None:
            thresholds = f"{trial.threshold_above:.3g} to {trial.threshold_up_to:.3g}"
        is_done = trial.result() is not None
        table.add_row(
            trial.label,
            thresholds,
            f"{cost['evaluations']:.0f}",
            f"{100 * cost['relative_flops']:.0f} %",
            f"{cost['kv_bytes_per_token'] / 1024:.1f} KiB",
            "finished" if is_done else "train and measure" if trial.job else "measure",
        )
    return table


def plan_price(plan: SweepPlan) -> list[str]:
    """Say in sentences what was merged, what is reused, and what the rest costs."""
    num_trials = sum(trial.role == "trial" for trial in plan.trials)
    waiting = [trial for trial in plan.trials if trial.result() is None]
    tokens = flops = 0.0
    for trial in waiting:
        if trial.job:
            job = TrainingJob.from_dict(trial.job)
            num_tokens = job.recipe.num_steps * job.recipe.num_tokens_per_step
            tokens += num_tokens
            flops += num_tokens * training_flops_per_token(trial.config())
            if job.teacher_folder:
                # The frozen teacher runs forward only: a third of a training step.
                flops += num_tokens * training_flops_per_token(full_config(plan)) / 3
    hours = flops / ASSUMED_FLOPS_PER_SECOND / 3600
    return [
        f"{plan.num_requested} asked for, {num_trials} distinct trials",
        f"{len(plan.trials) - len(waiting)} of {len(plan.trials)} are finished and are reused",
        f"the rest trains on {tokens:,.0f} tokens: {flops:.3g} FLOPs, "
        f"about {hours:.2g} core hours at {ASSUMED_FLOPS_PER_SECOND / 1e9:.0f} GFLOP/s",
    ]


def evaluation_table(evaluation: EvaluationResult) -> Table:
    """Return every task's metrics with their standard errors."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("task", "metric"):
        table.add_column(title)
    for title in ("value", "± error", "items"):
        table.add_column(title, justify="right")
    for name, result in evaluation.results.items():
        for metric, value in result.metrics.items():
            if metric.endswith("_stderr"):
                continue
            error = result.metrics.get(f"{metric}_stderr")
            table.add_row(
                name,
                metric,
                f"{value:.4f}",
                "" if error is None else f"{error:.4f}",
                f"{result.num_items:,}",
            )
    return table


def influence_view(influence: InfluenceTable) -> Table:
    """Return an influence table, one row a layer, with standard errors."""
    table = Table(
        title=f"Influence ({influence.metric}, {influence.num_tokens:,} tokens)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("layer", justify="right")
    for number in range(1, influence.schedule.max_corrections + 1):
        table.add_column(f"correction {number}", justify="right")
    for layer, (values, errors) in enumerate(
        zip(influence.values, influence.errors, strict=True), start=1
    ):
        cells = [f"{v:.4f} ± {e:.4f}" for v, e in zip(values, errors, strict=True)]
        table.add_row(str(layer), *cells)
    return table
