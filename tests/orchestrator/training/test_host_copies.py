"""Copies of a run's state are complete and unchanged by later steps, on CPUs and with streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.training.checkpoint import HostCopies


class Streams:
    """Stands in for `torch.cuda`: writes down what waits for what; copies happen at once."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = FakeStream("main", self.log)

    def Stream(self, device: str) -> FakeStream:  # noqa: N802
        assert device == "cuda:0"
        return FakeStream("side", self.log)

    def current_stream(self) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(f"copy on {stream.name}")
        yield


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> FakeStream:
        return FakeStream(f"the end of {self.name}", self.log)

    def wait_event(self, event: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self.log.append(f"the writer waits for {self.name}")


class Gathered(Tensor):
    """Stands in for a sharded tensor."""

    def full_tensor(self) -> Tensor:
        return self.as_subclass(Tensor).clone()


def state() -> dict[str, Any]:
    return {"weights": {"a": torch.ones(2, 3)}, "optimizer": {0: [torch.zeros(4), 0.5]}}


def test_a_copy_on_the_cpu_shares_no_memory() -> None:
    original = state()
    copied = HostCopies("cpu").copy(original, keep=True)
    original["weights"]["a"].zero_()
    assert torch.equal(copied["weights"]["a"], torch.ones(2, 3))
    assert copied["optimizer"][0][1] == 0.5
    assert HostCopies("cpu").copy(original, keep=False)["weights"] == {"a": None}


def test_updates_begin_after_the_copy_and_buffers_are_used_again() -> None:
    streams = Streams()
    made: list[Tensor] = []

    def new_buffer(tensor: Tensor) -> Tensor:
        made.append(torch.empty_like(tensor))
        return made[-1]

    copies = HostCopies("cuda:0", streams=streams, new_buffer=new_buffer)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(2):
        copies.order_updates(optimizer)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert streams.log == []

    for value in (0.0, -1.0):
        copied = copies.copy({"weight": weight}, keep=True)
        assert copied["weight"] is made[0]
        optimizer.step()
        copies.wait()
        assert torch.equal(copied["weight"], torch.full((2,), value))
        assert streams.log == [
            "side waits for main",
            "copy on side",
            "main waits for the end of side",
            "the writer waits for the end of side",
        ]
        streams.log.clear()
    assert len(made) == 1


def test_training_waits_for_tensors_that_are_gathered_for_the_copy() -> None:
    streams = Streams()
    copies = HostCopies("cuda:0", streams=streams, new_buffer=torch.empty_like)
    sharded = torch.ones(2).as_subclass(Gathered)
    assert torch.equal(copies.copy([sharded], keep=True)[0], torch.ones(2))
    assert streams.log == ["side waits for main", "copy on side", "main waits for side"]
    assert copies.copy([sharded], keep=False) == [None]
