"""What a cache with one slot per layer (`--kv last`) does to a model: its loss and its choices.

Such a cache is smaller, but not exact: a correction attends to the last evaluation of each earlier
token. Only decoding differs, token by token; so the loss is measured by decoding held-out text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iiet.cache import KeyValueCache, KvStrategy
from iiet.decoder import Decoder
from iiet.generation import cache_dtype, generate
from iiet.losses import next_token_loss
from orchestrator.evaluation.decode_timing import sweep_prompt_length


@dataclass(frozen=True, kw_only=True)
class KvComparison:
    """A model with a slot per layer, beside the exact one."""

    exact_loss: float
    """Nats per token, with a slot per evaluation."""
    last_loss: float
    """Nats per token of the same text, with a slot per layer."""
    agreement: float
    """Share of the exact model's greedy tokens that are chosen, too, each after the exact model's
    tokens (teacher-forced)."""


@torch.inference_mode()
def compare_kv_strategies(decoder: Decoder, texts: Tensor) -> KvComparison:
    """Compare the two strategies.

    Args:
        decoder: In evaluation mode.
        texts: (texts, time), held out; the beginnings are continued to the same length.
    """
    prompt_tokens = sweep_prompt_length(decoder.config.context_length)
    texts = texts.to(decoder.device)
    continued = generate(
        decoder,
        texts[:, :prompt_tokens],
        max_new_tokens=texts.size(1) - prompt_tokens,
    )
    choices = logits_of_steps(decoder, continued[:, :-1], kv_strategy="last").argmax(-1)
    agreed = choices[:, prompt_tokens - 1 :] == continued[:, prompt_tokens:]
    last = logits_of_steps(decoder, texts, kv_strategy="last")
    return KvComparison(
        exact_loss=next_token_loss(decoder(texts), texts).item(),
        last_loss=next_token_loss(last, texts).item(),
        agreement=agreed.float().mean().item(),
    )


def logits_of_steps(
    decoder: Decoder, tokens: Tensor, num_prompt: int = 0, *, kv_strategy: KvStrategy
) -> Tensor:
    """Decode given tokens, (batch, time), one by one after a prompt that is read at once.

    Returns:
        The logits after each step, (batch, time - num_prompt, vocab).
    """
    cache = KeyValueCache(
        decoder.config,
        batch_size=len(tokens),
        max_tokens=tokens.size(1),
        device=decoder.device,
        dtype=cache_dtype(decoder),
        strategy=kv_strategy,
    )
    if num_prompt:
        decoder(tokens[:, :num_prompt], cache=cache, last_only=True)
    columns = torch.split(tokens[:, num_prompt:], 1, dim=1)
    return torch.cat([decoder(column, cache=cache) for column in columns], dim=1)
