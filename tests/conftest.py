"""Fixtures that several packages' tests share: tiny tokens, a tiny model, one Ray a session."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# No example has to be quick: on a busy machine any may take a second.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Before PyTorch is loaded. Tiny models gain nothing from a second thread, and on a busy machine
# two threads that wait for each other take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Of programs that have two.


def pytest_configure(config: pytest.Config) -> None:
    """Let Ray warn about its own calls of its own deprecated settings."""
    config.addinivalue_line("filterwarnings", r"ignore::DeprecationWarning:ray\.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with many slow tests first: of two that run side by side none waits at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def tiny_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared tokens: a few thousand of them, made of English-looking sentences."""
    from orchestrator.data.corpus import Document
    from orchestrator.data.tokenizing import write_tokens
    from orchestrator.settings import DataSettings

    draw = random.Random(0)
    words = [
        "".join(draw.choice("abcdefghijklmnop") for _ in range(draw.randint(2, 8)))
        for _ in range(200)
    ]
    documents = [
        Document(" ".join(draw.choice(words) for _ in range(60)) + ".", f"document {number}")
        for number in range(80)
    ]
    settings = DataSettings(vocab_size=300, validation_fraction=0.2)
    return write_tokens(tmp_path_factory.mktemp("tokens"), documents, settings)


@pytest.fixture
def tiny_model() -> dict[str, Any]:
    """The plain form of an IIET's configuration that trains a step in milliseconds."""
    from iiet.config import ModelConfig
    from iiet.schedule import IterationSchedule

    return ModelConfig(
        vocab_size=300,
        dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        ffn_dim=32,
        context_length=16,
        schedule=IterationSchedule((2, 1)),
    ).to_dict()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray, started once for all tests that need it, with two CPUs; marked slow by its users."""
    from orchestrator.cluster import ray_cluster

    with ray_cluster(num_cpus=2):
        yield
