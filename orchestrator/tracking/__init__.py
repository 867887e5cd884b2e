"""The only package that imports MLflow, which is a view of the workspace.

What a run shows is a file of the workspace (`records/tracked_run.py`). `Tracking.publish` lets
MLflow show it, in the background and any number of times.
"""

import os

# MLflow reads these when it is imported or at its first request. The user's own values win.
QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}
for _name, _value in QUIET_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
