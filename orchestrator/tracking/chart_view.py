"""A saved chart view of MLflow's experiment page, stored as a tag of the experiment.

It shows scatter plots of cost against quality, parallel coordinates of the corrections, and a table
of the trials' metrics, filtered to one sweep. The tag's format is undocumented (taken from MLflow
3.17); an MLflow that does not know it shows its default page.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.workspace.journal import now_ms

VIEW_TAG_PREFIX = "mlflow.sharedViewState."
MAX_VIEW_CHARACTERS = 20_000
CARD_HEIGHT_PIXELS = 420


@dataclass(frozen=True, kw_only=True)
class ChartView:
    """The runs that a saved view shows, and its charts."""

    key: str
    """Name in the page's address: letters, digits and dashes."""
    name: str
    """Name in MLflow's menu of views."""
    run_filter: str
    """Search expression for the runs."""
    order_by: str
    """Column by which the table is sorted, such as `metrics.NAME`."""
    is_ascending: bool = True
    """Whether the lowest value is the first row."""
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
    """Groups of metrics (the part before the last `/`) whose automatic charts stay folded."""

    def tag_value(self) -> str:
        """Return the value of the experiment's tag; a ValueError if it is too large for MLflow."""
        now = now_ms()
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
            "orderByKey": _sort_key(self.order_by),
            "orderByAsc": self.is_ascending,
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
            "runsHiddenMode": "SHOW_ALL",
            "runsVisibilityMap": {},
            "compareRunSections": self._sections(),
            # Otherwise MLflow sorts its own sections between ours by name.
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
            "globalLineChartConfig": {"xAxisKey": "step"},
        }

    def _sections(self) -> list[dict[str, Any]]:
        ours = {
            "name": self.name,
            "display": True,
            "isGenerated": False,
            "columns": 2,
            "cardHeight": CARD_HEIGHT_PIXELS,
        }
        # MLflow adds a section for each group of metrics; listing it here keeps it folded.
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
                # Otherwise curves are smoothed, and their ends are no values of the run.
                "lineSmoothness": 0,
                "useGlobalLineSmoothing": False,
            }
            for metric in self.curves
        ]
        return charts


def _stable_id(*parts: str) -> str:
    # Saving the same view again must give the same ids.
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(parts)))


def _sort_key(name: str) -> str:
    return name if name.startswith("attributes.") else _column(name)


def _column(name: str) -> str:
    group, _, key = name.partition(".")
    return f"{group}.`{key}`"
