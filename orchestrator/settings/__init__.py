"""Every setting of the program, in one frozen tree.

One road leads here: defaults, then a YAML file, then `--set a.b=c`. Unknown keys are errors with
the nearest known name, all problems are reported at once, and validation never edits a value.
Pydantic does the checking; `resolve` turns its findings into one sentence each. The resolved tree
is saved beside every run, and the sections that determine a result are hashed into its key. The
defaults are those of the shipped sweep `toy`: they make a model in minutes on a CPU.
"""

from orchestrator.settings.models import (
    BASELINE_METHOD,
    DEFAULT_METHOD,
    DataSettings,
    ModelSettings,
    method_of_label,
    model_label,
)
from orchestrator.settings.recipes import DistillationSettings, TrainingSettings
from orchestrator.settings.resolve import (
    flatten,
    read_settings,
    resolve_settings,
    to_yaml,
)
from orchestrator.settings.section import Section
from orchestrator.settings.tree import (
    ClusterSettings,
    EvaluationSettings,
    InfluenceSettings,
    SearchSettings,
    Settings,
    SweepSettings,
)

__all__ = [
    "BASELINE_METHOD",
    "DEFAULT_METHOD",
    "ClusterSettings",
    "DataSettings",
    "DistillationSettings",
    "EvaluationSettings",
    "InfluenceSettings",
    "ModelSettings",
    "SearchSettings",
    "Section",
    "Settings",
    "SweepSettings",
    "TrainingSettings",
    "flatten",
    "method_of_label",
    "model_label",
    "read_settings",
    "resolve_settings",
    "to_yaml",
]
