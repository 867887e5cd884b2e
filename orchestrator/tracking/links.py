"""Addresses of MLflow's pages for one experiment, run or chart view.

MLflow opens on pages for language-model applications and hides nested runs, so a plain address
shows neither losses nor trials.
"""

from __future__ import annotations

from dataclasses import dataclass

TRAINING_PAGES = "workflowType=machine_learning"


@dataclass(frozen=True)
class Links:
    """Addresses of pages; None for pages that are not known yet."""

    training_view: str | None
    """All runs of the experiment, on the training pages."""
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
        """Build the links for a server."""
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
