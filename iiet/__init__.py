"""The model family: one decoder, several methods, iteration schedules, and what is needed to choose
between them.

Needs torch and the standard library. Names are imported at first use: `import iiet` alone does not
load torch.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iiet.batch import Batch as Batch
    from iiet.cache import KeyValueCache as KeyValueCache
    from iiet.config import PRESETS as PRESETS
    from iiet.config import DistillationConfig as DistillationConfig
    from iiet.config import ModelConfig as ModelConfig
    from iiet.config import preset as preset
    from iiet.cost import InferenceCost as InferenceCost
    from iiet.cost import inference_cost as inference_cost
    from iiet.cost import num_parameters as num_parameters
    from iiet.cost import training_flops_per_token as training_flops_per_token
    from iiet.decoder import Decoder as Decoder
    from iiet.decoder import decoder_from_published as decoder_from_published
    from iiet.distillation import distillation_loss as distillation_loss
    from iiet.distillation import frozen_teacher as frozen_teacher
    from iiet.exporting import export as export
    from iiet.fast import plain_formulas as plain_formulas
    from iiet.influence import INFLUENCE_METRICS as INFLUENCE_METRICS
    from iiet.influence import influence_table as influence_table
    from iiet.left_out import decoder_of_kept_layers as decoder_of_kept_layers
    from iiet.losses import cross_entropy as cross_entropy
    from iiet.losses import hidden_state_error as hidden_state_error
    from iiet.losses import kl_divergence as kl_divergence
    from iiet.losses import next_token_loss as next_token_loss
    from iiet.methods import METHODS as METHODS
    from iiet.pruning import InfluenceTable as InfluenceTable
    from iiet.pruning import ScheduleFamily as ScheduleFamily
    from iiet.pruning import knapsack as knapsack
    from iiet.pruning import schedule_at_threshold as schedule_at_threshold
    from iiet.pruning import schedule_family as schedule_family
    from iiet.pruning import spread_over_cost as spread_over_cost
    from iiet.request import GenerationOptions as GenerationOptions
    from iiet.schedule import IterationSchedule as IterationSchedule

try:
    __version__ = metadata.version("iiet-orch")
except metadata.PackageNotFoundError:  # The source was copied, not installed.
    __version__ = "unknown"

_NAMES_OF_MODULE = {
    "batch": "Batch",
    "cache": "KeyValueCache",
    "config": "DistillationConfig ModelConfig PRESETS preset",
    "cost": "InferenceCost inference_cost num_parameters training_flops_per_token",
    "decoder": "Decoder decoder_from_published",
    "distillation": "distillation_loss frozen_teacher",
    "exporting": "export",
    "fast": "plain_formulas",
    "influence": "INFLUENCE_METRICS influence_table",
    "left_out": "decoder_of_kept_layers",
    "losses": "cross_entropy hidden_state_error kl_divergence next_token_loss",
    "methods": "METHODS",
    "pruning": (
        "InfluenceTable ScheduleFamily knapsack schedule_at_threshold "
        "schedule_family spread_over_cost"
    ),
    "request": "GenerationOptions",
    "schedule": "IterationSchedule",
}
_MODULE_OF = {name: m for m, names in _NAMES_OF_MODULE.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


if not TYPE_CHECKING:  # A type checker knows the names from the imports above, and no others.

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'iiet' has no attribute {name!r}")
        return getattr(import_module(f"iiet.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """Return the interface alone."""
    return ["__version__", *__all__]
