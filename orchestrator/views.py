"""What commands print beside the front: plans with their price, evaluations with their errors,
influence tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from iiet.cost import training_flops_per_token
from iiet.influence import InfluenceTable
from orchestrator.analysis.evaluation import STDERR, EvaluationResult
from orchestrator.plan import SweepPlan, exact_cost, full_config
from orchestrator.settings import DistillationSettings
from orchestrator.training.job import TrainingJob
from orchestrator.training.teacher_choice import teacher_tokens

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


def plan_price(plan: SweepPlan, distillation: DistillationSettings, teachers: Path) -> list[str]:
    """Say in sentences what was merged, what is reused, and what the rest costs.

    Args:
        plan: The sweep.
        distillation: Says whether the teacher runs once for all students.
        teachers: Folder of what teachers were stored to say.
    """
    num_trials = sum(trial.role == "trial" for trial in plan.trials)
    waiting = [trial for trial in plan.trials if trial.result() is None]
    jobs = [TrainingJob.from_dict(trial.job) for trial in waiting if trial.job]
    tokens = flops = 0.0
    for job in jobs:
        num_tokens = job.recipe.num_steps * job.recipe.num_tokens_per_step
        tokens += num_tokens
        flops += num_tokens * training_flops_per_token(job.config())
    read = teacher_tokens(jobs, distillation, teachers)
    # The frozen teacher runs forward only: a third of a training step.
    flops += read * training_flops_per_token(full_config(plan)) / 3
    hours = flops / ASSUMED_FLOPS_PER_SECOND / 3600
    told = f" and its teacher reads {read:,.0f}" if read else ""
    return [
        f"{plan.num_requested} asked for, {num_trials} distinct trials",
        f"{len(plan.trials) - len(waiting)} of {len(plan.trials)} are finished and are reused",
        f"the rest trains on {tokens:,.0f} tokens{told}: {flops:.3g} FLOPs, "
        f"about {hours:.2g} core hours at {ASSUMED_FLOPS_PER_SECOND / 1e9:.0f} GFLOP/s",
    ]


def evaluation_table(evaluations: Mapping[str, EvaluationResult]) -> Table:
    """Return every task's metrics with their standard errors, one column a model.

    Args:
        evaluations: Name of the model to what was measured; the tasks may differ.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in evaluations if len(evaluations) > 1 else ["value ± error"]:
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("items", justify="right")
    models = list(evaluations.values())
    tasks = dict.fromkeys(name for model in models for name in model.results)
    for task in tasks:
        results = [model.results.get(task) for model in models]
        known = [result for result in results if result]
        for metric in dict.fromkeys(name for result in known for name in result.metrics):
            if not metric.endswith(STDERR):
                cells = [
                    _metric_cell(result.metrics if result else {}, metric) for result in results
                ]
                # The one that the average counts.
                mark = " *" if metric == known[0].accuracy_metric else ""
                table.add_row(task, metric + mark, *cells, f"{known[0].num_items:,}")
    averages = [model.quality() for model in models]
    if any("accuracy" in average for average in averages):
        table.add_section()
        cells = [_metric_cell(average, "accuracy") for average in averages]
        table.add_row("average", "accuracy *", *cells, f"{models[0].num_items:,}")
    return table


def _metric_cell(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    error = metrics.get(name + STDERR)
    # Held together, so that narrow terminals fold the names and not the numbers.
    return _number(metrics[name]) + ("" if error is None else f"\u00a0±\u00a0{_number(error)}")


def _number(value: float) -> str:
    if abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.1f}" if abs(value) < 1e4 else f"{value:.3g}"


def tasks_with_other_items(evaluations: Sequence[EvaluationResult]) -> list[str]:
    """Return the tasks whose items are not the same in all evaluations that have them."""
    items: dict[str, set[tuple[str, ...]]] = {}
    for evaluation in evaluations:
        for name, result in evaluation.results.items():
            items.setdefault(name, set()).add(tuple(result.items))
    return [name for name, kinds in items.items() if len(kinds) > 1]


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
