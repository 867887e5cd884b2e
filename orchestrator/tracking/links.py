"""Addresses of MLflow's pages; a plain address would show neither losses nor nested runs."""

from __future__ import annotations

from dataclasses import dataclass

TRAINING_PAGES = "workflowType=machine_learning"


@dataclass(frozen=True)
class Links:
    """Addresses of the experiment's runs, of one run and a file of it, and of a saved view."""

    training_view: str | None
    run: str | None
    report: str | None
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
        report: str | None = None,
    ) -> Links:
        """Build the links for a server; None for pages that are not known.

        Args:
            base_url: Address of the server, with the path at which it is served, if it has one.
            experiment_id: The experiment; None if the server does not answer.
            run_id: The run of `run` and `report`.
            view: Key of a saved view.
            report: Path of a file among the run's artifacts.
        """
        if experiment_id is None:
            return cls(None, None, None, None, None)
        experiment = f"{base_url.rstrip('/')}/#/experiments/{experiment_id}"
        runs = f"{experiment}/runs?{TRAINING_PAGES}"
        return cls(
            training_view=runs,
            run=f"{experiment}/runs/{run_id}?{TRAINING_PAGES}" if run_id else None,
            report=(
                f"{experiment}/runs/{run_id}/artifacts/{report}?{TRAINING_PAGES}"
                if run_id and report
                else None
            ),
            chart_view=f"{runs}&compareRunsMode=CHART&viewStateShareKey={view}" if view else None,
            table_view=f"{runs}&compareRunsMode=TABLE&viewStateShareKey={view}" if view else None,
        )
