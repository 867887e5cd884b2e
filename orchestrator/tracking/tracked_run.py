"""One tracked run, as the pipelines use it: write, finish."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.records.measurement import TrackedModel
from orchestrator.tracking.delivery import SHORT_WAIT_SECONDS, Delivery
from orchestrator.tracking.outbox import Record
from orchestrator.tracking.store import NOTE_TAG, REASON_TAG, RunIdentity
from orchestrator.workspace.errors import Interrupted
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import portable_path


class TrackedRun:
    """One run. No method raises if the store fails."""

    def __init__(self, delivery: Delivery, identity: RunIdentity) -> None:
        """Name a run; `Tracking.run` also creates it."""
        self.identity = identity
        self._delivery = delivery

    @property
    def run_id(self) -> str | None:
        """The run's id; None if the store does not respond."""
        self._delivery.wait()
        return self.known_id

    @property
    def known_id(self) -> str | None:
        """The run's id if the store has returned it by now."""
        run = self._delivery.store.known(self.identity)
        return run.id if run else None

    @property
    def is_store_down(self) -> bool:
        """Whether the store failed a moment ago, so that records go to the outbox for now."""
        return self._delivery.is_paused

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; existing ones are replaced, and an empty text deletes the tag."""
        self.write("update", tags=dict(tags))

    def log_journal(self, folder: Path) -> None:
        """Copy the journal's new metrics; records already in the run are not copied again."""
        self.write("update", journal=folder)

    def mirror_journal(self, folder: Path) -> None:
        """Copy the journal's new metrics to the loggers beside MLflow only."""
        self._delivery.mirror(self.record("update", {"journal": folder}))

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Set metrics at a step."""
        self.log_points(metric_points(values, step))

    def log_points(
        self, points: Sequence[tuple[str, float, int]], *, time_ms: int | None = None
    ) -> None:
        """Set metrics, given by name, value and step, with one time; now when unset."""
        self.write("update", points=points, time_ms=time_ms or now_ms())

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or the files of a folder, in a folder of the run; replace existing ones."""
        self.write("artifact", path=path, folder=folder)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Store rows as a table, `NAME.json`, with the first row's names as columns."""
        columns = list(rows[0]) if rows else []
        data = [[row.get(column) for column in columns] for row in rows]
        self.write("table", columns=columns, data=data, name=name)

    def log_text(self, text: str, name: str) -> None:
        """Store a text as the file `name` of the run; replace an existing one."""
        self.write("text", text=text, name=name)

    def log_dataset(
        self, name: str, digest: str, profile: Mapping[str, Any], *, context: str = "training"
    ) -> None:
        """Log the data that the run read.

        Args:
            name: Name for people.
            digest: Hash of the content.
            profile: Origin and sizes.
            context: What it was read for: training or evaluation.
        """
        self._delivery.write(self.dataset_record(name, digest, profile, context=context))

    def dataset_record(
        self, name: str, digest: str, profile: Mapping[str, Any], *, context: str = "training"
    ) -> Record:
        """Return the operation of `log_dataset`, for `Delivery.write`."""
        values = {"name": name, "digest": digest, "profile": json.dumps(dict(profile))}
        return self.record("dataset", {**values, "context": context})

    def log_model(self, model: TrackedModel) -> None:
        """Log a model that this run made or measured; there is one logged model for each key."""
        self._delivery.write(self.model_record(model))

    def model_record(self, model: TrackedModel) -> Record:
        """Return the operation of `log_model`, for `Delivery.write`."""
        return self.record("model", {"key": model.key, **self._logged(model)})

    def register(
        self,
        name: str,
        folder: Path,
        *,
        model: TrackedModel,
        alias: str,
        note: str = "",
        tags: Mapping[str, str] | None = None,
        example: str = "",
    ) -> None:
        """Store an exported folder with a logged model, as a version of a registered model.

        Args:
            name: Name of the registered model; created if it is missing.
            model: What was exported; the same model of the same run is the same version.
            alias: Moves to this version.
            note: Description of the version.
            tags: Tags of the version.
            example: A text that the model reads, stored as MLflow's input example.
        """
        self.write(
            "register",
            model=name,
            key=model.key,
            folder=folder,
            alias=alias,
            note=note,
            tags=dict(tags or {}),
            example=example,
            logged=self._logged(model),
        )

    def _logged(self, model: TrackedModel) -> dict[str, Any]:
        root = self._delivery.root
        params = {name: portable_path(text, root) for name, text in model.params.items()}
        return {"name": model.name, "params": params, "datasets": dict(model.datasets)}

    def finish(
        self,
        status: str = "FINISHED",
        *,
        journal: Path | None = None,
        ended_ms: int | None = None,
        wait: bool = True,
    ) -> None:
        """End the run as FINISHED, FAILED or KILLED; an unchanged status keeps its end time.

        Args:
            journal: Folder whose journal's last metrics are copied.
            ended_ms: When it ended, in ms; now when unset.
            wait: Wait until the store has everything; after a failure, only for a moment.
        """
        self.write("update", status=status, time_ms=ended_ms or now_ms(), journal=journal)
        if wait:
            if status == "FINISHED":
                self._delivery.wait()
            else:
                self._delivery.wait(SHORT_WAIT_SECONDS, in_all=True)

    def write(self, operation: str, **arguments: Any) -> None:
        """Perform one of `OPERATIONS` on this run, now or later."""
        self._delivery.write(self.record(operation, arguments))

    def record(self, operation: str, arguments: dict[str, Any]) -> Record:
        """Return one of `OPERATIONS` on this run, for `Delivery.write`.

        Parameters and tags that are paths in the workspace are sent relative to its root.
        """
        root = self._delivery.root
        for name in {"params", "tags"} & arguments.keys():
            texts = arguments[name]
            arguments[name] = {key: portable_path(text, root) for key, text in texts.items()}
        return {
            "operation": operation, "run": self.identity.model_dump(), "arguments": arguments
        }  # fmt: skip


def status_after(error: BaseException | None) -> str:
    """Return a run's final status: KILLED after an interruption, FAILED, or FINISHED."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED"


def reason_tags(status: str, reason: str) -> dict[str, str]:
    """Return the tags that show why a run has no result, also at the top of its page.

    Without a reason, they delete that of an earlier end.
    """
    note = f"{reason[:1].upper()}{reason[1:]}"
    failed = status == "FAILED" and reason
    return {REASON_TAG: reason, NOTE_TAG: f"**Failed:** {note}" if failed else note}


def metric_points(values: Mapping[str, float], step: int = 0) -> list[tuple[str, float, int]]:
    """Return metrics at one step as name, value and step."""
    return [(name, float(value), step) for name, value in values.items()]
