"""MLflow's logged models, and the versions that are registered from them.

A logged model is found by its key, so publishing again makes no second one. It links the metrics of
its runs with the data that they were measured on. Its weights stay in the workspace, which MLflow
calls an external model, until `register` stores an exported folder with it.

The folder is stored as it is, without a flavor of MLflow. `mlflow.transformers` takes a folder only
together with a transformers 4. It takes a model in memory, too; that would need the weights a
second time, and would store model and tokenizer apart, without card and manifest.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric

from orchestrator.records.tracked_run import (
    NOTE_TAG,
    RegisteredModel,
    TrackedModel,
    TrackedRun,
    tag_filter,
)
from orchestrator.tracking.store import KEY_TAG, Point, StoredRun, valid_name
from orchestrator.workspace.layout import portable_path, workspace_root

EXTERNAL_TAG = "mlflow.model.isExternal"
VERSIONS_TAG = "mlflow.modelVersions"
CHECKPOINT_PARAM = "checkpoint"


def log_model(client: MlflowClient, run: StoredRun, shown: TrackedRun) -> None:
    """Find or create the logged model of a run, as its output, with those of its metrics.

    Args:
        run: The run in the store.
        shown: The same run with its `model`.
    """
    assert shown.model is not None
    model = _logged_model(client, run, shown.model)
    time_ms = shown.ended_ms or shown.started_ms
    points = {name: Point(name, value, step, time_ms) for name, value, step in shown.points}
    points |= {**(run.curves.last if run.curves else {}), **run.points}
    linked = {(p.run_id, p.key, p.value) for p in model.metrics or ()}
    # MLflow would store NaN as 0. Time and step are the run's, so the run gets no second point.
    new = [
        Metric(
            valid_name(name), points[name].value, points[name].time_ms, points[name].step,
            model.model_id, *(data or (None, None)),
        )
        for name, data in shown.model.datasets.items()
        if name in points
        and math.isfinite(points[name].value)
        and (run.id, valid_name(name), points[name].value) not in linked
    ]  # fmt: skip
    if new:
        client.log_batch(run.id, metrics=new)


def register(
    client: MlflowClient, run: StoredRun, given: RegisteredModel, *, moves_alias: bool
) -> None:
    """Store an exported folder with a logged model, and point an alias to its version.

    `moves_alias` says whether an alias that another version has moves here.
    """
    stored = _logged_model(client, run, given.model)
    if EXTERNAL_TAG in stored.tags:
        client.log_model_artifacts(stored.model_id, given.folder)
        _write_model_file(client, stored.model_id, run.id, is_external=False)
        # The last step: after a crash, the files are stored again.
        client.delete_logged_model_tag(stored.model_id, EXTERNAL_TAG)

    name = given.name
    found = client.search_registered_models(f"name = '{name}'")
    aliases = found[0].aliases if found else client.create_registered_model(name).aliases
    versions = client.search_model_versions(f"name = '{name}'")
    same = [v for v in versions if v.tags.get(KEY_TAG) == given.model.key and v.run_id == run.id]
    if same:
        version = same[0]
        for tag, text in given.tags.items():
            if version.tags.get(tag) != text:
                client.set_model_version_tag(name, version.version, tag, text)
        if given.note not in ("", version.description):
            client.update_model_version(name, version.version, given.note)
    else:
        version = client.create_model_version(
            name,
            stored.artifact_location,
            run.id,
            tags={KEY_TAG: given.model.key, **given.tags},
            description=given.note,
            model_id=stored.model_id,
        )
        # A server does this itself. MLflow's page of the logged model shows its versions by this
        # tag.
        known = json.loads(client.get_logged_model(stored.model_id).tags.get(VERSIONS_TAG, "[]"))
        own = {"name": name, "version": str(version.version)}
        if own not in [{**each, "version": str(each["version"])} for each in known]:
            client.set_logged_model_tags(stored.model_id, {VERSIONS_TAG: json.dumps([*known, own])})
    if moves_alias or given.alias not in aliases:
        client.set_registered_model_alias(name, given.alias, version.version)


def _logged_model(client: MlflowClient, run: StoredRun, given: TrackedModel) -> LoggedModel:
    """Find or create a logged model, as an output of the run."""
    found = client.search_logged_models([run.experiment_id], tag_filter({KEY_TAG: given.key}))
    if found:
        model = min(found, key=lambda m: (m.creation_timestamp, m.model_id))
    else:
        tags, params = {KEY_TAG: given.key, EXTERNAL_TAG: "true"}, dict(given.params)
        if checkpoint := params.get(CHECKPOINT_PARAM):
            checkpoint = portable_path(checkpoint, workspace_root(Path(checkpoint)))
            params[CHECKPOINT_PARAM] = checkpoint
            tags[NOTE_TAG] = (
                f"Weights: `{checkpoint}` in the workspace. MLflow holds the files of the models "
                "that `iiet-orch pick` has registered."
            )
        model = client.create_logged_model(
            run.experiment_id,
            name="".join("_" if c in "/:.%\"'" else c for c in given.name),
            source_run_id=run.id,
            tags=tags,
            params=params,
        )
    # MLflow would store the link again each time.
    is_linked = any(point.run_id == run.id for point in model.metrics or ())
    if not is_linked:
        outputs = client.get_run(run.id).outputs if found else None
        if not outputs or model.model_id not in [o.model_id for o in outputs.model_outputs]:
            client.log_outputs(run.id, [LoggedModelOutput(model.model_id, step=0)])
    if model.status != LoggedModelStatus.READY:
        _write_model_file(client, model.model_id, run.id, is_external=True)
        model = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model


def _write_model_file(
    client: MlflowClient, model_id: str, run_id: str, *, is_external: bool
) -> None:
    """Write the file `MLmodel` of a logged model, which every model of MLflow has.

    Of an external model, MLflow then says that it does not hold the files.
    """
    values: dict[str, Any] = {
        "model_id": model_id,
        "model_uuid": model_id,
        "run_id": run_id,
        "flavors": {},
    }
    if is_external:
        values["metadata"] = {EXTERNAL_TAG: True}
    with TemporaryDirectory() as folder:
        path = Path(folder, "MLmodel")
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        client.log_model_artifact(model_id, str(path))
