"""Measure how much each correction, and each whole layer, of a checkpoint matters.

The table with influence, residuals and contraction factors is stored in the checkpoint's folder as
`influence-<metric>.json`, with a picture, and is read again if settings and tokens are the same.
The calibration set is spread evenly over the held-out tokens, which are the same for every model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, computed_field
from rich.console import RenderableType

from iiet.cost import inference_cost
from iiet.iiad.pruning import (
    InfluenceTable,
    LeavingRound,
    ThresholdSchedule,
    num_passes,
    num_passes_one_at_a_time,
    schedule_family,
    spread_over_cost,
    table_of_rounds,
)
from iiet.model.facts import facts_of, metric_facts_of
from orchestrator.cluster.work import Executor, command_executor
from orchestrator.data.mixture import describe_data, open_data
from orchestrator.data.preparation import tokens_folder_of
from orchestrator.models.folder import (
    load_config,
    stored_recipe,
    trained_sequence_length,
    weights_key,
)
from orchestrator.models.labels import model_name
from orchestrator.models.open import open_model
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.models import imported_model
from orchestrator.planning import machine
from orchestrator.planning.price import measuring_hours
from orchestrator.records.influence import (
    StoredInfluence,
    StoredRounds,
    influence_path,
    rounds_path,
)
from orchestrator.records.record import Influence
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.reporting.command_tables import influence_tables, schedules_table
from orchestrator.reporting.output import Plan, Result
from orchestrator.reporting.sections import two_column_table
from orchestrator.settings import ClusterSettings, Settings
from orchestrator.settings.evaluation import usual_metric
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count, format_duration_range
from orchestrator.terminal.stop import end_if_stop_requested
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import Workspace, find_workspace
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from iiet.decoder import Decoder
    from iiet.model.batch import Batch
    from iiet.model.schedule import IterationSchedule

SEQUENCES_PER_BATCH = 8
"""Small, because standard errors are over batches, of which there should be many."""
SMALLEST_CHANGE = {"cosine": 1 - math.cos(0.01), "relative": 0.01}
"""Metric -> influence of a correction that changes its layer's output by 1 %. Corrections that were
just added to a plain model change less, and students gain nothing by them."""
LONGEST_SEQUENCE = 1024
"""Most tokens of a sequence for a model that was trained elsewhere. Its training's sequence length
is unknown, and its whole context would take minutes for each pass."""
NUM_PROPOSED = 7
"""Schedules of the threshold family that are shown with the influence; a sweep's default number."""


