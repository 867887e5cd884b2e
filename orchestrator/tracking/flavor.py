"""Write the files that let `mlflow.pyfunc.load_model` load an exported model folder.

`MLmodel` names the loader (`served_model.py`, which is copied into `code/`), the signature, an
example and the required versions. The files are written by hand, because MLflow's own `log_model`
would load the model during registration and run code from its folder. Transformers still loads the
folder.
"""

from __future__ import annotations

import json
import platform
import shutil
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from orchestrator.tracking import served_model
from orchestrator.workspace.provenance import file_digest

MODEL_FILE = "MLmodel"
CODE_FOLDER = "code"
EXAMPLE_FILE, SERVED_EXAMPLE_FILE = "input_example.json", "serving_input_example.json"
REQUIRED_PACKAGES = ("mlflow", "torch", "transformers", "tokenizers", "safetensors")
_TYPES = {int: "long", float: "double", str: "string"}


def write_flavor(
    folder: Path, exported: Path, model_id: str, run_id: str, *, example: str = ""
) -> None:
    """Write the files into an empty folder; the caller copies them into the model folder.

    Args:
        exported: The model folder, whose `config.json` says whether the model makes corrections.
        model_id, run_id: Of MLflow's logged model and of its run.
        example: A text that the model reads; no example when empty.
    """
    python = platform.python_version()
    # MLflow would load the model to find these. Builds such as +cpu are not on PyPI.
    requirements = [
        f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIRED_PACKAGES
    ]
    # A process imports a module once. By its content, it gets the one of each model's own version.
    loader = f"iiet_served_model_{file_digest(Path(served_model.__file__))[:12]}"
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    model = {
        **_identity(model_id, run_id),
        "flavors": {
            "python_function": {
                "loader_module": loader,
                "code": CODE_FOLDER,
                "python_version": python,
                "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
            }
        },
        "signature": _signature(has_corrections=config.get("corrections") is not None),
        **({"saved_input_example_info": _write_example(folder, example)} if example else {}),
    }
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": requirements}],
    }
    _write(folder / MODEL_FILE, model)
    _write(folder / "conda.yaml", conda)
    _write(folder / "python_env.yaml", {"python": python, "dependencies": ["-r requirements.txt"]})
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements))
    (folder / CODE_FOLDER).mkdir()
    shutil.copyfile(served_model.__file__, folder / CODE_FOLDER / f"{loader}.py")


def write_external_model(folder: Path, model_id: str, run_id: str) -> None:
    """Write what MLflow writes for a model whose files it does not hold.

    `mlflow.pyfunc.load_model` then says so, where it would say that a file is missing.
    """
    external = {"mlflow.model.isExternal": True}
    _write(
        folder / MODEL_FILE, {**_identity(model_id, run_id), "flavors": {}, "metadata": external}
    )


def _identity(model_id: str, run_id: str) -> dict[str, Any]:
    return {
        "mlflow_version": metadata.version("mlflow"),
        "model_id": model_id,
        "model_uuid": model_id,
        "run_id": run_id,
        "utc_time_created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }


def _signature(*, has_corrections: bool) -> dict[str, str]:
    # Of `TextModel.predict`: one column of texts as input; the parameter `output` names the column
    # that is returned.
    outputs = [
        {"type": kind, "name": name, "required": False}
        for name, kind in served_model.OUTPUTS.items()
    ]
    params = [
        {"name": name, "type": _TYPES[type(value)], "default": value, "shape": None}
        for name, value in served_model.PARAMS.items()
        if has_corrections or name not in served_model.SCHEDULE_PARAMS
    ]
    inputs = [{"type": "string", "required": True}]
    signature = {"inputs": inputs, "outputs": outputs, "params": params}
    return {name: json.dumps(value) for name, value in signature.items()}


def _write_example(folder: Path, text: str) -> dict[str, str]:
    # The second file is the body of a request to a server.
    for name, content in ((EXAMPLE_FILE, [text]), (SERVED_EXAMPLE_FILE, {"inputs": [text]})):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return {
        "artifact_path": EXAMPLE_FILE,
        "serving_input_path": SERVED_EXAMPLE_FILE,
        "type": "json_object",
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
