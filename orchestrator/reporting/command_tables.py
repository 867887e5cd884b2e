"""What single commands print: evaluations, costs, influence, and what trainings take.

Each is made from its data once, in several layouts where a terminal may be too narrow for the
widest. `comparison.py` and the sweep's report have their own chapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table

from iiet.cost import num_parameters
from iiet.influence import InfluenceTable
from orchestrator.data.preparation import ExpectedTokens
from orchestrator.evaluation.cost_measurement import (
    DECODING,
    FIRST_TOKEN,
    HOW_MEASURED,
    PREDICTION,
    SIMPLEST,
    MeasuredCost,
    MeasurementSettings,
)
from orchestrator.planning.estimate import Estimate, Price
from orchestrator.records.evaluation import STDERR_SUFFIX, EvaluationResult
from orchestrator.reporting.sections import markdown_table
from orchestrator.terminal.render import (
    ResponsiveLayout,
    format_byte_parts,
    format_bytes,
    format_count,
    format_duration,
    format_duration_range,
)

AVERAGE = "average"


def number_table(
    texts: Sequence[str],
    numbers: Sequence[str],
    rows: Iterable[Sequence[str] | None],
    *,
    folds: str = "",
    title: str | None = None,
) -> Table:
    """Return a table of columns of texts, aligned left, and of numbers, aligned right.

    Args:
        texts: Titles of the first columns.
        numbers: Titles of the others.
        rows: Cells of each row; None draws a line.
        folds: The column of texts that folds where the terminal is too narrow.
        title: Stands above the table.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in texts:
        can_fold = name == folds
        overflow: Literal["fold", "ellipsis"] = "fold" if can_fold else "ellipsis"
        table.add_column(name, no_wrap=not can_fold, overflow=overflow)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        if cells is None:
            table.add_section()
        else:
            table.add_row(*cells)
    return table


