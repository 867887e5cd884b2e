"""What makes an exported folder a model that `mlflow.pyfunc.load_model` loads: files beside it.

`MLmodel` names the loader (`served_model.py`, which is copied into `code/`), the signature and the
versions that are needed. They are written by hand, because MLflow's own `log_model` would load the
model while it is registered, and run code of its folder. The folder itself stays what transformers
loads.
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
NEEDED = ("mlflow", "torch", "transformers", "tokenizers", "safetensors")


def write_flavor(folder: Path) -> None:
    """Write the files into an empty folder, from which they go beside an exported model."""
    python = platform.python_version()
    # Named here: MLflow would find out by loading the model. Builds such as +cpu are not on PyPI.
    needed = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in NEEDED]
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
        "dependencies": [f"python={python}", "pip", {"pip": needed}],
    }
    _write(folder / MODEL_FILE, model)
    _write(folder / "conda.yaml", conda)
    _write(folder / "python_env.yaml", {"python": python, "dependencies": ["-r requirements.txt"]})
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in needed))
    (folder / CODE_FOLDER).mkdir()
    shutil.copyfile(served_model.__file__, folder / CODE_FOLDER / f"{LOADER}.py")


def _signature() -> dict[str, str]:
    """Return the signature of `TextModel.predict`: one column of texts in, one text a row out."""
    column = [{"type": "string", "required": True}]
    params = [
        {"name": "max_new_tokens", "type": "long", "default": 64, "shape": None},
        {"name": "temperature", "type": "double", "default": 0.0, "shape": None},
    ]
    parts = {"inputs": column, "outputs": column, "params": params}
    return {name: json.dumps(part) for name, part in parts.items()}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
