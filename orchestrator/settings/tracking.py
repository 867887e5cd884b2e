"""Settings of the loggers: where the metrics of trainings go."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import field_validator

from orchestrator.settings.section import Section

TENSORBOARD = "tensorboard"


class TrackingSettings(Section):
    """Loggers of trainings and sweeps."""

    loggers: tuple[Literal["mlflow", "tensorboard"], ...] = ("mlflow",)
    """`mlflow`, or `mlflow` and `tensorboard`: also write TensorBoard's files, into the workspace's
    folder `tensorboard`."""

    @field_validator("loggers")
    @classmethod
    def _refuse_what_cannot_log(cls, loggers: tuple[str, ...]) -> tuple[str, ...]:
        if "mlflow" not in loggers:
            raise ValueError("mlflow always logs, because reports link to it; name it, too")
        if TENSORBOARD in loggers and find_spec(TENSORBOARD) is None:
            raise ValueError(
                "the package tensorboard is not installed; `pip install 'iiet-orch[tensorboard]'` "
                "installs it, or leave tensorboard out"
            )
        return tuple(dict.fromkeys(loggers))
