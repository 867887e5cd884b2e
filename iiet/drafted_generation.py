"""transformers' `generate` with drafts: its settings in, its result out, decoded by this package.

Only settings that change no token after the choice of a token are served: lengths, greedy or
sampled choice with temperature, top_k and top_p, end and padding tokens. Any other is refused, as
it would be ignored. transformers is not imported here; its settings come as a mapping.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from iiet.decoder import Decoder
from iiet.schedule import IterationSchedule
from iiet.speculative import DraftRecord, generate

__all__ = ["generate_with_drafts"]

_SERVED = {
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p",
    "eos_token_id", "pad_token_id", "bos_token_id", "transformers_version",
}  # fmt: skip


def generate_with_drafts(
    decoder: Decoder,
    input_ids: Tensor | None,
    *,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    draft: str,
    draft_tokens: int | Literal["auto"] = "auto",
    family: Collection[IterationSchedule] = (),
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, DraftRecord]:
    """Continue prompts as transformers does.

    Args:
        decoder: the model, under the schedule that verifies.
        input_ids: prompts, (batch, time), padded on the left.
        settings: a `GenerationConfig` as a mapping.
        defaults: values of settings that ask for nothing; None does so for all, and False for those
            that have no default here.
        draft: this and the next two as in `iiet.speculative.stream`.
        draft_tokens: see there.
        family: see there.
        attention_mask: 0 for padding; None: read from the padding token, if that ends no text.

    Returns:
        Prompts and continuations, (batch, time + new); rows that have ended are padded.

    Raises:
        ValueError: a setting is not served, or what `iiet.speculative.stream` raises.
    """
    asked = {
        name: value
        for name, value in settings.items()
        if name not in _SERVED and not name.startswith("_")
        if _asks_for_something(value, defaults.get(name))
    }
    if asked:
        values = ", ".join(
            name if isinstance(value, Tensor) else f"{name}={value!r}"
            for name, value in asked.items()
        )
        raise ValueError(
            f"generate with a draft does not serve {values}; leave it out, or generate without "
            "draft="
        )
    if input_ids is None:
        raise ValueError("generate with a draft needs input_ids")
    end, pad = settings.get("eos_token_id"), settings.get("pad_token_id")
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    if pad is None and ends:
        pad = ends[0]
    if attention_mask is None and pad is not None and pad not in ends:
        is_token = input_ids != pad
        attention_mask = None if bool(is_token.all()) else is_token
    tokens, record = generate(
        decoder,
        input_ids,
        max_new_tokens=_max_new_tokens(settings, input_ids.size(1)),
        draft=draft,
        draft_tokens=draft_tokens,
        family=family,
        stop_tokens=ends,
        attention_mask=None if attention_mask is None else attention_mask.bool(),
        **(_sampling(settings) if settings.get("do_sample") else {}),
    )
    return _padded(tokens, input_ids.size(1), ends, pad), record


def _asks_for_something(value: Any, default: Any) -> bool:
    if value is None or isinstance(value, Tensor):
        return value is not None
    return bool(value != (default or False))


def _max_new_tokens(settings: Mapping[str, Any], num_prompt: int) -> int:
    if settings.get("max_new_tokens") is not None:
        return int(settings["max_new_tokens"])
    if settings.get("max_length") is None:
        raise ValueError("generate with a draft needs max_new_tokens or max_length")
    return int(settings["max_length"]) - num_prompt


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    temperature = settings.get("temperature")
    return {
        "temperature": 1.0 if temperature is None else temperature,
        "top_k": settings.get("top_k") or None,  # 0 is transformers' word for all.
        "top_p": settings.get("top_p"),
        # From PyTorch's own generator, so that `set_seed` determines the sample.
        "seed": int(torch.randint(2**62, ())),
    }


def _padded(tokens: Tensor, num_prompt: int, ends: list[int], pad: int | None) -> Tensor:
    """Replace what follows a row's first end token, which this package repeats, by padding."""
    if pad is None or not ends:
        return tokens
    is_end = torch.isin(tokens[:, num_prompt:], tokens.new_tensor(ends))
    is_after = is_end.cumsum(1) - is_end.long() > 0
    tokens[:, num_prompt:].masked_fill_(is_after, pad)
    return tokens
