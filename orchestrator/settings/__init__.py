"""Every setting of the program, in one frozen tree.

Sources: defaults (those of the shipped sweep `toy`), a YAML file, `--set a.b=c`, options. Unknown
keys are errors, and validation never edits a value. The tree is saved with every run; the sections
that determine a result are hashed into its key.
"""

from orchestrator.settings.cluster import ClusterSettings, storage_problem
from orchestrator.settings.model import (
    BASELINE_METHOD,
    DEFAULT_METHOD,
    DataSettings,
    ModelSettings,
    model_label,
)
from orchestrator.settings.resolve import (
    SETTINGS_NAME,
    find_field,
    flatten,
    read_settings,
    resolve_settings,
    to_yaml,
)
from orchestrator.settings.schema import (
    EvaluationSettings,
    InfluenceSettings,
    Settings,
)
from orchestrator.settings.section import Section
from orchestrator.settings.sweep import SearchSettings, SweepSettings
from orchestrator.settings.tracking import MLFLOW, TrackingSettings
from orchestrator.settings.training import DistillationSettings, ElasticSettings, TrainingSettings

__all__ = [
    "BASELINE_METHOD",
    "DEFAULT_METHOD",
    "SETTINGS_NAME",
    "ClusterSettings",
    "DataSettings",
    "DistillationSettings",
    "ElasticSettings",
    "EvaluationSettings",
    "InfluenceSettings",
    "ModelSettings",
    "SearchSettings",
    "Section",
    "Settings",
    "SweepSettings",
    "MLFLOW",
    "TrackingSettings",
    "TrainingSettings",
    "find_field",
    "flatten",
    "model_label",
    "read_settings",
    "resolve_settings",
    "storage_problem",
    "to_yaml",
]
