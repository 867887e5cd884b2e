"""Operations on MLflow's logged models, and on the versions that are registered from them.

A logged model is found by its key, so delivering an operation again makes no second one. It links
the metrics of its runs with the data that they were measured on. Its weights stay in the workspace,
which MLflow calls an external model, until `register` stores an exported folder with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from orchestrator.tracking.client import (
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    MlflowClient,
    get_artifact_repository,
)
from orchestrator.tracking.flavor import write_external_model, write_flavor
from orchestrator.tracking.store import KEY_TAG, NOTE_TAG, StoredRun, tag_filter, valid_name

EXTERNAL_TAG = "mlflow.model.isExternal"
VERSIONS_TAG = "mlflow.modelVersions"
CHECKPOINT_PARAM = "checkpoint"

Datasets = Mapping[str, Sequence[str] | None]
"""Name of a metric -> name and digest of the data that it was measured on; None if of no data."""
NO_DATASETS: Datasets = MappingProxyType({})
NO_TEXTS: Mapping[str, str] = MappingProxyType({})


def log_model(
    client: MlflowClient,
    run: StoredRun,
    key: str,
    name: str,
    params: Mapping[str, str] = NO_TEXTS,
    datasets: Datasets = NO_DATASETS,
) -> LoggedModel:
    """Find or create a logged model, as an output of the run, with metrics of the run.

    Args:
        key: Of the weights and their schedule.
        datasets: The metrics that describe the model; the run holds their values.
    """
    known = _find(client, run, key)
    model = known or _create(client, run, key, name, params)
    if known or model.source_run_id != run.id:
        _link(client, run, model)
    linked = {(p.run_id, p.key, p.step, p.value) for p in model.metrics or ()}
    data_of = {valid_name(name): data for name, data in datasets.items()}
    found = [run.metrics[name] for name in data_of if name in run.metrics]
    # MLflow would store NaN as 0. Time and step are the run's, so the run gets no second point.
    points = [
        Metric(
            point.key, point.value, point.timestamp, point.step, model.model_id,
            *(data_of[point.key] or (None, None)),
        )
        for point in found
        if math.isfinite(point.value)
        and (run.id, point.key, point.step, point.value) not in linked
    ]  # fmt: skip
    if points:
        client.log_batch(run.id, metrics=points)
    if model.status != LoggedModelStatus.READY:
        with TemporaryDirectory() as folder:
            write_external_model(Path(folder), model.model_id, run.id)
            _files(client, model).log_artifacts(folder)
        model = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model


def register(
    client: MlflowClient,
    run: StoredRun,
    model: str,
    key: str,
    folder: Path,
    alias: str,
    note: str,
    tags: Mapping[str, str] = NO_TEXTS,
    example: str = "",
    logged: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Store an exported folder with a logged model, and point an alias to its version.

    Args:
        model: Name of the registered model; created if it is missing.
        key: Of the logged model; one key in one run is one version.
        note: Description of the version.
        tags: Tags of the version.
        example: A text that the model reads.
        logged: The other arguments of `log_model`.
    """
    stored = log_model(client, run, key, **{"name": model, **logged})
    if EXTERNAL_TAG in stored.tags:
        files = _files(client, stored)
        files.log_artifacts(str(folder))
        with TemporaryDirectory() as flavor:
            write_flavor(Path(flavor), folder, stored.model_id, run.id, example=example)
            files.log_artifacts(flavor)
        # The last step: after a crash, the files are stored again.
        client.delete_logged_model_tag(stored.model_id, EXTERNAL_TAG)
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    versions = client.search_model_versions(f"name = '{model}'")
    same = [v for v in versions if v.tags.get(KEY_TAG) == key and v.run_id == run.id]
    if same:
        version = same[0]
        for name, value in tags.items():
            if version.tags.get(name) != value:
                client.set_model_version_tag(model, version.version, name, value)
        if note not in ("", version.description):
            client.update_model_version(model, version.version, note)
    else:
        version = client.create_model_version(
            model,
            stored.artifact_location,
            run.id,
            tags={KEY_TAG: key, **tags},
            description=note,
            model_id=stored.model_id,
        )
        _name_version(client, stored.model_id, model, str(version.version))
    client.set_registered_model_alias(model, alias, version.version)


def _find(client: MlflowClient, run: StoredRun, key: str) -> LoggedModel | None:
    found = client.search_logged_models([run.experiment_id], tag_filter({KEY_TAG: key}))
    return min(found, key=lambda m: (m.creation_timestamp, m.model_id), default=None)


def _create(
    client: MlflowClient, run: StoredRun, key: str, name: str, params: Mapping[str, str]
) -> LoggedModel:
    tags = {KEY_TAG: key, EXTERNAL_TAG: "true"}
    if checkpoint := params.get(CHECKPOINT_PARAM):
        tags[NOTE_TAG] = (
            f"Weights: `{checkpoint}` in the workspace. MLflow holds the files of the models that "
            "`iiet-orch pick` has registered."
        )
    model = client.create_logged_model(
        run.experiment_id,
        name=_valid_model_name(name),
        source_run_id=run.id,
        tags=tags,
        params=dict(params),
    )
    # Another process may have created it meanwhile; all keep the first one.
    first = _find(client, run, key)
    if first is None or first.model_id == model.model_id:
        client.log_outputs(run.id, [LoggedModelOutput(model.model_id, step=0)])
        return model
    client.delete_logged_model(model.model_id)
    return first


def _link(client: MlflowClient, run: StoredRun, model: LoggedModel) -> None:
    # MLflow would store the link again each time.
    if any(point.run_id == run.id for point in model.metrics or ()):
        return
    outputs = client.get_run(run.id).outputs
    if not outputs or model.model_id not in [o.model_id for o in outputs.model_outputs]:
        client.log_outputs(run.id, [LoggedModelOutput(model.model_id, step=0)])


def _name_version(client: MlflowClient, model_id: str, name: str, version: str) -> None:
    # A server does this itself. MLflow's page of the logged model shows its versions by this tag.
    known = json.loads(client.get_logged_model(model_id).tags.get(VERSIONS_TAG, "[]"))
    if not any(v["name"] == name and str(v["version"]) == version for v in known):
        known.append({"name": name, "version": version})
        client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps(known)})


def _files(client: MlflowClient, model: LoggedModel) -> Any:
    return get_artifact_repository(model.artifact_location, tracking_uri=client.tracking_uri)


def _valid_model_name(name: str) -> str:
    return "".join("_" if c in "/:.%\"'" else c for c in name)