def two_column_table(title: str | None, rows: Sequence[tuple[str, str]]) -> Table:
    """Return names and texts as a table."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("how much", overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    return table


# Evaluations


def evaluation_table(evaluations: Mapping[str, EvaluationResult]) -> ResponsiveLayout:
    """Return every task's metrics: a column for each model, or on narrow terminals a row.

    The evaluations are by name of the model; their tasks may differ.
    """
    names, models = list(evaluations), list(evaluations.values())
    rows: list[tuple[str, str, list[str], str]] = []  # Task, metric, cell of each model, items.
    for task in dict.fromkeys(name for model in models for name in model.results):
        found = [model.results.get(task) for model in models]
        measured = [result for result in found if result]
        num_items = f"{measured[0].num_items:,}"
        for metric in dict.fromkeys(name for result in measured for name in result.metrics):
            if not metric.endswith(STDERR_SUFFIX):
                cells = [_value_and_error(each.metrics if each else {}, metric) for each in found]
                # The average is over the marked metrics.
                mark = " *" if metric == measured[0].accuracy_metric else ""
                rows.append((task, metric + mark, cells, num_items))
    averages = [model.quality() for model in models]
    if any("accuracy" in average for average in averages):
        cells = [_value_and_error(average, "accuracy") for average in averages]
        num_items = f"{max(model.num_accuracy_items for model in models):,}"
        rows.append((AVERAGE, "accuracy *", cells, num_items))

    wide: list[list[str] | None] = []
    by_task: list[list[str] | None] = []
    by_model: list[list[str] | None] = []
    for task, metrics in groupby(rows, key=lambda row: row[0]):
        several = list(metrics)
        if task == AVERAGE:
            for layout in (wide, by_task, by_model):
                layout.append(None)
        by_task.append([f"{task}: {several[0][3]}"])
        by_model.append([task, "", several[0][3]])
        for _, metric, cells, num_items in several:
            wide.append([task, metric, *cells, num_items])
            by_task.append([f"  {metric}", *cells])
            by_model.append([f"  {metric}", cells[0] if len(names) == 1 else "", ""])
            if len(names) > 1:
                by_model += [[f"    {name}", c, ""] for name, c in zip(names, cells, strict=True)]
    heads = names if len(names) > 1 else ["value ± error"]
    narrower = [cells and cells[:-1] for cells in wide]
    return ResponsiveLayout(
        number_table(["task", "metric"], [*heads, "items"], wide),
        number_table(["task", "metric"], heads, narrower),
        number_table(["task"], heads, by_task),
        number_table(["task"], ["value ± error", "items"], by_model, folds="task"),
    )


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
    return [name for name, kinds in items.items() if len(kinds) > 1]


def _value_and_error(metrics: Mapping[str, float], name: str) -> str:
    def text(value: float) -> str:
        if abs(value) < 10:
            return f"{value:.4f}"
        return f"{value:.1f}" if abs(value) < 1e4 else f"{value:.3g}"

    if name not in metrics:
        return ""
    error = metrics.get(name + STDERR_SUFFIX)
    # No-break spaces, so that narrow terminals fold the names and not the numbers.
    return text(metrics[name]) + ("" if error is None else f"\u00a0±\u00a0{text(error)}")


# Measured costs

_Columns = Sequence[tuple[str, Callable[[MeasuredCost], str]]]


def cost_and_share_tables(costs: Sequence[MeasuredCost]) -> list[ResponsiveLayout]:
    """Return a table of costs and, of several models, shares of the full model's time.

    A row is a model under a condition; errors are half quartile ranges. Shares are in percent,
    predicted and measured.
    """
    several = len({cost.model for cost in costs}) > 1

    def table(title: str, columns: _Columns) -> Table:
        rows: list[list[str] | None] = []
        for condition, group in groupby(costs, lambda cost: f"{cost.batch_size} x {cost.context}"):
            rows += [[condition, c.model, *(cell(c) for _, cell in columns)] for c in group]
            if several:
                rows.append(None)
        heads = [name for name, _ in columns]
        return number_table(["rows x\nprompt", "model"], heads, rows, folds="model", title=title)

    def shares(phase: str) -> ResponsiveLayout:
        def percent(prediction: str) -> Callable[[MeasuredCost], str]:
            return lambda cost: f"{100 * cost.shares[phase].predicted[prediction]:.1f}"

        def residual(prediction: str) -> Callable[[MeasuredCost], str]:
            return lambda cost: f"{cost.shares[phase].residual(prediction):+.1%}"

        def measured(cost: MeasuredCost) -> str:
            share = cost.shares[phase]
            return f"{100 * share.measured:.1f} ± {100 * share.spread:.1f}"

        columns: _Columns = [
            ("measured", measured),
            (f"by {PREDICTION}", percent(PREDICTION)),
            ("off", residual(PREDICTION)),
            ("by NFE", percent(SIMPLEST)),
            ("off", residual(SIMPLEST)),
        ]
        title = f"Share of the full model's time, {phase}, in percent"
        return ResponsiveLayout(table(title, columns), table(title, columns[:3]))

    times: _Columns = [
        ("first token", lambda cost: f"{cost.first_token_ms:.2f} ± {cost.first_token_spread:.2f}"),
        ("per token", lambda cost: f"{cost.decode_ms:.2f} ± {cost.decode_spread:.2f}"),
    ]
    others: _Columns = [
        ("tokens/s", lambda cost: f"{cost.tokens_per_second:,.0f}"),
        ("KV", lambda cost: _mebibytes(cost.kv_bytes)),
        ("peak", lambda cost: _mebibytes(cost.peak_bytes)),
    ]
    narrow = Group(table("Milliseconds", times), table("Speed and MiB", others))
    layouts = [ResponsiveLayout(table("Milliseconds and MiB", [*times, *others]), narrow)]
    return layouts + [shares(phase) for phase in (DECODING, FIRST_TOKEN) if several]


def benchmark_sentences(costs: Sequence[MeasuredCost]) -> list[str]:
    """Return sentences on the size of the weights and the errors of the predictions."""
    sizes = dict.fromkeys(_mebibytes(cost.weight_bytes) for cost in costs)
    weights = f"weights: {', '.join(sizes)} MiB, part of each peak"
    return [weights, *prediction_error_sentences(costs)]


def prediction_error_sentences(costs: Sequence[MeasuredCost]) -> list[str]:
    """Return sentences on the errors of the predictions; none if there is only one model."""
    if len({cost.model for cost in costs}) < 2:
        return []
    sentences = []
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
    return (
        f"{device}, {dtype}, {format_count(conditions.num_threads, 'thread')}; medians ± half the "
        f"quartile distance of {conditions.repetitions} repetitions in turns after a warm-up; "
        f"{conditions.new_tokens} new tokens, greedy, cached; peak: {HOW_MEASURED}"
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f}"


# Influence


def influence_terminal_table(influence: InfluenceTable) -> Group:
    """Return the influence with standard errors, then the residuals; a row for each layer.

    A narrow terminal shows a table in parts, as few as its width allows. The column `whole layer`
    is the layer's block influence, by which whole layers are dropped.
    """

    def in_parts(title: str, columns: Mapping[str, Sequence[str]]) -> ResponsiveLayout:
        def part(first: int, count: int) -> Table:
            heads = [*columns][first : first + count]
            layers = map(str, range(1, len(influence.value_rows) + 1))
            rows = zip(layers, *(columns[head] for head in heads), strict=True)
            return number_table((), ["layer", *heads], rows, title=None if first else title)

        counts = range(len(columns), 0, -1)
        parts = ([part(n, count) for n in range(0, len(columns), count)] for count in counts)
        return ResponsiveLayout(*(Group(*tables) for tables in parts))

    values = [
        [_with_error(*pair) for pair in zip(*rows, strict=True)]
        for rows in zip(influence.value_rows, influence.error_rows, strict=True)
    ]
    title = f"Influence ({influence.metric}, {influence.num_tokens:,} tokens)"
    tables = [in_parts(title, _by_correction(values) | _whole_layers(influence))]
    if influence.residual_rows:
        residuals = [[f"{value:.2g}" for value in row] for row in influence.residual_rows]
        title = "Residual |g(e) - e| / |g(e)|, and its contraction factor"
        tables.append(in_parts(title, _by_correction(residuals) | _contractions(influence, ".2g")))
    return Group(*tables)


def influence_columns(influence: InfluenceTable) -> dict[str, list[str]]:
    """Return the influence and contraction factors by title of a column, a cell for each layer."""
    return {
        "layer": [str(layer) for layer in range(1, len(influence.value_rows) + 1)],
        **_by_correction([[f"{value:.3g}" for value in row] for row in influence.rows()]),
        **_contractions(influence, ".3g"),
        **_whole_layers(influence),
    }


def influence_markdown(influence: InfluenceTable) -> str:
    """Return the influence and contraction factors in Markdown, one row for each layer."""
    columns = influence_columns(influence)
    return markdown_table(list(columns), zip(*columns.values(), strict=True), left=())


def _by_correction(rows: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Turn a row for each layer, of its corrections, into columns."""
    width = max(map(len, rows), default=0)
    return {
        f"correction {n + 1}": [row[n] if n < len(row) else "" for row in rows]
        for n in range(width)
    }


