"""The one sampler: a token from logits, by noise that belongs to a row, a position and a token.

    token = argmax over v of  p_v / E_v,      E_v exponential: then token v is chosen with p_v

E is a function of (the row's seed, the number of tokens that the row has generated, v), so it does
not depend on the other rows, on the order of computing, on top_k and top_p, or on the device.
Whoever samples a position twice, from two models or in two passes, uses the same noise: a draft
then often chooses what the model itself chooses, and the model's choice is the same as without a
draft.

The noise is SplitMix64 over a counter, in integer operations that run on any device and wait for
nothing. Only the candidates that top_k leaves need noise.

Source: the choice is the Gumbel-max trick; common noise for draft and model is from Daliri, Musco,
Suresh 2024, "Coupling without communication and drafter-invariant speculative decoding"; SplitMix64
is from Steele, Lea, Flood 2014.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from operator import index
from typing import Final, SupportsIndex

import torch
from torch import Tensor

from iiet.checks import check_rules, is_integer_from, is_number_from

__all__ = [
    "LogitsNotFinite",
    "Sampler",
    "Seed",
    "not_finite",
    "row_keys",
    "sampling_rules",
]

Seed = SupportsIndex | Sequence[SupportsIndex] | None
"""A random seed, or one for each row; None: one that PyTorch's generator draws, which
`torch.manual_seed` controls."""
_STEP: Final = 0x9E3779B97F4A7C15
_FIRST_FACTOR: Final = 0xBF58476D1CE4E5B9
_SECOND_FACTOR: Final = 0x94D049BB133111EB
_WORD: Final = 1 << 64
_LEAST_TEMPERATURE: Final = torch.finfo(torch.float32).tiny  # Its inverse is finite.


class LogitsNotFinite(ValueError):
    """No token can be chosen, because a row's largest logit is NaN or infinite."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite, so no token can be chosen; its weights are "
            "damaged or diverged, or too large for its dtype (then float32 helps)"
        )


