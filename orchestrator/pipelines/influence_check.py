"""Check which metric of influence names the corrections that a checkpoint cannot lose.

Influence is measured by every metric, on the same held-out tokens, and so are the schedules that
thresholds of each metric give. Both are read again where they are stored. Correlations, qualities
and picture are stored beside the weights as `influence_check`, and logged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iiet.extensions import ExtensionError
from iiet.influence import InfluenceTable
from iiet.influence_metrics import INFLUENCE_METRICS
from iiet.pruning import schedule_family
from iiet.schedule import IterationSchedule
from orchestrator.cluster.launch import command_device
from orchestrator.data.sources import describe_data, open_data
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.hub_imports import local_model
from orchestrator.pipelines.influence import SEQUENCES_PER_BATCH, read_or_measure_influence
from orchestrator.records.measurement import Measurement
from orchestrator.reporting.influence_check import InfluenceCheck
from orchestrator.settings import InfluenceSettings, Settings
from orchestrator.terminal.formatting import format_count
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import weights_key
from orchestrator.training.device_work import OnDevice, on_cpu
from orchestrator.training.distributed import World
from orchestrator.training.model_loading import load_model
from orchestrator.training.model_lookup import resolve_teacher, tokens_folder_of
from orchestrator.training.validation import validation_metrics
from orchestrator.workspace.files import read_cached, write_json
from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.journal import ACCURACY_METRIC, VALIDATION_METRIC
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True)
class InfluenceCheckResult:
    """What was checked, and where the files are."""

    checkpoint: Path
    """The model that was measured."""
    check: InfluenceCheck
    """Influence by every metric, and the cost of dropping each correction."""
    picture: Path | None
    """The scatter; None if the checkpoint's folder cannot be written."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row per correction: its influence by each metric, and the cost of dropping."""
        import pandas

        check = self.check
        frame = pandas.DataFrame(check.names, columns=["layer", "correction"])
        return frame.assign(
            **{metric: check.influences(metric) for metric in check.tables}, cost=check.costs
        )

    def to_json(self) -> dict[str, Any]:
        """Return the checkpoint, the picture and the comparison as JSON values."""
        picture = self.picture and str(self.picture)
        return {"checkpoint": str(self.checkpoint), "picture": picture, **self.check.to_dict()}


def check_influence(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    model: Path | str | None = None,
    progress: Progress | None = None,
) -> InfluenceCheckResult:
    """Measure influence by every metric, and compare it with what dropping each correction costs.

    Args:
        settings: Section `influence`; its metric is not used.
        model: A checkpoint or run, by path or name; the newest IIET with corrections when unset.

    Raises:
        UserError: As `measure_influence`.
    """
    context = open_context(workspace, progress)
    checkpoint = resolve_teacher(context.workspace, local_model(context, model))
    tokens = tokens_folder_of(checkpoint, context.workspace)
    device = command_device(settings.cluster, context.workspace.root)
    return compare_metrics(checkpoint, settings.influence, tokens, context, on_device=device)


def compare_metrics(
    checkpoint: Path,
    settings: InfluenceSettings,
    tokens_folder: Path,
    context: Context,
    *,
    on_device: OnDevice = on_cpu,
) -> InfluenceCheckResult:
    """Compare all metrics at a checkpoint; arguments and errors as `read_or_measure_influence`."""
    tables = {
        metric: read_or_measure_influence(
            checkpoint,
            settings.model_copy(update={"metric": metric}),
            tokens_folder,
            context,
            on_device=on_device,
        )
        for metric in _usable_metrics(context.progress)
    }
    key = content_key(
        "influence check",
        weights_key(checkpoint),
        open_data(tokens_folder).fingerprint,
        {metric: table.to_dict() for metric, table in tables.items()},
    )
    pruned = _stored(checkpoint, key, context.progress)
    if pruned is None:
        work = partial(_measure_pruned, checkpoint, tokens_folder, tables, settings.num_tokens)
        pruned = on_device(work, context.progress)
    check = InfluenceCheck(tables, pruned)
    picture = _store(check, key, checkpoint, context.progress)
    _track(context, check, key, checkpoint, tokens_folder)
    return InfluenceCheckResult(checkpoint=checkpoint, check=check, picture=picture)


