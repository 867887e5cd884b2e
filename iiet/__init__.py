"""The model family: one decoder, several methods, iteration schedules, and what is needed to choose
between them.

Needs torch and the standard library. Names are imported at first use: `import iiet` alone does not
load torch.

- `decoder`: the model, with its `backbone`: begin to read here.
- `model/`: what it is made of: config, schedule, block, mix, cache, losses.
- `methods/`: the kinds of layers, one formula each.
- `decoding/`: generation, sampling, speculation.
- `iiad/`: influence, pruning, distillation.
- `hf/`: model folders, and models of transformers; `exporting` writes them.
- `cost`, `freezing`: what a model costs, and which of its weights a training changes.
- `extensions`, `checks`: what other packages add; checks of values.

Imports go one way: `model`, `methods`, `backbone`, `hf` and `decoding`, `decoder`, `iiad`. Each
imports only from those before it.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iiet.cost import InferenceCost as InferenceCost
    from iiet.cost import inference_cost as inference_cost
    from iiet.cost import num_parameters as num_parameters
    from iiet.cost import training_flops_per_token as training_flops_per_token
    from iiet.decoder import Decoder as Decoder
    from iiet.decoder import decoder_from_published as decoder_from_published
    from iiet.decoding.request import GenerationOptions as GenerationOptions
    from iiet.exporting import export as export
    from iiet.iiad.distillation import distillation_loss as distillation_loss
    from iiet.iiad.distillation import frozen_teacher as frozen_teacher
    from iiet.iiad.influence import INFLUENCE_METRICS as INFLUENCE_METRICS
    from iiet.iiad.influence import influence_table as influence_table
    from iiet.iiad.left_out import decoder_of_kept_layers as decoder_of_kept_layers
    from iiet.iiad.pruning import InfluenceTable as InfluenceTable
    from iiet.iiad.pruning import ScheduleFamily as ScheduleFamily
    from iiet.iiad.pruning import knapsack as knapsack
    from iiet.iiad.pruning import schedule_at_threshold as schedule_at_threshold
    from iiet.iiad.pruning import schedule_family as schedule_family
    from iiet.iiad.pruning import spread_over_cost as spread_over_cost
    from iiet.methods import METHODS as METHODS
    from iiet.model.batch import Batch as Batch
    from iiet.model.cache import KeyValueCache as KeyValueCache
    from iiet.model.config import PRESETS as PRESETS
    from iiet.model.config import DistillationConfig as DistillationConfig
    from iiet.model.config import ModelConfig as ModelConfig
    from iiet.model.config import preset as preset
    from iiet.model.fast import plain_formulas as plain_formulas
    from iiet.model.losses import cross_entropy as cross_entropy
    from iiet.model.losses import hidden_state_error as hidden_state_error
    from iiet.model.losses import kl_divergence as kl_divergence
    from iiet.model.losses import next_token_loss as next_token_loss
    from iiet.model.schedule import IterationSchedule as IterationSchedule

try:
    __version__ = metadata.version("iiet-orch")
except metadata.PackageNotFoundError:  # The source was copied, not installed.
    __version__ = "unknown"

_NAMES_OF_MODULE = {
    "cost": "InferenceCost inference_cost num_parameters training_flops_per_token",
    "decoder": "Decoder decoder_from_published",
    "decoding.request": "GenerationOptions",
    "exporting": "export",
    "iiad.distillation": "distillation_loss frozen_teacher",
    "iiad.influence": "INFLUENCE_METRICS influence_table",
    "iiad.left_out": "decoder_of_kept_layers",
    "iiad.pruning": (
        "InfluenceTable ScheduleFamily knapsack schedule_at_threshold "
        "schedule_family spread_over_cost"
    ),
    "methods": "METHODS",
    "model.batch": "Batch",
    "model.cache": "KeyValueCache",
    "model.config": "DistillationConfig ModelConfig PRESETS preset",
    "model.fast": "plain_formulas",
    "model.losses": "cross_entropy hidden_state_error kl_divergence next_token_loss",
    "model.schedule": "IterationSchedule",
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
