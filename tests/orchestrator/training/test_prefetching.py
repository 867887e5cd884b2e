"""Batches that are gathered ahead are those of their steps, and no thread outlives the run."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch

from iiet.batch import Batch
from orchestrator.training.trainer import BatchPrefetcher


def batch_of(step: int) -> Batch:
    if step == 3:
        raise OSError("the disk is gone")
    return Batch.of_text(torch.full((1, 4), step))


def step_of(batch: Batch) -> int:
    return int(batch.input_ids[0, 0])


def test_each_step_gets_its_batch_in_any_order() -> None:
    asked = []

    def gather(step: int) -> Batch:
        asked.append(step)
        return batch_of(step)

    with closing(BatchPrefetcher(gather, num_steps=8, pin=False)) as batches:
        # A resumed run starts anywhere; benchmarks ask for a step twice.
        steps = [0, 1, 1, 5, 6, 7]
        assert [step_of(batches.batch(step)) for step in steps] == steps
    assert max(asked) == 7
    assert asked.count(6) == asked.count(7) == 1


def test_an_error_is_raised_in_the_step_that_needs_the_batch() -> None:
    with closing(BatchPrefetcher(batch_of, num_steps=8, pin=False)) as batches:
        assert step_of(batches.batch(2)) == 2
        with pytest.raises(OSError, match="the disk is gone"):
            batches.batch(3)
        assert step_of(batches.batch(4)) == 4


def test_closing_ends_the_thread_and_waits_for_no_further_batch() -> None:
    batches = BatchPrefetcher(batch_of, num_steps=8, pin=False)
    batches.batch(2)  # The next one raises, and nobody asks for it.
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
