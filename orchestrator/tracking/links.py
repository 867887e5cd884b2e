"""Addresses of MLflow's pages; a plain address would show neither losses nor nested runs."""

from __future__ import annotations

from dataclasses import dataclass

TRAINING_PAGES = "workflowType=machine_learning"


@dataclass(frozen=True)
class Links:
    """Addresses of the experiment's runs, of one run, and of a chart view as charts or table."""

    training_view: str | None
    run: str | None
    chart_view: str | None
    table_view: str | None

    @classmethod
    def of(
        cls,
        base_url: str,
        experiment_id: str | None,
        *,
        run_id: str | None = None,
        view: str | None = None,
    ) -> Links:
        """Build the links for a server; None for pages that are not known."""
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
