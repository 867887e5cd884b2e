"""The model family: one decoder, several methods, iteration schedules, and what is needed to choose
between them.

Needs torch and the standard library. Names are imported at first use: `import iiet` alone does not
load torch. The adapter to transformers, `iiet.huggingface`, is not imported here.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iiet.batch import Batch
    from iiet.cache import KeyValueCache
    from iiet.config import PRESETS, ModelConfig, preset
    from iiet.cost import InferenceCost, inference_cost, num_parameters, training_flops_per_token
    from iiet.decoder import Decoder
    from iiet.distillation import DistillationConfig, distillation_loss, frozen_teacher
    from iiet.dropping import drop_layers, most_important_layers
    from iiet.generation import generate, stream
    from iiet.influence import InfluenceTable, influence_table
    from iiet.influence_metrics import INFLUENCE_METRICS
    from iiet.losses import cross_entropy, hidden_state_error, kl_divergence, next_token_loss
    from iiet.methods import METHODS
    from iiet.plain import plain_formulas
    from iiet.pruning import (
        FamilyMember,
        knapsack,
        schedule_at_threshold,
        schedule_family,
        spread_over_cost,
        within_cost,
    )
    from iiet.published import decoder_from_published, published_from_decoder
    from iiet.schedule import IterationSchedule
    from iiet.speculative import DraftRecord
    from iiet.static_steps import StaticSteps

try:
    __version__ = metadata.version("iiet-orch")
except metadata.PackageNotFoundError:  # The source was copied, not installed.
    __version__ = "unknown"

_MODULES = {
    "batch": ("Batch",),
    "cache": ("KeyValueCache",),
    "config": ("PRESETS", "ModelConfig", "preset"),
    "cost": ("InferenceCost", "inference_cost", "num_parameters", "training_flops_per_token"),
    "decoder": ("Decoder",),
    "distillation": ("DistillationConfig", "distillation_loss", "frozen_teacher"),
    "dropping": ("drop_layers", "most_important_layers"),
    "generation": ("generate", "stream"),
    "influence": ("InfluenceTable", "influence_table"),
    "influence_metrics": ("INFLUENCE_METRICS",),
    "losses": ("cross_entropy", "hidden_state_error", "kl_divergence", "next_token_loss"),
    "methods": ("METHODS",),
    "plain": ("plain_formulas",),
    "pruning": (
        "FamilyMember",
        "knapsack",
        "schedule_at_threshold",
        "schedule_family",
        "spread_over_cost",
        "within_cost",
    ),
    "published": ("decoder_from_published", "published_from_decoder"),
    "schedule": ("IterationSchedule",),
    "speculative": ("DraftRecord",),
    "static_steps": ("StaticSteps",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "INFLUENCE_METRICS",
    "METHODS",
    "PRESETS",
    "Batch",
    "Decoder",
    "DistillationConfig",
    "DraftRecord",
    "FamilyMember",
    "InferenceCost",
    "InfluenceTable",
    "IterationSchedule",
    "KeyValueCache",
    "ModelConfig",
    "StaticSteps",
    "cross_entropy",
    "decoder_from_published",
    "distillation_loss",
    "drop_layers",
    "frozen_teacher",
    "generate",
    "hidden_state_error",
    "inference_cost",
    "influence_table",
    "kl_divergence",
    "knapsack",
    "most_important_layers",
    "next_token_loss",
    "num_parameters",
    "plain_formulas",
    "preset",
    "published_from_decoder",
    "schedule_at_threshold",
    "schedule_family",
    "spread_over_cost",
    "stream",
    "training_flops_per_token",
    "within_cost",
]


if not TYPE_CHECKING:  # A type checker knows the names from the imports above, and no others.

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'iiet' has no attribute {name!r}")
        return getattr(import_module(f"iiet.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
