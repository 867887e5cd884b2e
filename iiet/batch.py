"""A batch: what the model reads, what it is to predict at each position, and which positions count.

The target at a position is what the logits at this position must predict. Text is the case in which
it is the next token; other sources set targets at few positions (the answers of a task) or count
few of them (the completions of prompts). No loss shifts anything or asks where a batch is from.

The mask belongs to the loss. What attention must not see is padding, and is called
`attention_mask` wherever it is passed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["NO_TARGET", "Batch"]

NO_TARGET = -100
"""Stands in `targets` where there is nothing to predict."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences with their targets.

    Raises:
        ValueError: targets or mask do not have the shape of the tokens, (batch, time).
    """

    input_ids: Tensor
    """(batch, time) of integers: what the model reads."""
    targets: Tensor
    """(batch, time) of integers: what the logits at each position must predict, or `NO_TARGET`."""
    mask: Tensor | None = None
    """(batch, time) of bool: the positions that count; None: all that have a target."""
    is_text: bool = field(default=False, kw_only=True)
    """Whether each position has a next token, known or not. A teacher then has something to teach
    at text's last position, too, which has no target."""
    target_count: float | None = field(default=None, kw_only=True)
    """What a mean over targets divides by; None: `num_targets`. See `split`."""
    position_count: float | None = field(default=None, kw_only=True)
    """What a mean over positions divides by; None: `num_positions`."""

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        if len(shape) != 2:
            raise ValueError(f"input_ids must be (batch, time), got {tuple(shape)}")
        for name, values in (("targets", self.targets), ("mask", self.mask)):
            # One row or one column would be spread over all of them.
            if values is not None and values.shape != shape:
                raise ValueError(
                    f"{name} must be (batch, time), here {tuple(shape)}, got {tuple(values.shape)}"
                )

    @classmethod
    def of_text(cls, input_ids: Tensor, mask: Tensor | None = None) -> Batch:
        """Make the batch in which each position predicts the next token.

        Args:
            input_ids: (batch, time) of integers.
            mask: (batch, time) of bool, the tokens that count as targets; all when not given. The
                position before a token counts if the token does. The last position, which has no
                target, counts for a teacher if its own token does.
        """
        targets = torch.full_like(input_ids, NO_TARGET)
        targets[..., :-1] = input_ids[..., 1:]
        if mask is not None:
            mask = torch.cat([mask[..., 1:], mask[..., -1:]], dim=-1).bool()
        return cls(input_ids, targets, mask, is_text=True)

    @property
    def taught(self) -> Tensor | None:
        """The positions at which a student learns from a teacher, (batch, time) of bool; None: all.

        Those that count, and of text also the last.
        """
        if self.is_text:
            return self.mask
        has_target = self.targets != NO_TARGET
        return has_target if self.mask is None else has_target & self.mask.bool()

    @property
    def num_targets(self) -> int:
        """Targets that count. Waits for the device: ask before the batch is moved to a GPU."""
        counted = self.targets != NO_TARGET
        return int((counted if self.mask is None else counted & self.mask.bool()).sum())

    @property
    def num_positions(self) -> int:
        """Positions in `taught`. Waits for the device, as `num_targets` does."""
        taught = self.taught
        return self.input_ids.numel() if taught is None else int(taught.sum())

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
            mask=None if self.mask is None else self.mask.to(device),
        )

    def split(self, num_sequences: int) -> list[Batch]:
        """Cut the batch into parts of this many sequences, the last perhaps of fewer.

        If the batch has counts, each part has its share of them, in sequences. Then the means over
        the parts, weighed by their numbers of sequences, add up to the mean over the whole, however
        unevenly the positions that count are spread.
        """
        return [
            self._rows(slice(start, start + num_sequences))
            for start in range(0, len(self), num_sequences)
        ]

    def counted_as(self, target_count: float, position_count: float) -> Batch:
        """Return the batch with numbers for its means to divide by."""
        return replace(self, target_count=target_count, position_count=position_count)

    def _rows(self, rows: slice) -> Batch:
        input_ids, whole = self.input_ids[rows], len(self)
        targets, positions = self.target_count, self.position_count
        return replace(
            self,
            input_ids=input_ids,
            targets=self.targets[rows],
            mask=None if self.mask is None else self.mask[rows],
            target_count=None if targets is None else targets * len(input_ids) / whole,
            position_count=None if positions is None else positions * len(input_ids) / whole,
        )