def _contractions(influence: InfluenceTable, form: str) -> dict[str, list[str]]:
    # Layers with one correction have no factor.
    factors = influence.contractions or [math.nan] * len(influence.value_rows)
    return {"contraction": ["" if math.isnan(f) else f"{f:{form}}" for f in factors]}


def _whole_layers(influence: InfluenceTable) -> dict[str, list[str]]:
    cells = [f"{value:.2g}" for value in influence.layer_values]
    return {"whole layer": cells} if cells else {}


def _with_error(value: float, error: float) -> str:
    """Return two significant digits of the error, and the value to the same decimal."""
    if math.isnan(error):  # A single batch has none.
        return f"{value:.2g}"
    digits = 2
    if value and error:
        digits += max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(error)))
    return f"{value:.{digits}g}\u00a0±\u00a0{error:.2g}"


# What trainings take


def training_rows(
    training: Estimate, tokens: ExpectedTokens | None = None
) -> Iterator[tuple[str, str]]:
    """Yield what one training does, apart from its price."""
    recipe, config = training.recipe, training.config
    yield "parameters", f"{num_parameters(config):,}"
    if tokens:
        yield "vocabulary", f"{config.vocab_size:,} ({tokens.origin})"
    num_tokens, epochs = recipe.num_steps * recipe.num_tokens_per_step, ""
    if tokens and tokens.num_train_tokens:
        epochs = f", {num_tokens / tokens.num_train_tokens:.3g} epochs of the prepared ones"
    yield (
        "tokens",
        f"{num_tokens:,} in {recipe.num_steps:,} steps of {recipe.num_tokens_per_step:,}{epochs}",
    )
    yield (
        "a step",
        f"{training.sequences_per_worker * training.devices.num_workers:,} sequences of "
        f"{config.context_length:,} tokens; {training.sequences_per_worker:,} for each worker, in "
        f"{format_count(training.num_passes, 'pass', 'passes')} of at most "
        f"{training.sequences_per_pass}",
    )
    if training.stages:
        stages = []
        for schedule, num_steps in training.stages.items():
            r = schedule[0] if len(set(schedule)) == 1 else schedule
            stages.append(f"r = {r} for {num_steps:,} steps")
        drawn = format_count(training.num_members, "cheaper schedule")
        beside = f"; with corrections, each step also trains {drawn}"
        yield "corrections", ", then ".join(stages) + (beside if training.num_members else "")
    yield "a checkpoint", format_bytes(training.checkpoint_bytes)


