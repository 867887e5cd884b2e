"""Every setting of the program, in one frozen tree.

Sources: defaults (those of the shipped sweep `toy`), a YAML file, `--set a.b=c`, options. Unknown
keys are errors, and validation never edits a value. The tree is saved with every run; the sections
that determine a result are hashed into its key. Importing it does not load PyTorch.
"""

from orchestrator.settings.cluster import ClusterSettings, storage_problem
from orchestrator.settings.data import DataSettings
from orchestrator.settings.evaluation import EvaluationSettings, InfluenceSettings
from orchestrator.settings.files import SETTINGS_NAME, read_settings, to_yaml
from orchestrator.settings.resolve import flatten, resolve_settings
from orchestrator.settings.schema import Settings, find_field
from orchestrator.settings.section import Section
from orchestrator.settings.sweep import SearchSettings, SweepSettings
from orchestrator.settings.training import (
    BASELINE_METHOD,
    DEFAULT_METHOD,
    PCFORMER,
    DistillationSettings,
    ElasticSettings,
    ModelSettings,
    TrainingSettings,
)

__all__ = [
    "BASELINE_METHOD", "DEFAULT_METHOD", "PCFORMER", "SETTINGS_NAME",
    "ClusterSettings", "DataSettings", "DistillationSettings", "ElasticSettings",
    "EvaluationSettings", "InfluenceSettings", "ModelSettings", "SearchSettings",
    "Section", "Settings", "SweepSettings", "TrainingSettings",
    "find_field", "flatten", "read_settings", "resolve_settings", "storage_problem",
    "to_yaml",
]  # fmt: skip
