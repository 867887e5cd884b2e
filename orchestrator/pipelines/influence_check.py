"""Check which metric of influence names the corrections that a checkpoint cannot lose.

Influence is measured by every metric, on the same held-out tokens, and read again where it is
stored. Correlations and picture are stored beside the weights as `influence_check`, and logged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from iiet.influence import InfluenceMetric
from orchestrator.cluster.launch import command_device
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.influence import read_or_measure_influence
from orchestrator.reporting.influence_check import InfluenceCheck
from orchestrator.settings import InfluenceSettings, Settings
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import weights_key
from orchestrator.training.device_work import OnDevice, on_cpu
from orchestrator.training.model_lookup import resolve_teacher, tokens_folder_of
from orchestrator.workspace.files import read_cached, write_json
from orchestrator.workspace.folders import Workspace
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
    checkpoint = resolve_teacher(context.workspace, Path(model) if model else None)
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
    metrics: tuple[InfluenceMetric, ...] = get_args(InfluenceMetric)
    tables = {
        metric: read_or_measure_influence(
            checkpoint,
            settings.model_copy(update={"metric": metric}),
            tokens_folder,
            context,
            on_device=on_device,
        )
        for metric in metrics
    }
    check = InfluenceCheck(tables)
    key = content_key("influence check", weights_key(checkpoint), check.to_dict())
    picture = _store(check, key, checkpoint, context.progress)
    _track(context, check, key, checkpoint)
    return InfluenceCheckResult(checkpoint=checkpoint, check=check, picture=picture)


def _store(check: InfluenceCheck, key: str, checkpoint: Path, progress: Progress) -> Path | None:
    from orchestrator.reporting.figure_style import save_figure  # Imports matplotlib.
    from orchestrator.reporting.influence_check_figure import draw_influence_check

    path = checkpoint / "influence_check.json"
    picture = path.with_suffix(".png")
    if picture.is_file() and read_cached(
        path, lambda found: found.get("key") == key or None, progress.note
    ):
        return picture
    try:
        save_figure(draw_influence_check(check), path.with_suffix(""), kinds=("png",))
        write_json(path, {"key": key, **check.to_dict()})
    except OSError as error:
        progress.note(f"cannot store the check of the influence beside the weights: {error}")
        return None
    return picture


def _track(context: Context, check: InfluenceCheck, key: str, checkpoint: Path) -> None:
    run = context.tracking.run(
        key,
        name="influence check",
        kind="influence",
        params={"cost": check.cost_name, "checkpoint": checkpoint},
    )
    points = [
        (f"rank_correlation/{metric}{suffix}", rho, 0)
        for metric in check.tables
        for suffix, rho in zip(("", "_suffix_maxima"), check.correlations(metric), strict=True)
        if not math.isnan(rho)
    ]
    points += [
        (f"cost_of_dropping/layer_{layer:02d}", cost, i)
        for (layer, i), cost in zip(check.names, check.costs, strict=True)
    ]
    run.log_points(points)
    for kind in ("json", "png"):
        file = checkpoint / f"influence_check.{kind}"
        if file.is_file():
            run.log_artifact(file, "influence")
    run.finish()
