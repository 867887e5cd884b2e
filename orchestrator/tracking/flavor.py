"""Write the files that let `mlflow.pyfunc.load_model` load an exported model folder.

`MLmodel` names the loader (`served_model.py`, which is copied into `code/`), the signature and the
required versions. The files are written by hand, because MLflow's own `log_model` would load the
model during registration and run code from its folder. Transformers still loads the folder.
"""

from __future__ import annotations

import json
import platform
import shutil
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from orchestrator.tracking import served_model

MODEL_FILE = "MLmodel"
CODE_FOLDER = "code"
LOADER = "iiet_served_model"
REQUIRED_PACKAGES = ("mlflow", "torch", "transformers", "tokenizers", "safetensors")


def write_flavor(folder: Path) -> None:
    """Write the files into an empty folder; the caller copies them into the model folder."""
    python = platform.python_version()
    # MLflow would load the model to find these. Builds such as +cpu are not on PyPI.
    requirements = [
        f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIRED_PACKAGES
    ]
    model = {
        "flavors": {
            "python_function": {
                "loader_module": LOADER,
                "code": CODE_FOLDER,
                "python_version": python,
                "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
            }
        },
        "mlflow_version": metadata.version("mlflow"),
        "model_uuid": uuid.uuid4().hex,
        "signature": _signature(),
        "utc_time_created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
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
    shutil.copyfile(served_model.__file__, folder / CODE_FOLDER / f"{LOADER}.py")


def _signature() -> dict[str, str]:
    # Of `TextModel.predict`: one column of texts as input, one text per row as output.
    column = [{"type": "string", "required": True}]
    params = [
        {"name": "max_new_tokens", "type": "long", "default": 64, "shape": None},
        {"name": "temperature", "type": "double", "default": 0.0, "shape": None},
    ]
    signature = {"inputs": column, "outputs": column, "params": params}
    return {name: json.dumps(value) for name, value in signature.items()}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
