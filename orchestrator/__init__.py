"""Pretrain, sweep and distill iterative Transformers from Python.

What trains, measures or uses models is a function. It takes settings where it needs them and
returns a typed result, which a notebook shows as the terminal does, with `to_pandas()`:

    from orchestrator import read_settings, sweep

    result = sweep(read_settings("toy.yaml"), workspace="my-workspace")
    print(result.to_pandas())

`workspace` is a workspace or its folder, which is created if it is missing; by default
`IIET_WORKSPACE`, else `./iiet-workspace`. `progress` receives
progress and notes, and shows nothing when unset; `terminal_progress()` makes one for a terminal.
Names are imported at first use: `import orchestrator` alone loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.evaluation.decode_timing import MeasurementSettings
    from orchestrator.pipelines.benchmarking import BenchmarkResult, benchmark
    from orchestrator.pipelines.evaluating import (
        EvaluatePlan,
        ModelEvaluations,
        evaluate,
        plan_evaluate,
    )
    from orchestrator.pipelines.generating import generate, generate_stream
    from orchestrator.pipelines.influence import InfluenceResult, measure_influence
    from orchestrator.pipelines.inspecting import InspectedModel, inspect_model
    from orchestrator.pipelines.models import PickResult, export, import_model, pick, plan_pick
    from orchestrator.pipelines.reports import report
    from orchestrator.pipelines.syncing import sync
    from orchestrator.pipelines.training import (
        DistillResult,
        PretrainResult,
        TrainingPlan,
        distill,
        plan_distill,
        plan_pretrain,
        prepare,
        pretrain,
        schedule_of_trial,
    )
    from orchestrator.records.trial import Trial
    from orchestrator.reporting.sweep_report import ReportResult
    from orchestrator.settings import Settings, read_settings
    from orchestrator.sweeping.plan import SweepPlan
    from orchestrator.sweeping.stages import plan_sweep
    from orchestrator.sweeping.sweep import SweepResult, sweep
    from orchestrator.terminal.progress import Progress, terminal_progress
    from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
    from orchestrator.workspace.layout import Workspace

_MODULES = {
    "evaluation.decode_timing": "MeasurementSettings",
    "pipelines.benchmarking": "BenchmarkResult benchmark",
    "pipelines.evaluating": "EvaluatePlan ModelEvaluations evaluate plan_evaluate",
    "pipelines.generating": "generate generate_stream",
    "pipelines.influence": "InfluenceResult measure_influence",
    "pipelines.inspecting": "InspectedModel inspect_model",
    "pipelines.models": "PickResult export import_model pick plan_pick",
    "pipelines.reports": "report",
    "sweeping.plan": "SweepPlan",
    "sweeping.stages": "plan_sweep",
    "sweeping.sweep": "SweepResult sweep",
    "pipelines.syncing": "sync",
    "pipelines.training": (
        "DistillResult PretrainResult TrainingPlan distill plan_distill plan_pretrain prepare "
        "pretrain schedule_of_trial"
    ),
    "records.trial": "Trial",
    "reporting.sweep_report": "ReportResult",
    "settings": "Settings read_settings",
    "terminal.progress": "Progress terminal_progress",
    "workspace.errors": "Interrupted RunFailed UserError",
    "workspace.layout": "Workspace",
}
"""Module -> its names here."""
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "BenchmarkResult", "DistillResult", "EvaluatePlan", "InfluenceResult",
    "InspectedModel", "Interrupted", "MeasurementSettings", "ModelEvaluations", "PickResult",
    "PretrainResult", "Progress", "ReportResult", "RunFailed", "Settings",
    "SweepPlan", "SweepResult", "TrainingPlan", "Trial", "UserError", "Workspace", "benchmark",
    "distill", "evaluate", "export", "generate", "generate_stream", "import_model",
    "inspect_model", "measure_influence", "pick", "plan_distill",
    "plan_evaluate", "plan_pick", "plan_pretrain", "plan_sweep", "prepare", "pretrain",
    "read_settings", "report", "schedule_of_trial", "sweep", "sync", "terminal_progress",
]  # fmt: skip
"""All of them, as type checkers need to read it."""


if not TYPE_CHECKING:  # A type checker knows the names from the imports above, and no others.

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
        return getattr(import_module(f"orchestrator.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """Return the interface alone."""
    return __all__
