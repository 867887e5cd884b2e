"""The model family: one decoder, several methods, iteration schedules, and what is needed to choose
between them.

Needs torch and the standard library. The adapter to transformers is `iiet.huggingface`, imported by
whoever wants it.
"""

from iiet.cache import KeyValueCache
from iiet.config import PRESETS, ModelConfig, preset
from iiet.decoder import Decoder
from iiet.generate import generate, stream
from iiet.losses import next_token_loss
from iiet.methods import METHODS
from iiet.published import decoder_from_published, published_from_decoder
from iiet.schedule import IterationSchedule

__all__ = [
    "METHODS",
    "PRESETS",
    "Decoder",
    "IterationSchedule",
    "KeyValueCache",
    "ModelConfig",
    "decoder_from_published",
    "generate",
    "next_token_loss",
    "preset",
    "published_from_decoder",
    "stream",
]
