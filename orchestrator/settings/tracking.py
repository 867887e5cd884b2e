"""Settings of the loggers: where the metrics of trainings go."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

from pydantic import field_validator

from iiet.extensions import ExtensionNames
from orchestrator.settings.choices import OneOf
from orchestrator.settings.section import Section

MLFLOW, TENSORBOARD = "mlflow", "tensorboard"

LOGGERS = ExtensionNames(
    "iiet_orch.loggers", "logger", (TENSORBOARD,), is_reserved=lambda name: name == MLFLOW
)
"""Names of loggers beside MLflow, also of other packages; `orchestrator.tracking.log_mirror` has
their classes."""


class TrackingSettings(Section):
    """Loggers of trainings and sweeps."""

    loggers: tuple[Annotated[str, OneOf(LOGGERS, also=(MLFLOW,))], ...] = (MLFLOW,)
    """`mlflow`, which always logs; with `tensorboard`, also TensorBoard's files, in the workspace's
    folder `tensorboard`; and loggers of other packages."""

    @field_validator("loggers")
    @classmethod
    def _refuse_what_cannot_log(cls, loggers: tuple[str, ...]) -> tuple[str, ...]:
        if MLFLOW not in loggers:
            raise ValueError("mlflow always logs, because reports link to it; name it, too")
        if TENSORBOARD in loggers and find_spec(TENSORBOARD) is None:
            raise ValueError(
                "the package tensorboard is not installed; `pip install 'iiet-orch[tensorboard]'` "
                "installs it, or leave tensorboard out"
            )
        return tuple(dict.fromkeys(loggers))