class InfluencePlan(Plan):
    """The influence of a checkpoint's corrections: stored, or to be measured."""

    checkpoint: Path
    """The model."""
    metric: str
    """What is measured."""
    tokens_folder: Path
    """The model's training tokens."""
    num_tokens: int
    """Held-out tokens that are read."""
    path: Path
    """File of the table, in the checkpoint's folder."""
    table: InfluenceTable | None = Field(exclude=True)
    """The stored table."""
    sequence_length: int = Field(exclude=True)
    """Tokens of a sequence: those of the model's training, if known."""
    key: str = Field(exclude=True)
    """Hash of everything that determines the table."""
    num_layers: int = Field(exclude=True)
    """Layers of the model."""
    whole_layers: bool | None = Field(exclude=True)
    """Whether whole layers are measured; None: if that needs no further pass."""
    one_at_a_time: bool = Field(exclude=True)
    """Whether whole layers are measured again after each removed layer."""
    num_passes: int
    """Remaining forward passes of each token: one under the full schedule, and if the metric needs
    it one without each correction or layer. 0 if the table is stored."""
    flops: float
    """FLOPs of these passes."""
    num_evaluations: int = Field(exclude=True)
    """Field evaluations of all batches in these passes, each of which the host must start."""
    cluster: ClusterSettings = Field(exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def is_stored(self) -> bool:
        """Whether the table is stored."""
        return self.table is not None

    def hours(self, *, on_gpu: bool) -> tuple[float, float]:
        """Return the shortest and longest hours of the remaining passes."""
        if self.is_stored:
            return 0.0, 0.0
        return measuring_hours(self.flops, self.num_evaluations, on_gpu=on_gpu)

    def text(self, *, on_gpu: bool) -> str:
        """Return the remaining passes and their duration as text."""
        if self.is_stored:
            return "stored"
        passes = format_count(self.num_passes, "pass", "passes")
        duration = format_duration_range(*(3600 * hours for hours in self.hours(on_gpu=on_gpu)))
        return f"{passes} over {self.num_tokens:,} tokens, {self.flops:.3g} FLOPs, about {duration}"

    def shown(self) -> Iterable[RenderableType]:
        may_use_gpu = self.cluster.device != "cpu" and bool(machine.installed_gpus())
        text = self.text(on_gpu=self.cluster.num_gpus > 0 or may_use_gpu)
        rows = [("model", str(self.checkpoint)), (f"influence ({self.metric})", text)]
        yield two_column_table("Plan of the measurement", rows)


class InfluenceResult(Result):
    """The influence of a checkpoint's corrections."""

    merged = ("table",)

    checkpoint: Path
    """The model that was measured."""
    table: Influence
    """Influence, standard errors and residuals, per layer and correction.

    Keys:
        metric: what was measured
        num_tokens: over how many tokens
        values: influence, one list per layer, one number per correction
        errors: standard errors of the values
        residuals: residual of each correction
        contractions: contraction factor of each layer
        layers: influence of each whole layer
        layer_errors: standard errors of the influence of whole layers
        layer_accuracy_lost: with `--metric loss` on a task, loss of accuracy without each layer
        accuracy_lost: with `--metric loss` on a task, loss of accuracy when the layer stops before
            each correction
    """

    @computed_field  # type: ignore[prop-decorator]
    @property
    def schedule(self) -> list[int]:
        """The model's corrections per layer."""
        return list(self.table.schedule)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def schedules(self) -> list[str]:
        """Schedules that thresholds give, costliest first, as `--schedule` takes them; empty if all
        corrections, or layers of a plain model, have the same influence."""
        return [str(member.schedule) for member in self._proposed]

    @property
    def _proposed(self) -> tuple[ThresholdSchedule, ...]:
        table = self.table
        max_left_out = 0
        influences = {value for row in table.value_rows for value in row}
        if not table.schedule.num_corrections:  # At most half of the layers go, as in a sweep.
            max_left_out = len(table.layer_values) // 2
            influences = set(table.layer_values)
        if len(influences) < 2:  # A threshold would keep all or none.
            return ()
        family = schedule_family(table, max_left_out=max_left_out)
        return spread_over_cost(family, NUM_PROPOSED)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per layer and correction: influence, its standard error, residual.

        Without corrections, one row per layer: influence of the whole layer, and standard error.
        """
        table = self.table
        if not table.schedule.num_corrections:
            errors = table.layer_errors or [math.nan] * len(table.layer_values)
            pairs = zip(table.layer_values, errors, strict=True)
            return [
                {"layer": layer, "layer_influence": value, "stderr": error}
                for layer, (value, error) in enumerate(pairs, start=1)
            ]
        residual_rows = table.residual_rows or [()] * len(table.value_rows)
        by_layer = zip(table.value_rows, table.error_rows, residual_rows, strict=True)
        rows = []
        for layer, columns in enumerate(by_layer, start=1):
            # A layer may have no residuals.
            cells = zip_longest(*columns, fillvalue=math.nan)
            for number, (value, error, residual) in enumerate(cells, start=1):
                rows.append(
                    {
                        "layer": layer,
                        "correction": number,
                        "influence": value,
                        "stderr": error,
                        "residual": residual,
                    }
                )
        return rows

    def shown(self) -> Iterable[RenderableType]:
        yield f"model: {self.checkpoint}"
        yield from influence_tables(self.table)
        if self._proposed:
            yield schedules_table(self._proposed)


def plan_influence(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    model: Path | str | None = None,
    leaves_out_layers: bool | None = None,
    progress: Progress | None = None,
) -> InfluencePlan:
    """Return the stored influence of a checkpoint, or what remains to be measured.

    Arguments and errors are those of `measure_influence`, except that no model is imported.

    Args:
        leaves_out_layers: Whether the chosen schedules may leave layers out; when unset, if the
            model has no corrections.
    """
    space = find_workspace(workspace)
    note = (progress or Progress()).note
    opened = open_model(model, space, folders="none", with_corrections=True, note=note)
    checkpoint = opened.path
    config = load_config(checkpoint)
    if facts_of(config.method).repeats_stack:
        raise UserError(
            f"{checkpoint} is a model ({config.method}) that repeats the whole stack, so no layer "
            "has corrections of its own whose influence could be measured; take an IIET with r >= 1"
        )
    tokens_folder = tokens_folder_of(checkpoint, space)
    data = open_data(tokens_folder)
    if data.vocab_size > config.vocab_size:
        raise UserError(
            f"{checkpoint} knows {config.vocab_size} tokens, but {data.folder} uses "
            f"{data.vocab_size}: these are not the tokens it was trained on"
        )
    one_at_a_time = settings.influence.one_at_a_time
    if leaves_out_layers is None:
        leaves_out_layers = one_at_a_time or not config.corrections.num_corrections
    metric = settings.influence.metric or usual_metric(of_whole_layers=leaves_out_layers)
    num_tokens = settings.influence.num_tokens
    if data.num_validation_tokens and data.num_validation_tokens < num_tokens:
        note(
            f"influence.num_tokens={num_tokens}: {tokens_folder.name} holds out "
            f"{data.num_validation_tokens:,} tokens, and all of them are read"
        )
        num_tokens = data.num_validation_tokens
    sequence_length = trained_sequence_length(checkpoint) or config.context_length
    if not stored_recipe(checkpoint) and data.num_validation_tokens:
        sequence_length = min(config.context_length, LONGEST_SEQUENCE, num_tokens)
    version = metric_facts_of(metric).version
    key = content_key(
        "influence",
        weights_key(checkpoint),
        list(config.corrections),
        data.fingerprint,
        metric,
        num_tokens,
        # Absent at their defaults, so that earlier keys stay valid.
        *([version] if version > 1 else []),
        *(
            [["sequence_length", sequence_length]]
            if sequence_length != config.context_length
            else []
        ),
        *(["one_at_a_time"] if one_at_a_time else []),
    )

    path = influence_path(checkpoint, metric)
    stored = StoredInfluence.read(path)
    table = stored.table if stored and stored.key == key else None
    if table is not None and leaves_out_layers and not table.layer_values:
        table = None  # Corrections alone were measured before.
    whole_layers = True if leaves_out_layers else None

    # Schedule -> forward passes under it, or of one of its layers less; none if all is stored:
    # counting costs loads PyTorch, which a command that reads results does without.
    passes: dict[IterationSchedule, int] = {}
    if table is None:
        full = config.corrections
        passes[full] = num_passes(metric, full, whole_layers=bool(whole_layers))
        if one_at_a_time:
            for num_gone in range(config.num_layers - 1):  # One layer stays.
                # It is unknown which layers will be gone; the first ones represent them.
                schedule = full.leaving_out(range(num_gone))
                num_of_round = num_passes_one_at_a_time(metric, config.num_layers - num_gone, 1)
                passes[schedule] = passes.get(schedule, 0) + num_of_round
    costs = {
        schedule: inference_cost(config, schedule, context_length=sequence_length)
        for schedule in passes
    }
    flops_per_token = sum(
        number * costs[schedule].forward_flops_per_token for schedule, number in passes.items()
    )
    evaluations_per_batch = sum(
        number * costs[schedule].evaluations_per_token for schedule, number in passes.items()
    )
    num_batches = math.ceil(num_tokens / (SEQUENCES_PER_BATCH * sequence_length))
    return InfluencePlan(
        checkpoint=checkpoint,
        metric=metric,
        tokens_folder=tokens_folder,
        num_tokens=num_tokens,
        path=path,
        table=table,
        sequence_length=sequence_length,
        key=key,
        num_layers=config.num_layers,
        whole_layers=whole_layers,
        one_at_a_time=one_at_a_time,
        num_passes=sum(passes.values()),
        flops=num_tokens * flops_per_token,
        num_evaluations=num_batches * evaluations_per_batch,
        cluster=settings.cluster,
    )


def run_influence(
    plan: InfluencePlan, context: Context, *, executor: Executor | None = None
) -> InfluenceResult:
    """Measure how much each correction of each layer matters; a stored table is read again.

    Args:
        executor: Where it is measured; as the settings say when unset.
    """
    progress = context.progress
    started_ms = now_ms()
    table = plan.table
    executor = executor or command_executor(plan.cluster, context.workspace.root)
    progress.start(f"influence ({plan.metric})")
    if table is None:
        table = executor.run(partial(_measure, plan), progress)
        from orchestrator.reporting.charts import influence_chart, save_chart  # Imports vl-convert.

        title = "Influence of each correction"
        try:
            if table.schedule.num_corrections:
                chart = influence_chart(table.value_rows, metric=table.metric, title=title)
                save_chart(chart, plan.path.with_suffix(""), formats=["png"])
            StoredInfluence(key=plan.key, table=table).write(plan.path)
        except OSError as error:
            progress.note(f"cannot store the influence in the checkpoint: {error}")
    progress.finish(summary(table) + (", found again" if plan.is_stored else ""))

    files = [str(plan.path)]
    if table.schedule.num_corrections:  # Otherwise there is no picture.
        files.append(str(plan.path.with_suffix(".png")))
    context.log_measurement(
        TrackedRun.of(
            key=plan.key,
            name=f"influence {table.metric} of {model_name(plan.checkpoint)}",
            kind="influence",
            params={
                "metric": table.metric,
                "schedule": table.schedule,
                "num_tokens": table.num_tokens,
                "checkpoint": plan.checkpoint,
            },
            dataset=describe_data(plan.tokens_folder),
            points=tracked_points(table),
            files={"influence": files},
        ),
        started_ms,
        found_again=plan.is_stored,
    )
    return InfluenceResult(checkpoint=plan.checkpoint, table=table)


def measure_influence(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    model: Path | str | None = None,
    progress: Progress | None = None,
) -> InfluenceResult:
    """Measure how much each correction of each layer matters; a stored table is read again.

    Args:
        settings: Sections `influence` and `cluster`.
        model: A checkpoint or run, by path or name, or `hub:OWNER/NAME`; the newest finished IIET
            with corrections when unset. In a model without corrections, whole layers are measured.

    Raises:
        UserError: If there is no such model, its method repeats the whole stack, its tokens are
            not in the workspace, the checkpoint or the tokens are damaged, or they do not fit.
    """
    model = imported_model(model, workspace, progress)
    plan = plan_influence(settings, workspace=workspace, model=model, progress=progress)
    return run_influence(plan, open_context(workspace, progress))


def _measure(plan: InfluencePlan, device: str, progress: Progress) -> InfluenceTable:
    from iiet.iiad.influence import influence_table  # Both import PyTorch.
    from orchestrator.models.load import load_model

    decoder = load_model(plan.checkpoint, device=device)
    batches = [
        *open_data(plan.tokens_folder).validation_batches(
            context_length=plan.sequence_length,
            num_tokens=plan.num_tokens,
            batch_size=SEQUENCES_PER_BATCH,
        )
    ]

    def on_pass(num_done: int) -> None:
        progress.advance(num_done, "passes")
        end_if_stop_requested()

    passes_per_batch = num_passes(
        plan.metric, decoder.schedule, whole_layers=bool(plan.whole_layers)
    )
    progress.start(f"influence ({plan.metric})", len(batches) * passes_per_batch)
    table = influence_table(
        decoder,
        batches,
        metric=plan.metric,
        whole_layers=plan.whole_layers,
        progress=on_pass,
    )
    if not plan.one_at_a_time:
        return table
    return _one_at_a_time(plan, decoder, batches, table, progress, on_pass)


def _one_at_a_time(
    plan: InfluencePlan,
    decoder: Decoder,
    batches: Sequence[Batch],
    table: InfluenceTable,
    progress: Progress,
    on_pass: Callable[[int], None],
) -> InfluenceTable:
    """Measure whole layers again after each removed layer. Each round is stored, so that the same
    command resumes after a stop."""
    from iiet.iiad.influence import leave_out_one_at_a_time

    path = rounds_path(plan.checkpoint, plan.metric)
    stored = StoredRounds.read(path)
    rounds: list[LeavingRound] = []
    if stored is not None and stored.key == plan.key:
        rounds = [LeavingRound.from_dict(values) for values in stored.rounds]
    num_leaving = plan.num_layers - 1  # One layer stays.
    is_noted = False
    passes_per_batch = num_passes_one_at_a_time(plan.metric, plan.num_layers, num_leaving)
    progress.start("layers, one at a time", len(batches) * passes_per_batch)
    for leaving in leave_out_one_at_a_time(
        decoder,
        batches,
        metric=plan.metric,
        num_leaving=num_leaving,
        rounds=rounds,
        progress=on_pass,
    ):
        rounds.append(leaving)
        stored_rounds = tuple(leaving.to_dict() for leaving in rounds)
        try:
            StoredRounds(key=plan.key, rounds=stored_rounds).write(path)
        except OSError as error:  # The table needs no file.
            if not is_noted:
                progress.note(f"cannot store the rounds in the checkpoint: {error}")
            is_noted = True
    return table_of_rounds(table, rounds)


def tracked_points(table: InfluenceTable) -> list[tuple[str, float, int]]:
    """Return MLflow's points of a table: name, value, and the correction or layer as step."""
    points = []
    for name, rows in (("influence", table.value_rows), ("residual", table.residual_rows)):
        for layer, row in enumerate(rows, start=1):
            for correction, value in enumerate(row, start=1):
                points.append((f"{name}/layer_{layer:02d}", value, correction))
    for layer, value in enumerate(table.layer_values, start=1):
        points.append(("layer_influence", value, layer))
    for layer, factor in enumerate(table.contractions, start=1):
        if not math.isnan(factor):
            points.append(("contraction", factor, layer))
    return points


def summary(table: InfluenceTable) -> str:
    """Return a summary of a table: the range of its values, how many layers do not contract, and
    whether no correction has an effect yet."""
    if not table.schedule.num_corrections:
        layers = table.layer_values
        return (
            f"no corrections; {len(layers)} whole layers, from {max(layers):.2g} down to "
            f"{min(layers):.2g}, over {table.num_tokens:,} tokens"
        )
    values = [value for row in table.value_rows for value in row]
    factors = [factor for factor in table.contractions if not math.isnan(factor)]
    growing = sum(factor >= 1 for factor in factors)
    text = (
        f"{len(values)} corrections, from {max(values):.2g} down to {min(values):.2g}, "
        f"over {table.num_tokens:,} tokens"
    )
    if growing:
        text += f"; layers that do not contract: {growing} of {len(factors)}"
    smallest_change = SMALLEST_CHANGE.get(table.metric)
    if smallest_change is not None and max(values) < smallest_change:
        text += "; each changes the output of its layer by less than 1%: they have learned little"
    return text
