"""Profile a few steps of a run with PyTorch's profiler; the run's results do not change.

`profile/trace.json.gz` opens in https://ui.perfetto.dev. On a GPU, `profile/memory.pickle` has
every allocation with its stack, for https://pytorch.org/memory_viz. On the CPU, the operators are
listed in `profile/memory.txt` by the memory that they allocate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, schedule

from orchestrator.training.job import PROFILE_NAME
from orchestrator.workspace.files import new_folder

STEPS_BEFORE = 3
"""The first steps also allocate memory and choose kernels; it warms up in the last one."""
MAX_MEMORY_EVENTS = 1_000_000
"""Latest allocations and releases that a snapshot of the memory holds."""
MAX_TABLE_ROWS = 50

memory_history: Any = torch.cuda.memory  # Its functions have no types.


class StepProfiler:
    """Profiles `num_steps` steps of this process, after `STEPS_BEFORE` others."""

    def __init__(
        self, run_folder: Path, num_steps: int, device: str, event: Callable[..., None]
    ) -> None:
        """Start to count steps; `event` is called with a name and details at the end."""
        self._folder, self._num_steps, self._event = run_folder / PROFILE_NAME, num_steps, event
        self._is_gpu = device.startswith("cuda")
        self._num_done = 0
        self._profiler: profile | None = profile(
            schedule=schedule(wait=STEPS_BEFORE - 1, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )
        self._profiler.start()

    def end_step(self) -> None:
        """Count a step; the last one of the profile writes it."""
        if self._profiler is None:
            return
        self._num_done += 1
        if self._is_gpu and self._num_done == STEPS_BEFORE:
            memory_history._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        self._profiler.step()
        if self._num_done == STEPS_BEFORE + self._num_steps:
            self.close()

    def close(self) -> None:
        """End the profile; if the run ended before its last step, it holds fewer steps."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if self._num_done <= STEPS_BEFORE:
            text = f"no profile: it begins after {STEPS_BEFORE} steps, and the run ended before"
            self._event("not profiled", text=text)
        profiler.stop()
        if self._is_gpu:
            memory_history._record_memory_history(enabled=None)

    def _write(self, profiler: Any) -> None:
        with new_folder(self._folder) as folder:
            profiler.export_chrome_trace(str(folder / "trace.json.gz"))
            if self._is_gpu:
                memory_history._dump_snapshot(str(folder / "memory.pickle"))
            else:
                averages = profiler.key_averages()
                table = averages.table(sort_by="self_cpu_memory_usage", row_limit=MAX_TABLE_ROWS)
                (folder / "memory.txt").write_text(table, encoding="utf-8")
        num_steps = self._num_done - STEPS_BEFORE
        self._event("profiled", text=f"profile of {num_steps} steps")