def sampling_rules(temperature: float, top_k: int | None, top_p: float | None) -> dict[str, bool]:
    """Return the rules of the settings by which tokens are chosen, and whether they hold."""
    return {
        "temperature must be a number from 0": is_number_from(0, temperature),
        "top_k must be an integer from 1, or None": top_k is None or is_integer_from(1, top_k),
        "top_p must be a number above 0 and at most 1, or None": (
            top_p is None or (is_number_from(0, top_p, 1) and top_p > 0)
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How tokens are chosen.

    Raises:
        ValueError: a setting is out of range; all problems at once.
    """

    temperature: float = 0.0
    """0 takes the likeliest token; above, sample from `softmax(logits / T)`."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this probability, in (0, 1]."""
    row_keys: Tensor | None = None
    """A number per row, (batch,), from `row_keys`; needed where the temperature is above 0."""

    def __post_init__(self) -> None:
        check_rules(
            "sampling",
            self,
            {
                **sampling_rules(self.temperature, self.top_k, self.top_p),
                "row_keys must be a tensor of integers, (batch,), or None": (
                    self.row_keys is None
                    or (self.row_keys.dim() == 1 and self.row_keys.dtype == torch.long)
                ),
            },
        )

    def __call__(self, logits: Tensor, positions: Tensor | int) -> Tensor:
        """Choose a token for each row of logits.

        Args:
            logits: (batch, vocab) or (batch, time, vocab).
            positions: how many tokens the row has generated before each, of the result's shape, or
                one number for all.

        Returns:
            Tokens, (batch,) or (batch, time).
        """
        if self.temperature == 0.0:
            return logits.argmax(-1)
        candidates, tokens = self._probabilities(logits)
        choice = (candidates / self._noise(logits, positions, tokens)).argmax(-1, keepdim=True)
        return (choice if tokens is None else tokens.gather(-1, choice)).squeeze(-1)

    def _probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the candidates' probabilities, up to a factor, and which tokens they are; None:
        all, in their order.
        """
        values = logits.float()
        # The largest first, because a small temperature would make infinities of others.
        values = (values - values.amax(-1, keepdim=True)) / max(
            self.temperature, _LEAST_TEMPERATURE
        )
        tokens = None
        if self.top_k is not None and self.top_k < logits.size(-1):
            values, tokens = values.topk(self.top_k, dim=-1)
        elif self.top_p is not None and self.top_p < 1.0:
            values, tokens = values.sort(dim=-1, descending=True)
        probabilities = values.softmax(-1)
        if self.top_p is not None and self.top_p < 1.0:
            # A token stays if those before it do not reach p yet; the first always stays.
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        return probabilities, tokens

    def _noise(self, logits: Tensor, positions: Tensor | int, tokens: Tensor | None) -> Tensor:
        """Return exponential noise for tokens, (..., candidates), or for all of them."""
        assert self.row_keys is not None, "a temperature above 0 needs keys"
        keys = self.row_keys.view(-1, *(1,) * (logits.dim() - 2))
        keys = _mixed(keys + _counted(positions))
        if tokens is None:
            tokens = torch.arange(logits.size(-1), device=logits.device)
        # The largest 63 bits. Near 0, where the noise decides, floats are dense.
        bits = _mixed(keys.unsqueeze(-1) + _counted(tokens)) >> 1 & (1 << 63) - 1
        return bits.float().add_(0.5).mul_(-(2.0**-63)).log1p_().neg_()


def not_finite(logits: Tensor) -> Tensor:
    """Return whether the largest logit of a row is not finite, (); waits for nothing."""
    largest = logits.amax(-1)
    return (largest - largest).ne(0).any()  # NaN for what is not finite; `isfinite` takes longer.


def row_keys(seed: Seed, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the numbers by which the rows of a batch draw their noise, (batch,).

    Args:
        seed: one for each row, or one from which those of all rows follow; the first row's is the
            seed itself. None: the next random number of PyTorch's generator.
        batch_size: the number of rows.
        device: of the result.

    Raises:
        ValueError: another number of seeds.
    """
    if seed is None:
        seed = int(torch.randint(1 << 62, (), device="cpu"))
    if not isinstance(seed, Sized):
        first = index(seed)
        seeds = [first, *(_mix(first + row * _STEP) for row in range(1, batch_size))]
    elif len(seed) == batch_size:
        seeds = [index(number) for number in seed]
    elif len(seed) == 1:
        return row_keys(seed[0], batch_size, device)
    else:
        raise ValueError(f"seed must be one, or one for each of {batch_size} rows")
    return torch.tensor([_signed(_mix(number)) for number in seeds], device=device)


def _counted(number: Tensor | int) -> Tensor | int:
    """Return SplitMix64's state after `number + 1` steps, modulo 2^64."""
    if isinstance(number, int):
        return _signed((number + 1) * _STEP)
    return (number + 1) * _signed(_STEP)


def _mixed(state: Tensor) -> Tensor:
    """Do `_mix` for integers of 64 bits."""
    for shift, factor in ((30, _FIRST_FACTOR), (27, _SECOND_FACTOR)):
        # A shift repeats the sign, so the mask clears what comes in from the left.
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)).mul_(_signed(factor))
    return state ^ (state >> 31 & (1 << 33) - 1)


def _mix(state: int) -> int:
    """Return the number of 64 bits that SplitMix64 makes of a state."""
    state %= _WORD
    state = (state ^ state >> 30) * _FIRST_FACTOR % _WORD
    state = (state ^ state >> 27) * _SECOND_FACTOR % _WORD
    return state ^ state >> 31


def _signed(number: int) -> int:
    """Return the number of 64 bits that PyTorch's signed integers hold in its place."""
    number %= _WORD
    return number - _WORD if number >= _WORD // 2 else number
