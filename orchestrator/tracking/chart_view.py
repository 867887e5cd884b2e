"""A saved chart view of MLflow's experiment page, stored as a tag of the experiment.

It shows scatter plots of cost against quality, parallel coordinates of the corrections, and a table
of the trials' metrics, filtered to one sweep. The tag's format is undocumented (taken from MLflow
3.17); an MLflow that does not know it shows its default page.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.workspace.journal import now_ms

VIEW_TAG_PREFIX = "mlflow.sharedViewState."
MAX_VIEW_CHARACTERS = 20_000
CARD_HEIGHT_PIXELS = 420
TAG_PIXELS = 160
FIRST_COLUMNS = ("1", "attributes.`Run Name`")
"""What MLflow calls the columns with the box that selects a run, and with its name."""


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
    """Metrics, parameters and tags shown as columns behind a run's name, in this order, as
    `metrics.NAME`, `params.NAME` and `tags.NAME`."""
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
    time_ms: int = field(default_factory=now_ms)
    """When the view was made, in ms since 1970."""

    @property
    def tag(self) -> tuple[str, str]:
        """The experiment's tag that holds the view, and its value.

        Raises:
            ValueError: If it is too large for MLflow.
        """
        state = json.dumps(self.state(), separators=(",", ":"))
        tag = {
            "name": self.name,
            "createdAt": self.time_ms,
            "updatedAt": self.time_ms,
            "state": state,
        }
        text = json.dumps(tag, separators=(",", ":"))
        if len(text) > MAX_VIEW_CHARACTERS:
            raise ValueError(
                f"a chart view takes up to {MAX_VIEW_CHARACTERS} characters, got {len(text)}"
            )
        return VIEW_TAG_PREFIX + self.key, text

    def state(self) -> dict[str, Any]:
        """Return the state of MLflow's page: filter, table and charts."""
        sections: dict[str, dict[str, Any]] = {
            "section": {
                "name": self.name,
                "display": True,
                "isGenerated": False,
                "columns": 2,
                "cardHeight": CARD_HEIGHT_PIXELS,
            }
        }
        if self.parallel_params:
            # As wide as the page, or the titles of the axes cover each other at six layers.
            sections["corrections"] = {
                "name": "Corrections of each layer",
                "display": True,
                "isGenerated": False,
                "columns": 1,
                "cardHeight": CARD_HEIGHT_PIXELS,
            }
        # MLflow adds a section for each group of metrics; listing it here keeps it folded.
        for group in self.folded_groups:
            sections[group] = {"name": group, "display": False, "isGenerated": True}
        every_chart = {
            "runsCountToCompare": 100,
            "metricSectionId": self._id("section"),
            "deleted": False,
            "isGenerated": False,
        }
        return {
            "searchFilter": self.run_filter,
            "orderByKey": _column(self.order_by),
            "orderByAsc": self.is_ascending,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "modelVersionFilter": "All Runs",
            "selectedColumns": [_column(name) for name in self.columns],
            # Without an order, MLflow sorts metrics by name and puts times first, so on a small
            # screen costs hide every quality.
            "columnOrder": [*FIRST_COLUMNS, *(_column(name) for name in self.columns)],
            **{key: [] for key in ("datasetsFilter", "runsPinned", "runsHidden")},
            # MLflow's own width, 100 pixels, cuts most names.
            "columnWidths": {
                _column(name): TAG_PIXELS for name in self.columns if name.startswith("tags.")
            },
            **{key: {} for key in ("runsExpanded", "runsVisibilityMap")},
            "runsHiddenMode": "SHOW_ALL",
            "compareRunSections": [
                {"uuid": self._id(name), "isReordered": False, "deleted": False, **section}
                for name, section in sections.items()
            ],
            # Otherwise MLflow sorts its own sections between ours by name.
            "isAccordionReordered": True,
            "compareRunCharts": [
                {"uuid": self._id(chart["displayName"]), **every_chart, **chart}
                for chart in self._charts()
            ],
            "viewMaximized": False,
            "runListHidden": False,
            "hideEmptyCharts": True,
            "groupBy": None,
            "autoRefreshEnabled": True,
            "globalLineChartConfig": {"xAxisKey": "step"},
        }

    def _charts(self) -> Iterator[dict[str, Any]]:
        for horizontal, vertical in self.scatters:
            yield {
                "type": "SCATTER",
                "displayName": f"{vertical} against {horizontal}",
                "xaxis": _axis(horizontal),
                "yaxis": _axis(vertical),
            }
        if self.parallel_params:
            yield {
                "type": "PARALLEL",
                "displayName": "Corrections per layer",
                "metricSectionId": self._id("corrections"),
                "selectedParams": list(self.parallel_params),
                "selectedMetrics": list(self.parallel_metrics),
                "showAllRuns": True,
            }
        for metric in self.curves:
            yield {
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

    def _id(self, part: str) -> str:
        # Saving the same view again must give the same ids.
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.key}/{part}"))


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC", "dataAccessKey": metric}


def _column(name: str) -> str:
    group, _, key = name.partition(".")
    return f"{group}.`{key}`"
