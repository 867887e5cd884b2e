"""What single commands print: evaluations, costs, influence, and what trainings take.

A sweep's report has its own chapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from iiet.cost import num_parameters
from iiet.iiad.pruning import InfluenceTable, ThresholdSchedule
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.metrics import STDERR_SUFFIX, stderr_name
from orchestrator.reporting.comparison import AVERAGE, Difference
from orchestrator.reporting.sections import Column, Table, TableRow
from orchestrator.reporting.statistics import INTERVAL_LEVEL, Interval
from orchestrator.terminal.render import (
    format_byte_parts,
    format_bytes,
    format_count,
    format_duration_range,
)

if TYPE_CHECKING:
    from orchestrator.data.preparation import ExpectedTokens
    from orchestrator.evaluation.decode_timing import MeasuredCost, MeasurementSettings
    from orchestrator.planning.estimate import Estimate
    from orchestrator.planning.price import Price

# Evaluations


def evaluation_table(
    evaluations: Mapping[str, EvaluationResult],
    differences: Sequence[Difference] = (),
    num_evaluations: Mapping[str, int | None] | None = None,
) -> Table:
    """Return a row for each task's metrics, with a column for each model, by its name.

    The tasks of the models may differ; their average is over the metrics marked with a star. Beside
    a model stands its difference to the first one, if there are `differences`. The last row says
    what the models cost, if any of `num_evaluations` is known.
    """
    names = [*evaluations]
    models = [*evaluations.values()]
    intervals = {
        (difference.model, difference.task, difference.metric): difference.interval
        for difference in differences
    }

    def row(
        task: str,
        metric: str,
        by_model: Sequence[Mapping[str, float]],
        items: int,
        *,
        is_averaged: bool,
    ) -> TableRow:
        cells = []
        for name, numbers in zip(names, by_model, strict=True):
            cells.append(_value_and_error(numbers, metric))
            if intervals and name != names[0]:
                interval = intervals.get((name, task, metric))
                cells.append("" if interval is None else _signed_interval(interval))
        shown_metric = f"{metric} *" if is_averaged else metric
        return TableRow((task, shown_metric, *cells, f"{items:,}"), is_first=task == AVERAGE)

    rows = []
    for task in dict.fromkeys(name for model in models for name in model.results):
        results = [model.results.get(task) for model in models]
        by_model = [result.metrics if result else {} for result in results]
        first_result = next(result for result in results if result)
        for metric in dict.fromkeys(name for numbers in by_model for name in numbers):
            if not metric.endswith(STDERR_SUFFIX):
                is_averaged = metric == first_result.accuracy_metric
                rows.append(
                    row(task, metric, by_model, first_result.num_items, is_averaged=is_averaged)
                )
    averages = [model.quality() for model in models]
    if any("accuracy" in average for average in averages):
        most = max(model.num_accuracy_items for model in models)
        rows.append(row(AVERAGE, "accuracy", averages, most, is_averaged=True))
    if num_evaluations and any(num_evaluations.values()):
        costs = []
        for name in names:
            known = num_evaluations[name]
            costs.append("" if known is None else f"{known:,}")
            if intervals and name != names[0]:
                costs.append("")
        rows.append(TableRow(("cost", "NFE", *costs, ""), is_first=True))
    heads = []
    for name in names:
        heads.append(name if len(names) > 1 else "value ± error")
        if intervals and name != names[0]:
            heads.append(f"vs {names[0]}")
    texts = (Column("task", is_text=True), Column("metric", is_text=True))
    return Table((*texts, *map(Column, heads), Column("items", 1)), rows)


def difference_notes(differences: Sequence[Difference]) -> list[str]:
    """Return the sentence on what differences are; none without any."""
    if not differences:
        return []
    return [
        f"vs {differences[0].against}: differences over the items that all models answered, with "
        f"their {INTERVAL_LEVEL:.0%} intervals; other trainings may differ by more"
    ]


def average_notes(evaluations: Mapping[str, EvaluationResult]) -> list[str]:
    """Return sentences on averages that lack some of the requested tasks."""
    return [
        f"the average{f' of {name}' if len(evaluations) > 1 else ''} is over "
        f"{', '.join(evaluation.accuracies)}, without {', '.join(evaluation.skipped)}"
        for name, evaluation in evaluations.items()
        if evaluation.skipped and evaluation.accuracies
    ]


def tasks_with_other_items(evaluations: Sequence[EvaluationResult]) -> list[str]:
    """Return the tasks whose items differ between the evaluations that include them."""
    items: dict[str, set[tuple[str, ...]]] = {}
    for evaluation in evaluations:
        for name, result in evaluation.results.items():
            items.setdefault(name, set()).add(tuple(result.items))
    return [name for name, different_items in items.items() if len(different_items) > 1]


def _signed_interval(interval: Interval) -> str:
    return f"{interval.value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"


def _value_and_error(metrics: Mapping[str, float], name: str) -> str:
    def text(value: float) -> str:
        if abs(value) < 10:
            return f"{value:.4f}"
        return f"{value:.1f}" if abs(value) < 1e4 else f"{value:.3g}"

    if name not in metrics:
        return ""
    error = metrics.get(stderr_name(name))
    return text(metrics[name]) + ("" if error is None else f" ± {text(error)}")


# Measured costs


def cost_and_share_tables(costs: Sequence[MeasuredCost]) -> list[Table]:
    """Return a table of costs and, of several models, shares of the full model's time.

    A row is a model under a condition; errors are half quartile ranges. Shares are in percent,
    predicted and measured.
    """
    # It imports PyTorch.
    from orchestrator.evaluation.decode_timing import DECODING, FIRST_TOKEN, PREDICTION, SIMPLEST

    tables: dict[str, tuple[list[str], Callable[[MeasuredCost], Sequence[str]]]] = {
        "Milliseconds and MiB": (
            ["first token", "per token", "tokens/s", "KV", "peak"],
            lambda cost: (
                f"{cost.first_token_ms:.2f} ± {cost.first_token_spread:.2f}",
                f"{cost.decode_ms:.2f} ± {cost.decode_spread:.2f}",
                f"{cost.tokens_per_second:,.0f}",
                _mebibytes(cost.kv_bytes),
                _mebibytes(cost.peak_bytes),
            ),
        )
    }

    def relative_time_cells(cost: MeasuredCost, phase: str) -> list[str]:
        time = cost.shares[phase]
        cells = [f"{100 * time.measured:.1f} ± {100 * time.spread:.1f}"]
        for name in (PREDICTION, SIMPLEST):
            cells += [f"{100 * time.predicted[name]:.1f}", f"{time.residual(name):+.1%}"]
        return cells

    heads = ["measured", f"by {PREDICTION}", f"{PREDICTION} off", "by NFE", "NFE off"]
    # The share of one model alone would be 100 percent.
    phases = (DECODING, FIRST_TOKEN) if len({cost.model for cost in costs}) > 1 else ()
    for phase in phases:
        title = f"Share of the full model's time, {phase}, in percent"
        tables[title] = (heads, partial(relative_time_cells, phase=phase))
    shown_tables = []
    for title, (names, cells) in tables.items():
        rows: list[TableRow] = []
        for condition, group in groupby(costs, lambda cost: f"{cost.batch_size} x {cost.context}"):
            for number, cost in enumerate(group):
                is_first = not number and bool(rows)
                rows.append(TableRow((condition, cost.model, *cells(cost)), is_first=is_first))
        columns = [Column("rows x\nprompt", is_text=True), Column("model", is_text=True)]
        columns += [Column(name, int("NFE" in name)) for name in names]
        shown_tables.append(Table(columns, rows, title))
    return shown_tables


def benchmark_sentences(costs: Sequence[MeasuredCost]) -> list[str]:
    """Return sentences on the size of the weights and, of several models, on the predictions."""
    from orchestrator.evaluation.decode_timing import DECODING, FIRST_TOKEN, PREDICTION, SIMPLEST

    sizes = dict.fromkeys(_mebibytes(cost.weight_bytes) for cost in costs)
    sentences = [f"weights: {', '.join(sizes)} MiB, part of each peak"]
    if len({cost.model for cost in costs}) < 2:
        return sentences
    for phase in (DECODING, FIRST_TOKEN):
        errors = {
            prediction: max(abs(cost.shares[phase].residual(prediction)) for cost in costs)
            for prediction in (PREDICTION, SIMPLEST)
        }
        sentences.append(
            f"{phase}: {PREDICTION} predict every share within {errors[PREDICTION]:.1%} "
            f"of it, {SIMPLEST} alone within {errors[SIMPLEST]:.1%}"
        )
    return sentences


def conditions_sentence(conditions: MeasurementSettings, *, device: str, dtype: str) -> str:
    """Return a sentence on how the costs were measured."""
    from orchestrator.evaluation.decode_timing import HOW_MEASURED

    return (
        f"{device}, {dtype}, {format_count(conditions.num_threads, 'thread')}; medians ± half the "
        f"quartile distance of {conditions.repetitions} repetitions in turns after a warm-up; "
        f"{conditions.new_tokens} new tokens, greedy, cached; peak: {HOW_MEASURED}"
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f}"


# Influence


def influence_tables(influence: InfluenceTable) -> list[Table]:
    """Return the influence with standard errors, then the residuals, if they were measured.

    The column `whole layer` is the influence of the layer as a whole, by which layers are left out.
    """
    values = [
        [_with_error(*pair) for pair in zip(*rows, strict=True)]
        for rows in zip(influence.value_rows, influence.error_rows, strict=True)
    ]
    title = f"Influence ({influence.metric}, {influence.num_tokens:,} tokens)"
    tables = [_by_layer(title, values, _whole_layers(influence))]
    if any(influence.residual_rows):
        residuals = [[f"{value:.2g}" for value in row] for row in influence.residual_rows]
        title = "Residual |g(e) - e| / |g(e)|, and its contraction factor"
        tables.append(_by_layer(title, residuals, _contractions(influence, ".2g")))
    return tables


def schedules_table(family: Sequence[ThresholdSchedule]) -> Table:
    """Return the schedules that thresholds give, a row for each, with the largest threshold."""
    columns = [Column("schedule", is_text=True), Column("NFE"), Column("threshold")]
    rows = []
    for member in family:
        threshold = f"{member.threshold_up_to:.3g}"
        if math.isinf(member.threshold_up_to):
            threshold = f">{member.threshold_above:.3g}"
        schedule = member.schedule
        rows.append(TableRow((str(schedule), str(schedule.num_evaluations), threshold)))
    return Table(columns, rows, "Schedules by threshold, as --schedule takes them")


def influence_table(influence: InfluenceTable) -> Table:
    """Return the influence and contraction factors, a row for each layer, for files."""
    values = [[f"{value:.3g}" for value in row] for row in influence.value_rows]
    return _by_layer("", values, _contractions(influence, ".3g") | _whole_layers(influence))


def _by_layer(
    title: str, rows: Sequence[Sequence[str]], further_columns: Mapping[str, Sequence[str]]
) -> Table:
    """Return a table of a row for each layer: its corrections, then further columns."""
    width = max(map(len, rows), default=0)
    heads = ["layer", *(f"correction {n}" for n in range(1, width + 1)), *further_columns]
    table_rows = []
    for layer, cells in enumerate(rows):
        padding = [""] * (width - len(cells))
        further_cells = [column[layer] for column in further_columns.values()]
        table_rows.append(TableRow([str(layer + 1), *cells, *padding, *further_cells]))
    return Table([*map(Column, heads)], table_rows, title)


def _contractions(influence: InfluenceTable, form: str) -> dict[str, list[str]]:
    # Layers with one correction have no factor.
    factors = influence.contractions or [math.nan] * len(influence.value_rows)
    return {"contraction": ["" if math.isnan(f) else f"{f:{form}}" for f in factors]}


def _whole_layers(influence: InfluenceTable) -> dict[str, list[str]]:
    errors = influence.layer_errors or [math.nan] * len(influence.layer_values)
    cells = [_with_error(*pair) for pair in zip(influence.layer_values, errors, strict=True)]
    return {"whole layer": cells} if cells else {}


def _with_error(value: float, error: float) -> str:
    """Return two significant digits of the error, and the value to the same decimal."""
    if math.isnan(error):  # A single batch has none.
        return f"{value:.2g}"
    digits = 2
    if value and error:
        digits += max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(error)))
    return f"{value:.{digits}g} ± {error:.2g}"


# What trainings take


def training_rows(
    training: Estimate, tokens: ExpectedTokens | None = None
) -> Iterator[tuple[str, str]]:
    """Yield what one training does, apart from its price."""
    recipe = training.recipe
    config = training.config
    yield "parameters", f"{num_parameters(config):,}"
    if tokens:
        yield "vocabulary", f"{config.vocab_size:,} ({tokens.origin})"
    num_tokens = recipe.num_steps * recipe.num_tokens_per_step
    epochs = ""
    if tokens and tokens.num_train_tokens:
        epochs = f", {num_tokens / tokens.num_train_tokens:.3g} epochs of the prepared ones"
    yield (
        "tokens",
        f"{num_tokens:,} in {recipe.num_steps:,} steps of {recipe.num_tokens_per_step:,}{epochs}",
    )
    yield (
        "a step",
        f"{training.sequences_per_worker * training.devices.num_workers:,} sequences of "
        f"{training.sequence_length:,} tokens; {training.sequences_per_worker:,} for each worker, "
        "in "
        f"{format_count(training.num_passes, 'pass', 'passes')} of at most "
        f"{training.sequences_per_pass}",
    )
    if training.stages:
        stages = []
        for schedule, num_steps in training.stages.items():
            r = schedule[0] if len(set(schedule)) == 1 else schedule
            stages.append(f"r = {r} for {num_steps:,} steps")
        drawn = format_count(training.num_cheaper, "cheaper schedule")
        members = f"; with corrections, each step also trains {drawn}"
        yield "corrections", ", then ".join(stages) + (members if training.num_cheaper else "")
    yield "a checkpoint", format_bytes(training.checkpoint_bytes)


def price_rows(price: Price, problems: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Yield what trainings take, and whether they fit.

    Args:
        problems: Place -> why they do not fit there; None if they do.
    """
    if not price.num_trainings:
        yield "to train", "nothing is left"
        return
    at_most = "at most " if price.is_upper_bound else ""
    trainings = format_count(price.num_trainings, "training")
    count = f"{trainings}: " if price.num_trainings > 1 else ""
    num_read = price.num_teacher_tokens
    teacher = f", and the teacher reads {num_read:,} for its students" if num_read else ""
    yield (
        "to train",
        f"{at_most}{count}{price.num_tokens:,} tokens{teacher}; {price.flops:.3g} FLOPs",
    )
    devices = format_count(price.num_devices, "GPU" if price.uses_gpus else "CPU")
    duration = format_duration_range(*(3600 * hours for hours in price.hours))
    further_time = format_duration_range(*(3600 * hours for hours in price.additional_hours))
    or_less = " or less" if price.is_upper_bound else ""
    yield (
        "training time",
        f"{duration}{or_less} on {devices}, {_speed_text(price)}; starts and measurements add "
        f"about {further_time}",
    )
    memory = format_bytes(sum(price.memory.values()))
    yield "memory", f"{memory} for each worker: {format_byte_parts(price.memory)}"
    disk = f"at most {format_bytes(sum(price.disk.values()))}: {format_byte_parts(price.disk)}"
    free = "" if price.free_disk is None else f"; {format_bytes(price.free_disk)} are free"
    yield "disk", f"{disk if price.disk else 'nothing more'}{free}"
    for place, problem in problems.items():
        yield f"on {place}", problem or "it fits"


def _speed_text(price: Price) -> str:
    """Say at which speeds the hours of trainings are computed, measured or assumed."""
    rate = price.rate
    if rate is None:
        return "at speeds that were measured in this workspace"
    shares = " to ".join(dict.fromkeys(f"{100 * share:g}" for share in rate.shares))
    assumption = f"at {shares}% of {rate.peak_flops / 1e12:,.3g} TFLOP/s each ({rate.source})"
    if price.num_assumed < price.num_trainings:
        others = format_count(price.num_assumed, "training")
        return f"at speeds that were measured in this workspace, but {others} {assumption}"
    return assumption
