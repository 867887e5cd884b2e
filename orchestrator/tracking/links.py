"""Addresses of MLflow's pages that show what one came for, and the saved chart view behind one of
them.

MLflow opens on pages for language-model applications and hides nested runs, so a bare address shows
neither losses nor trials. A chart view, saved as a tag of the experiment, opens as scatter plots of
cost against quality beside parallel coordinates of the corrections, filtered to one sweep, with the
trials' metrics as columns of the table. The tag's format is not documented (seen in MLflow 3.17):
an MLflow that does not know it shows its default page instead.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VIEW_TAG_PREFIX = "mlflow.sharedViewState."
MAX_VIEW_CHARACTERS = 20_000
CARD_HEIGHT_PIXELS = 420
TRAINING_PAGES = "workflowType=machine_learning"


@dataclass(frozen=True)
class Links:
    """Addresses of pages; None where the target is not known yet."""

    training_view: str | None
    """All runs of the experiment, on the pages for training."""
    run: str | None
    """One run: note, metrics, artifacts."""
    chart_view: str | None
    """A saved chart view."""
    table_view: str | None
    """The same runs as a flat table with their metrics as columns."""

    @classmethod
    def of(
        cls,
        base_url: str,
        experiment_id: str | None,
        *,
        run_id: str | None = None,
        view: str | None = None,
    ) -> Links:
        """Build the links for a server's address."""
        if experiment_id is None:
            return cls(None, None, None, None)
        experiment = f"{base_url.rstrip('/')}/#/experiments/{experiment_id}"
        runs = f"{experiment}/runs?{TRAINING_PAGES}"
        return cls(
            training_view=runs,
            run=f"{experiment}/runs/{run_id}?{TRAINING_PAGES}" if run_id else None,
            chart_view=f"{runs}&compareRunsMode=CHART&viewStateShareKey={view}" if view else None,
            table_view=f"{runs}&compareRunsMode=TABLE&viewStateShareKey={view}" if view else None,
        )


@dataclass(frozen=True, kw_only=True)
class ChartView:
    """Which runs a saved view shows, and in which charts."""

    key: str
    """Name in the address: letters, digits and dashes."""
    name: str
    """Name in MLflow's menu of views."""
    run_filter: str
    """Search expression of the runs shown."""
    order_by: str
    """Metric by which the table is sorted, lowest first."""
    columns: Sequence[str] = ()
    """Metrics and parameters shown as columns, as `metrics.NAME` and `params.NAME`."""
    scatters: Sequence[tuple[str, str]] = ()
    """Pairs of metrics, horizontal and vertical, one scatter plot each."""
    parallel_params: Sequence[str] = ()
    """Parameters of the parallel coordinates."""
    parallel_metrics: Sequence[str] = ()
    """Metrics of the parallel coordinates."""
    curves: Sequence[str] = ()
    """Metrics over steps, one chart each."""
    folded_groups: Sequence[str] = ()
    """Groups of metrics (what stands before the last `/`) whose own charts stay folded."""

    def tag_value(self) -> str:
        """Return the value of the experiment's tag.

        Raises:
            ValueError: If the view holds more than MLflow stores in a tag.
        """
        now = int(time.time() * 1000)
        tag = {
            "name": self.name,
            "createdAt": now,
            "updatedAt": now,
            "state": json.dumps(self.state(), separators=(",", ":")),
        }
        text = json.dumps(tag, separators=(",", ":"))
        if len(text) > MAX_VIEW_CHARACTERS:
            raise ValueError(
                f"a chart view takes up to {MAX_VIEW_CHARACTERS} characters, got {len(text)}"
            )
        return text

    def state(self) -> dict[str, Any]:
        """Return the state of MLflow's page: filter, table and charts."""
        section = _stable_id(self.key, "section")
        return {
            "searchFilter": self.run_filter,
            "orderByKey": f"metrics.`{self.order_by}`",
            "orderByAsc": True,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": [_column(name) for name in self.columns],
            "columnOrder": [],
            "columnWidths": {},
            "runsExpanded": {},
            "runsPinned": [],
            "runsHidden": [],
            "runsHiddenMode": "SHOWALL",
            "runsVisibilityMap": {},
            "compareRunSections": self._sections(),
            # Else MLflow sorts its own sections between ours by name.
            "isAccordionReordered": True,
            "compareRunCharts": [
                {
                    "uuid": _stable_id(self.key, chart["displayName"]),
                    "runsCountToCompare": 100,
                    "metricSectionId": section,
                    "deleted": False,
                    "isGenerated": False,
                    **chart,
                }
                for chart in self._charts()
            ],
            "viewMaximized": False,
            "runListHidden": False,
            "hideEmptyCharts": True,
            "groupBy": None,
            "autoRefreshEnabled": True,
            "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0},
        }

    def _sections(self) -> list[dict[str, Any]]:
        ours = {"name": self.name, "display": True, "isGenerated": False, "columns": 2}
        ours["cardHeight"] = CARD_HEIGHT_PIXELS
        # MLflow makes a section for each group of metrics; naming it here keeps it folded.
        groups = [{"name": g, "display": False, "isGenerated": True} for g in self.folded_groups]
        return [
            {
                "uuid": _stable_id(self.key, "section" if number == 0 else str(section["name"])),
                "isReordered": False,
                "deleted": False,
                **section,
            }
            for number, section in enumerate([ours, *groups])
        ]

    def _charts(self) -> list[dict[str, Any]]:
        charts: list[dict[str, Any]] = [
            {
                "type": "SCATTER",
                "displayName": f"{y} against {x}",
                "xaxis": {"key": x, "type": "METRIC", "dataAccessKey": x},
                "yaxis": {"key": y, "type": "METRIC", "dataAccessKey": y},
            }
            for x, y in self.scatters
        ]
        if self.parallel_params:
            charts.append(
                {
                    "type": "PARALLEL",
                    "displayName": "Corrections per layer",
                    "selectedParams": list(self.parallel_params),
                    "selectedMetrics": list(self.parallel_metrics),
                    "showAllRuns": True,
                }
            )
        charts += [
            {
                "type": "LINE",
                "displayName": metric,
                "metricKey": metric,
                "selectedMetricKeys": [metric],
                "xAxisKey": "step",
                "scaleType": "linear",
            }
            for metric in self.curves
        ]
        return charts


def _stable_id(*parts: str) -> str:
    # The same view written again must be the same view, not another one.
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(parts)))


def _column(name: str) -> str:
    group, _, key = name.partition(".")
    return f"{group}.`{key}`"


def tag_filter(parts: Mapping[str, str]) -> str:
    """Return a search expression that asks for all of the tags, in quotes that fit their values."""
    quoted = {name: f'"{value}"' if "'" in value else f"'{value}'" for name, value in parts.items()}
    return " and ".join(f"tags.`{name}` = {value}" for name, value in quoted.items())
