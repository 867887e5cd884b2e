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
from orchestrator.tracking.store import KEY_TAG, Point, StoredRun, time_of_values, valid_name
from orchestrator.workspace.layout import portable_path, workspace_root

EXTERNAL_TAG = "mlflow.model.isExternal"
VERSIONS_TAG = "mlflow.modelVersions"
CHECKPOINT_PARAM = "checkpoint"


def log_model(client: MlflowClient, run: StoredRun, shown: TrackedRun) -> None:
    """Find or create the logged model of a run, as its output, and link the run's metrics with it.

    A measurement of a model that a sweep will log waits for that: it is linked when the run is
    shown again.

    Args:
        run: The run in the store.
        shown: The same run with its `model`.
    """
    assert shown.model is not None
    if shown.model.is_of_sweep and not _stored_models(client, run, shown.model):
        return
    logged_model = _logged_model(client, run, shown.model)
    time_ms = time_of_values(shown)
    points = {name: Point(name, value, step, time_ms) for name, value, step in shown.points}
    # What the run has in MLflow already gets the same time and step: no second point.
    if run.curves:
        points |= run.curves.last
    points |= run.last_points
    linked_values = {(m.run_id, m.key, m.value) for m in logged_model.metrics or ()}
    new_metrics: list[Metric] = []
    for name, data in shown.model.datasets.items():
        point = points.get(name)
        # MLflow would store NaN as 0.
        if point is None or not math.isfinite(point.value):
            continue
        if (run.id, valid_name(name), point.value) in linked_values:
            continue
        data_name, data_digest = data or (None, None)
        new_metrics.append(
            Metric(
                valid_name(name),
                point.value,
                point.time_ms,
                point.step,
                model_id=logged_model.model_id,
                dataset_name=data_name,
                dataset_digest=data_digest,
            )
        )
    if new_metrics:
        client.log_batch(run.id, metrics=new_metrics)


def register(
    client: MlflowClient, run: StoredRun, model: RegisteredModel, *, moves_alias: bool
) -> None:
    """Store an exported folder with a logged model, and point an alias to its version.

    Args:
        run: The run in the store that made or measured the model.
        model: The registered model's version to store.
        moves_alias: Whether an alias that another version has moves to this one.
    """
    logged_model = _logged_model(client, run, model.model)
    if EXTERNAL_TAG in logged_model.tags:
        client.log_model_artifacts(logged_model.model_id, model.folder)
        _write_model_file(client, logged_model.model_id, run.id, is_external=False)
        # The last step: after a crash, the files are stored again.
        client.delete_logged_model_tag(logged_model.model_id, EXTERNAL_TAG)

    registered_models = client.search_registered_models(f"name = '{model.name}'")
    if registered_models:
        aliases = registered_models[0].aliases
    else:
        aliases = client.create_registered_model(model.name).aliases
    # The same model of the same run is the same version; its tags and its note may be new.
    versions = [
        version
        for version in client.search_model_versions(f"name = '{model.name}'")
        if version.tags.get(KEY_TAG) == model.model.key and version.run_id == run.id
    ]
    if versions:
        version = versions[0]
        for tag, text in model.tags.items():
            if version.tags.get(tag) != text:
                client.set_model_version_tag(model.name, version.version, tag, text)
        if model.note not in ("", version.description):
            client.update_model_version(model.name, version.version, model.note)
    else:
        version = client.create_model_version(
            model.name,
            logged_model.artifact_location,
            run.id,
            tags={KEY_TAG: model.model.key, **model.tags},
            description=model.note,
            model_id=logged_model.model_id,
        )
        _list_version(client, logged_model.model_id, model.name, str(version.version))
    if moves_alias or model.alias not in aliases:
        client.set_registered_model_alias(model.name, model.alias, version.version)


def _list_version(client: MlflowClient, model_id: str, name: str, version: str) -> None:
    """Add a version to the tag by which MLflow's page of a logged model shows its versions.

    A server writes this tag itself, a version as a number or as a text; a local store does not.
    """
    listed = json.loads(client.get_logged_model(model_id).tags.get(VERSIONS_TAG, "[]"))
    is_listed = any(
        {**entry, "version": str(entry["version"])} == {"name": name, "version": version}
        for entry in listed
    )
    if not is_listed:
        versions = json.dumps([*listed, {"name": name, "version": version}])
        client.set_logged_model_tags(model_id, {VERSIONS_TAG: versions})


def _stored_models(client: MlflowClient, run: StoredRun, model: TrackedModel) -> list[LoggedModel]:
    models = client.search_logged_models([run.experiment_id], tag_filter({KEY_TAG: model.key}))
    return list(models)


def _logged_model(client: MlflowClient, run: StoredRun, model: TrackedModel) -> LoggedModel:
    """Find or create a logged model, as an output of the run."""
    logged_models = _stored_models(client, run, model)
    if logged_models:
        # Two machines may have created it at the same moment: all take the older one.
        logged_model = min(logged_models, key=lambda m: (m.creation_timestamp, m.model_id))
    else:
        tags = {KEY_TAG: model.key, EXTERNAL_TAG: "true"}
        params = dict(model.params)
        if checkpoint := params.get(CHECKPOINT_PARAM):
            checkpoint = portable_path(checkpoint, workspace_root(Path(checkpoint)))
            params[CHECKPOINT_PARAM] = checkpoint
            tags[NOTE_TAG] = (
                f"Weights: `{checkpoint}` in the workspace. MLflow holds the files of the models "
                "that `iiet-orch pick` has registered."
            )
        logged_model = client.create_logged_model(
            run.experiment_id,
            # MLflow refuses names with these characters.
            name="".join("_" if c in "/:.%\"'" else c for c in model.name),
            source_run_id=run.id,
            tags=tags,
            params=params,
        )
    # MLflow would store the link again each time.
    is_linked = any(metric.run_id == run.id for metric in logged_model.metrics or ())
    if not is_linked:
        outputs = client.get_run(run.id).outputs if logged_models else None
        output_ids = [output.model_id for output in outputs.model_outputs] if outputs else []
        if logged_model.model_id not in output_ids:
            client.log_outputs(run.id, [LoggedModelOutput(logged_model.model_id, step=0)])
    if logged_model.status != LoggedModelStatus.READY:
        _write_model_file(client, logged_model.model_id, run.id, is_external=True)
        logged_model = client.finalize_logged_model(logged_model.model_id, LoggedModelStatus.READY)
    return logged_model


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
