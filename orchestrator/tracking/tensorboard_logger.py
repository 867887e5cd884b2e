"""TensorBoard's event files, for `tensorboard --logdir WORKSPACE/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.tracking.run_logger import RunLogger

EVENT_FILES = "events.out.tfevents.*"


class TensorBoardLogger(RunLogger):
    """Writes the metrics of a training, and replaces what earlier processes have written of it."""

    _has_begun = False
    _writer: Any = None
    """Open while the run is running."""

    def log(self, step: int, values: Mapping[str, float], *, time: float) -> None:
        if not self._has_begun:
            for earlier in self.folder.glob(EVENT_FILES):
                earlier.unlink(missing_ok=True)
            self._has_begun = True
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # Takes seconds, and few use it.

            self._writer = SummaryWriter(str(self.folder))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self, status: str) -> None:  # noqa: ARG002 - TensorBoard shows no state
        if self._writer is not None:
            self._writer.close()
            self._writer = None
