"""What is to be generated: the options that a user gives, and the request that decoding serves.

`GenerativeModel` says what decoding needs of a model, so that the modules that decode come before
the decoder, whose methods `generate` and `stream` call them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from iiet.backbone import Backbone
from iiet.checks import check_rules, is_integer_from
from iiet.decoding.sampling import Sampler, Seed, row_keys, sampling_rules
from iiet.model.cache import KeyValueCache, KvStrategy
from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule, ScheduleLike

__all__ = ["GenerationOptions", "GenerativeModel", "Request"]


class GenerativeModel(Protocol):
    """What decoding needs of a model: `iiet.Decoder` has all of it."""

    config: ModelConfig

    @property
    def model(self) -> Backbone:
        """The modules without the head."""

    @property
    def schedule(self) -> IterationSchedule:
        """The iteration schedule of a call that names none."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values."""

    def new_cache(
        self, *, batch_size: int, max_tokens: int, strategy: KvStrategy = "exact"
    ) -> KeyValueCache:
        """Return an empty cache for the model's schedule."""

    def with_schedule(self, schedule: IterationSchedule) -> GenerativeModel:
        """Return the same weights under another schedule."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weights."""

    def modules(self) -> Iterator[nn.Module]:
        """Return the modules."""

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        """Return logits, as `iiet.Decoder.forward`."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How prompts are continued: the keyword arguments of `Decoder.generate` and `Decoder.stream`.

    Raises:
        ValueError: naming every option that is out of range.
    """

    max_new_tokens: int
    """The most tokens to add, at least 1."""
    eos_token_id: int | Collection[int] | None = None
    """Token, or several, that end a row; they are part of the result."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, sample from `softmax(logits / T)`."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this probability, in (0, 1]."""
    seed: Seed = None
    """One, or one for each row; None: one that PyTorch's generator draws, so that
    `torch.manual_seed` controls what is sampled."""
    kv_strategy: KvStrategy = "exact"
    """`exact`, or `last` for one cache slot per layer."""
    draft: ScheduleLike | GenerativeModel | None = None
    """Proposes tokens, which changes none: a cheaper schedule, as people write it; another decoder
    of the same vocabulary; or `auto`, which tries the schedules of `family`, or else the model's
    own with fewer corrections, and keeps the best. On a GPU, and for a method without corrections,
    `auto` finds none, and decoding is plain."""
    draft_tokens: int | Literal["auto"] = "auto"
    """How many tokens to draft at once; `auto`: as many as are expected to pay, and none where none
    do."""
    family: Collection[IterationSchedule] = ()
    """Schedules that the weights serve, for `draft="auto"`."""

    def __post_init__(self) -> None:
        exact = (
            "kv_strategy must be 'exact' with a draft, because with one slot per layer tokens that "
            "are read together see other keys than tokens read one by one"
        )
        check_rules(
            "generation options",
            self,
            {
                "max_new_tokens must be an integer from 1": is_integer_from(1, self.max_new_tokens),
                "eos_token_id must be a token, several, or None": all(
                    is_integer_from(0, token) for token in self.end_tokens
                ),
                **sampling_rules(self.temperature, self.top_k, self.top_p),
                exact: self.draft is None or self.kv_strategy == "exact",
                "draft_tokens must be 'auto' or an integer from 0": (
                    self.draft_tokens == "auto" or is_integer_from(0, self.draft_tokens)
                ),
            },
        )

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a row."""
        if self.eos_token_id is None:
            return ()
        if isinstance(self.eos_token_id, int):
            return (self.eos_token_id,)
        return tuple(self.eos_token_id)

    def sampler(self, prompts: Tensor) -> Sampler:
        """Return what chooses the tokens that follow prompts, (batch, time).

        Raises:
            ValueError: neither one seed nor one for each row.
        """
        keys = None
        if self.temperature > 0:
            keys = row_keys(self.seed, len(prompts), prompts.device)
        return Sampler(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, row_keys=keys
        )


class Request(NamedTuple):
    """Prompts, and how they are continued."""

    input_ids: Tensor
    """Prompts, (batch, time)."""
    options: GenerationOptions
    sampler: Sampler
    """Chooses the tokens."""
    attention_mask: Tensor | None = None
    """(batch, time), false for padding on the left."""

    @property
    def num_tokens(self) -> int:
        """Prompt and continuation together, at most."""
        return self.input_ids.size(1) + self.options.max_new_tokens

    def end_tokens(self) -> Tensor:
        """Return the tokens that end a row, on the device of the prompts."""
        return self.input_ids.new_tensor(self.options.end_tokens)