def _usable_metrics(progress: Progress) -> list[str]:
    """Return all metrics but those of broken packages, which are noted."""
    usable = []
    for metric in INFLUENCE_METRICS:
        try:
            INFLUENCE_METRICS[metric]
        except ExtensionError as error:
            progress.note(f"left out: {error}")
        else:
            usable.append(metric)
    return usable


def _measure_pruned(
    checkpoint: Path,
    tokens_folder: Path,
    tables: Mapping[str, InfluenceTable],
    num_tokens: int,
    device: str,
    progress: Progress,
) -> dict[IterationSchedule, float]:
    """Return the accuracy, or for text the loss, under each schedule of each metric's family."""
    decoder, data = load_model(checkpoint, device=device), open_data(tokens_folder)
    batches = [
        *data.validation_batches(
            context_length=decoder.config.context_length,
            num_tokens=num_tokens,
            batch_size=SEQUENCES_PER_BATCH,
        )
    ]
    families = [schedule_family(table) for table in tables.values()]
    schedules = list(dict.fromkeys(member.schedule for family in families for member in family))
    name = ACCURACY_METRIC if tables["loss"].accuracy_lost_rows else VALIDATION_METRIC
    progress.start("pruned schedules", len(schedules))
    qualities = {}
    for schedule in schedules:
        found = validation_metrics(
            decoder, batches, schedule, precision="fp32", world=World(device=device)
        )
        qualities[schedule] = found[name]
        progress.advance(len(qualities))
    progress.finish(format_count(len(schedules), "schedule"))
    return qualities


def _path(checkpoint: Path) -> Path:
    return checkpoint / "influence_check.json"


def _stored(
    checkpoint: Path, key: str, progress: Progress
) -> dict[IterationSchedule, float] | None:
    def parse(found: dict[str, Any]) -> dict[IterationSchedule, float] | None:
        if found.get("key") != key:
            return None
        return {
            IterationSchedule(tuple(map(int, schedule.split(",")))): float(quality)
            for schedule, quality in found["pruned"].items()
        }

    return read_cached(_path(checkpoint), parse, progress.note)


def _store(check: InfluenceCheck, key: str, checkpoint: Path, progress: Progress) -> Path | None:
    from orchestrator.reporting.figure_style import save_figure  # Imports matplotlib.
    from orchestrator.reporting.influence_check_figure import draw_influence_check

    path = _path(checkpoint)
    picture = path.with_suffix(".png")
    if picture.is_file() and _stored(checkpoint, key, progress):
        return picture
    try:
        save_figure(draw_influence_check(check), path.with_suffix(""), kinds=("png",))
        write_json(path, {"key": key, **check.to_dict()})
    except OSError as error:
        progress.note(f"cannot store the check of the influence beside the weights: {error}")
        return None
    return picture


def _track(
    context: Context, check: InfluenceCheck, key: str, checkpoint: Path, tokens_folder: Path
) -> None:
    metrics = {
        f"rank_correlation/{metric}{suffix}": rho
        for metric in check.tables
        for suffix, rho in zip(("", "_suffix_maxima"), check.correlations(metric), strict=True)
        if not math.isnan(rho)
    }
    points = [
        (f"cost_of_dropping/layer_{layer:02d}", cost, i)
        for (layer, i), cost in zip(check.names, check.costs, strict=True)
    ]
    context.log_measurement(
        Measurement.of(
            key=key,
            name=f"influence check of {checkpoint.parent.name}",
            kind="influence",
            params={"cost": check.cost_name, "checkpoint": checkpoint},
            dataset=describe_data(tokens_folder),
            metrics=metrics
            | {f"pruned_quality/{one}": check.pruned_quality(one) for one in check.tables},
            points=points,
            files=[str(checkpoint / f"influence_check.{kind}") for kind in ("json", "png")],
        )
    )
