"""What models cost in transformers' server, as `iiet-orch benchmark --serve` measured it.

Times depend on a model's shape and schedule, and not on its weights. So one measurement stands for
all models of a shape: a teacher that is served under the schedule of a student gives the student's
time. Times of one file were measured under the same conditions on the same machine.
"""

from __future__ import annotations

from typing import Any

from iiet.config import ModelConfig
from orchestrator.records.record import Record
from orchestrator.terminal.metrics import KV_BYTES, served_name
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.provenance import content_key

FILE_PATTERN = "served-*.json"


class ServingConditions(Record):
    """The requests that models are measured with."""

    at_once: tuple[int, ...]
    """How many requests are sent at a time; each number is measured."""
    num_requests: int
    """Requests for each of these numbers."""
    prompt_tokens: int
    """Tokens of each prompt."""
    new_tokens: int
    """Tokens of each answer."""
    num_threads: int
    """PyTorch threads of the server on a CPU."""


class ServedCost(Record):
    """One model that answered a number of requests at a time."""

    model: str
    """Name of the model in the call that measured it."""
    at_once: int
    """Requests at a time."""
    tokens_per_second: float
    """New tokens of all requests."""
    latency_ms: float
    """Median time from a request to the end of its answer."""
    latency_95_ms: float
    """Time within which 95% of the requests were answered."""
    kv_bytes_per_token: int | None
    """Bytes of keys and values that the server keeps for a token; None if they are not known."""

    @property
    def ms_per_token(self) -> float:
        """The server's time per new token, all requests together."""
        return 1e3 / self.tokens_per_second

    def metrics(self) -> dict[str, float]:
        """Return the tracked numbers; each name contains the number of requests at a time."""
        measured = {
            "tokens_per_second": self.tokens_per_second,
            "latency_ms": self.latency_ms,
            "latency_95_ms": self.latency_95_ms,
        }
        numbers = {
            served_name(name, at_once=self.at_once): float(value)
            for name, value in measured.items()
        }
        if self.kv_bytes_per_token is not None:
            numbers[KV_BYTES] = float(self.kv_bytes_per_token)
        return numbers


class ServedTimes(Record):
    """The costs of models under the same conditions on the same machine."""

    time: float
    """When the last one was measured, in seconds since 1970."""
    server: str
    """Program and version."""
    device: str
    """CPU or GPU."""
    dtype: str
    """Type of the weights."""
    machine: dict[str, Any]
    """Versions and hardware."""
    conditions: ServingConditions
    """The requests."""
    costs: dict[str, tuple[ServedCost, ...]]
    """Key of a shape -> one entry for each number of requests at a time."""

    def ms_per_token(self, config: ModelConfig) -> float | None:
        """Return the time per token of a model's shape with the most requests at a time."""
        costs = self.costs.get(shape_key(config), ())
        busiest = max(costs, key=lambda cost: cost.at_once, default=None)
        return None if busiest is None else busiest.ms_per_token

    @property
    def sentence(self) -> str:
        """How it was measured."""
        requests = self.conditions
        return (
            f"Served: {self.server} on {self.device}, {self.dtype}, {max(requests.at_once)} "
            f"requests at a time of {requests.prompt_tokens} + {requests.new_tokens} tokens."
        )


def shape_key(config: ModelConfig) -> str:
    """Return the key of all models of a shape under the same schedule."""
    return content_key(config.to_dict())


def newest_served_times(workspace: Workspace) -> ServedTimes | None:
    """Return the newest measurements of a workspace; None without any.

    Those under other conditions or of another machine do not compare with them.

    Raises:
        DamagedFile: If a file is damaged.
    """
    stored = [ServedTimes.read(path) for path in workspace.benchmarks.glob(FILE_PATTERN)]
    return max(filter(None, stored), key=lambda times: times.time, default=None)
