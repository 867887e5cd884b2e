"""A batch: what the model reads, what it must predict at each position, and which positions count.

The target at a position is what the logits at that position must predict; no loss shifts anything.
For text it is the next token. Other sources have few targets (the answers of a task), or count only
some of them (the completions of prompts).

`mask` belongs to the loss. The mask that hides padding from attention is `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import itemgetter

import torch
from torch import Tensor

from iiet.checks import is_number_from

__all__ = ["NO_TARGET", "Batch", "Count"]

NO_TARGET = -100
"""The value in `targets` where there is nothing to predict."""
_INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


Count = float | Tensor | None
"""The divisor of a mean; None: the number of positions that count. A tensor, a scalar, waits for no
GPU."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences with their targets. All tensors are (batch, time).

    Raises:
        ValueError: tensors of other shapes, tokens or component numbers that are no integers, or
            negative counts.
    """

    input_ids: Tensor
    targets: Tensor
    """Token ids, or `NO_TARGET`."""
    mask: Tensor | None = None
    """True for the positions that count; None: all that have a target."""
    component_numbers: Tensor | None = field(default=None, kw_only=True)
    """Number of the component of a mixture of data for each position, for sums by component; None:
    there is one."""
    is_text: bool = field(default=False, kw_only=True)
    """Whether a student also learns from its teacher at the last position, which has no target."""
    target_count: Count = field(default=None, kw_only=True)
    """Divisor of means over targets; None: `num_targets`. See `split`."""
    position_count: Count = field(default=None, kw_only=True)
    """Divisor of means over positions; None: `num_positions`."""

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        if len(shape) != 2:
            raise ValueError(f"input_ids must be (batch, time), got {tuple(shape)}")
        beside_inputs = {
            "targets": self.targets,
            "mask": self.mask,
            "component_numbers": self.component_numbers,
        }
        for name, values in beside_inputs.items():
            # One row or one column would silently be broadcast to all.
            if values is not None and values.shape != shape:
                raise ValueError(
                    f"{name} must be (batch, time), here {tuple(shape)}, got {tuple(values.shape)}"
                )
        numbers = {
            "input_ids": self.input_ids,
            "targets": self.targets,
            "component_numbers": self.component_numbers,
        }
        for name, values in numbers.items():
            if values is not None and values.dtype not in _INTEGERS:
                raise ValueError(f"{name} must be integers, got {values.dtype}")
        counts = {"target_count": self.target_count, "position_count": self.position_count}
        for name, count in counts.items():
            # A tensor is not read, because that would wait for a GPU.
            is_allowed = count.dim() == 0 if isinstance(count, Tensor) else is_number_from(0, count)
            if count is not None and not is_allowed:
                raise ValueError(f"{name} must be a number from 0, a scalar or None, got {count!r}")

    @classmethod
    def of_text(cls, input_ids: Tensor, mask: Tensor | None = None) -> Batch:
        """Make a batch in which each position predicts the next token.

        `mask` says which tokens count as targets: the position before a token counts if the token
        does. The last position, which has no target, counts for a teacher if its own token does.
        """
        targets = torch.full_like(input_ids, NO_TARGET)
        targets[..., :-1] = input_ids[..., 1:]
        if mask is not None:
            mask = torch.cat([mask[..., 1:], mask[..., -1:]], dim=-1).bool()
        return cls(input_ids, targets, mask, is_text=True)

    @property
    def teacher_mask(self) -> Tensor | None:
        """The positions at which a student learns from a teacher; None: all."""
        return self.mask if self.is_text else self.counted

    @property
    def counted(self) -> Tensor:
        """The positions whose targets count, (batch, time) of bool."""
        has_target = self.targets != NO_TARGET
        return has_target if self.mask is None else has_target & self.mask.bool()

    @property
    def num_targets(self) -> int:
        """Targets that count. Waits for a GPU, so read it before the batch is moved there."""
        return int(self.counted.sum())

    @property
    def num_positions(self) -> int:
        """Positions in `teacher_mask`. Waits for a GPU, too."""
        teacher_mask = self.teacher_mask
        return self.input_ids.numel() if teacher_mask is None else int(teacher_mask.sum())

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch on a device; `non_blocking` copies pinned memory without waiting."""
        return self._map(lambda values: values.to(device, non_blocking=non_blocking))

    def pinned(self) -> Batch:
        """Return the batch in pinned memory of the CPU."""
        return self._map(Tensor.pin_memory)

    def flattened(self) -> Batch:
        """Return all positions as one sequence, row after row, with the counts of this batch."""
        # Tensors, because numbers would wait for a GPU.
        targets = self.target_count
        positions = self.position_count
        if targets is None:
            targets = self.counted.sum()
        if positions is None:
            teacher_mask = self.teacher_mask
            positions = self.input_ids.numel() if teacher_mask is None else teacher_mask.sum()
        flat = self._map(lambda values: values.reshape(1, -1))
        return replace(flat, target_count=targets, position_count=positions)

    def span(self, times: slice) -> Batch:
        """Return some positions of each sequence, with the counts of the whole batch."""
        return self._map(itemgetter((slice(None), times)))

    def counted_as(self, target_count: float, position_count: float) -> Batch:
        """Return the batch with these divisors for its means."""
        return replace(self, target_count=target_count, position_count=position_count)

    def split(self, num_sequences: int) -> list[Batch]:
        """Cut the batch into parts of `num_sequences`; the last may have fewer.

        Each part gets its share of the counts. Then the means over the parts, weighted by their
        numbers of sequences, add up to the mean over the whole, however uneven the masks are.
        """
        parts = []
        for start in range(0, len(self), num_sequences):
            part = self._map(itemgetter(slice(start, start + num_sequences)))
            shares = {
                name: count * len(part) / len(self)
                for name in ("target_count", "position_count")
                if (count := getattr(self, name)) is not None
            }
            parts.append(replace(part, **shares))
        return parts

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            input_ids=change(self.input_ids),
            targets=change(self.targets),
            mask=None if self.mask is None else change(self.mask),
            component_numbers=None
            if self.component_numbers is None
            else change(self.component_numbers),
        )
