"""Measure how much each correction, and each whole layer, of a checkpoint matters.

The table with influence, block influence, residuals and contraction factors is stored beside the
weights as `influence-<metric>.json`, with a picture. It is read again unless settings or tokens
differ. The calibration set is taken evenly from the held-out tokens, which are the same for every
model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from iiet.influence import InfluenceTable, influence_table
from iiet.influence_metrics import INFLUENCE_METRICS
from iiet.methods import METHODS
from orchestrator.cluster.launch import command_device
from orchestrator.data.prepared import PreparedData
from orchestrator.data.sources import describe_data, open_data
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.hub_imports import local_model
from orchestrator.pipelines.result import Result
from orchestrator.records.measurement import Measurement
from orchestrator.reporting.influence_tables import influence_terminal_table
from orchestrator.settings import InfluenceSettings, Settings
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import load_config, weights_key
from orchestrator.training.device_work import OnDevice, on_cpu
from orchestrator.training.model_loading import load_model
from orchestrator.training.model_lookup import resolve_teacher, tokens_folder_of
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_cached, write_json
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.provenance import content_key

SEQUENCES_PER_BATCH = 8
"""Standard errors are over batches, so batches are small and many."""


class InfluenceResult(Result):
    """The influence of a checkpoint's corrections."""

    checkpoint: Path
    """The model that was measured."""
    table: InfluenceTable
    """Influence, standard errors and residuals, per layer and correction."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per layer and correction: influence, its standard error, residual."""
        residual_rows = self.table.residual_rows or [()] * len(self.table.rows())
        return [
            {
                "layer": layer,
                "correction": number,
                "influence": value,
                "stderr": error,
                "residual": residuals[number - 1] if number <= len(residuals) else math.nan,
            }
            for layer, (values, errors, residuals) in enumerate(
                zip(self.table.rows(), self.table.error_rows, residual_rows, strict=True), start=1
            )
            for number, (value, error) in enumerate(zip(values, errors, strict=True), start=1)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the checkpoint, its schedule and the table."""
        schedule = list(self.table.schedule)
        return {"checkpoint": str(self.checkpoint), "schedule": schedule, **self.table.to_dict()}

    def shown(self) -> Iterable[RenderableType]:
        """Return the table of layers and corrections."""
        yield influence_terminal_table(self.table)


def measure_influence(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    model: Path | str | None = None,
    progress: Progress | None = None,
) -> InfluenceResult:
    """Measure how much each correction of each layer matters; a stored table is read again.

    Args:
        settings: Section `influence`.
        model: A checkpoint or run, by path or name; the newest IIET with corrections when unset.

    Raises:
        UserError: If there is no such model, it makes no corrections, or its tokens are not in the
            workspace.
    """
    context = open_context(workspace, progress)
    checkpoint = resolve_teacher(context.workspace, local_model(context, model))
    tokens = tokens_folder_of(checkpoint, context.workspace)
    device = command_device(settings.cluster, context.workspace.root)
    table = read_or_measure_influence(
        checkpoint, settings.influence, tokens, context, on_device=device
    )
    return InfluenceResult(checkpoint=checkpoint, table=table)


def read_or_measure_influence(
    checkpoint: Path,
    settings: InfluenceSettings,
    tokens_folder: Path,
    context: Context,
    *,
    on_device: OnDevice = on_cpu,
) -> InfluenceTable:
    """Return the influence table of a checkpoint, measured if it is not stored.

    Args:
        tokens_folder: Prepared tokens that the model was trained on.
        on_device: Runs the measurement.

    Raises:
        UserError: If the checkpoint or the tokens are damaged, do not go together, or the model
            makes no corrections.
    """
    progress, data = context.progress, open_data(tokens_folder)
    path, key, num_tokens = _place(checkpoint, settings, data)
    found = _stored(path, key, progress)
    progress.start(f"influence ({settings.metric})", num_tokens)
    if found is None:
        measure = partial(_measure, checkpoint, tokens_folder, settings.metric, num_tokens)
        found = on_device(measure, progress)
        _store(path, key, found, progress)
        progress.finish(_summary(found))
    else:
        progress.finish(f"{_summary(found)}, found again")
    _track(context, key, found, path, checkpoint, tokens_folder)
    return found


def stored_influence(
    checkpoint: Path, settings: InfluenceSettings, tokens_folder: Path, progress: Progress
) -> InfluenceTable | None:
    """Return the influence table of a checkpoint; None if it is not measured yet.

    Raises:
        UserError: As `read_or_measure_influence`.
    """
    path, key, _ = _place(checkpoint, settings, open_data(tokens_folder))
    return _stored(path, key, progress)


def _place(
    checkpoint: Path, settings: InfluenceSettings, data: PreparedData
) -> tuple[Path, str, int]:
    """Return file and key of a checkpoint's table, and the number of tokens that it is of."""
    config = load_config(checkpoint)
    if not config.corrections.num_corrections:
        raise UserError(
            f"{checkpoint} is a model ({config.method}) without corrections, so there is "
            "no influence to measure; take an IIET with r >= 1"
        )
    if METHODS[config.method].repeats_stack:
        raise UserError(
            f"{checkpoint} is a model ({config.method}) that repeats the whole stack, so no layer "
            "has corrections of its own whose influence could be measured; take an IIET with r >= 1"
        )
    if data.vocab_size > config.vocab_size:
        raise UserError(
            f"{checkpoint} knows {config.vocab_size} tokens, but {data.folder} uses "
            f"{data.vocab_size}: these are not the tokens it was trained on"
        )
    num_tokens = min(settings.num_tokens, data.num_validation_tokens or settings.num_tokens)
    version = INFLUENCE_METRICS[settings.metric].version
    key = content_key(
        "influence",
        weights_key(checkpoint),
        list(config.corrections),
        data.fingerprint,
        settings.metric,
        num_tokens,
        *([version] if version > 1 else []),  # Keys of earlier versions have none.
    )
    return checkpoint / f"influence-{settings.metric}.json", key, num_tokens


def _measure(
    checkpoint: Path,
    tokens_folder: Path,
    metric: str,
    num_tokens: int,
    device: str,
    progress: Progress,
) -> InfluenceTable:
    decoder = load_model(checkpoint, device=device)
    context_length = decoder.config.context_length
    batches = open_data(tokens_folder).validation_batches(
        context_length=context_length,
        num_tokens=num_tokens,
        batch_size=SEQUENCES_PER_BATCH,
    )
    per_batch = SEQUENCES_PER_BATCH * context_length
    return influence_table(
        decoder,
        batches,
        metric=metric,
        progress=lambda done: progress.advance(min(done * per_batch, num_tokens)),
    )


def _stored(path: Path, key: str, progress: Progress) -> InfluenceTable | None:
    def parse(found: dict[str, Any]) -> InfluenceTable | None:
        if found["key"] != key:
            return None
        table = InfluenceTable.from_dict(found)
        table.schedule  # noqa: B018  # a layer without a row is found here
        # A table of an earlier version does not say how much each layer matters.
        return table if len(table.layer_values) == len(table.value_rows) else None

    return read_cached(path, parse, progress.note)


def _store(path: Path, key: str, table: InfluenceTable, progress: Progress) -> None:
    from orchestrator.reporting.charts import influence_chart, save_chart  # Imports Altair.

    title = "Influence of each correction"
    try:
        chart = influence_chart(table.rows(), metric=table.metric, title=title)
        save_chart(chart, path.with_suffix(""), kinds=["png"])
        write_json(path, {"key": key, **table.to_dict()})
    except OSError as error:
        progress.note(f"cannot store the influence beside the weights: {error}")


def _track(
    context: Context,
    key: str,
    table: InfluenceTable,
    path: Path,
    checkpoint: Path,
    tokens_folder: Path,
) -> None:
    points = [
        (f"{name}/layer_{layer:02d}", value, correction)
        for name, rows in (("influence", table.rows()), ("residual", table.residual_rows))
        for layer, row in enumerate(rows, start=1)
        for correction, value in enumerate(row, start=1)
    ]
    points += [
        ("block_influence", value, layer) for layer, value in enumerate(table.layer_values, start=1)
    ]
    contractions = enumerate(table.contractions, start=1)
    points += [("contraction", c, layer) for layer, c in contractions if not math.isnan(c)]
    context.log_measurement(
        Measurement.of(
            key=key,
            name=f"influence {table.metric} of {checkpoint.parent.name}",
            kind="influence",
            params={
                "metric": table.metric,
                "schedule": table.schedule,
                "num_tokens": table.num_tokens,
                "checkpoint": checkpoint,
            },
            dataset=describe_data(tokens_folder),
            points=points,
            files=[str(path), str(path.with_suffix(".png"))],
        )
    )


def _summary(table: InfluenceTable) -> str:
    values = [value for row in table.rows() for value in row]
    factors = [factor for factor in table.contractions if not math.isnan(factor)]
    growing = sum(factor >= 1 for factor in factors)
    return (
        f"{len(values)} corrections, from {max(values):.2g} down to {min(values):.2g}, "
        f"over {table.num_tokens:,} tokens"
        + (f"; layers that do not contract: {growing} of {len(factors)}" if growing else "")
    )