def price_rows(price: Price, problems: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Yield what trainings take, and whether they fit.

    Args:
        problems: Place -> why they do not fit there; None if they do.
    """
    rate = price.rate
    if not price.num_trainings or rate is None:
        yield "to train", "nothing is left"
        return
    at_most = "at most " if price.is_upper_bound else ""
    trainings = format_count(price.num_trainings, "training")
    count = f"{trainings}: " if price.num_trainings > 1 else ""
    read = price.num_teacher_tokens
    teacher = f", and the teacher reads {read:,}" if read else ""
    yield (
        "to train",
        f"{at_most}{count}{price.num_tokens:,} tokens{teacher}; {price.flops:.3g} FLOPs",
    )
    devices = format_count(price.num_devices, "GPU" if price.uses_gpus else "CPU")
    shares = " to ".join(dict.fromkeys(f"{100 * share:g}" for share in rate.shares))
    duration = format_duration_range(*(3600 * hours for hours in price.hours))
    yield (
        "time",
        f"{at_most}{duration} on {devices}, at {shares}% of "
        f"{rate.peak_flops / 1e12:,.3g} TFLOP/s each ({rate.source}); validation, saving and "
        "measuring come on top",
    )
    several = price.num_saving > 1
    many = f" of each of the {price.num_saving} that train at once" if several else ""
    yield (
        "stop",
        f"at most {format_duration(price.stop_seconds)} after the step of the signal, to save two "
        f"checkpoints{many}",
    )
    memory = format_bytes(sum(price.memory.values()))
    yield "memory", f"{memory} for each worker: {format_byte_parts(price.memory)}"
    disk = format_bytes(sum(price.disk.values()))
    free = "" if price.free_disk is None else f"; {format_bytes(price.free_disk)} are free"
    yield "disk", f"at most {disk}: {format_byte_parts(price.disk)}{free}"
    for place, problem in problems.items():
        yield f"on {place}", problem or "it fits"
