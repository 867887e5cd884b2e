"""The hub is probed briefly, and `offline` also affects libraries that are already imported."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from orchestrator.models.hub import hub_problem, offline


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_the_probe_connects_to_the_endpoint_with_a_short_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    addresses: list[tuple[Any, float]] = []

    def unreachable(address: Any, timeout: float) -> socket.socket:
        addresses.append((address, timeout))
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    assert hub_problem() == "huggingface.co cannot be reached (no route)"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080")
    assert hub_problem() == "mirror.example cannot be reached (no route)"
    assert [address for address, _ in addresses] == [
        ("huggingface.co", 443),
        ("mirror.example", 8080),
    ]
    assert all(timeout <= 2 for _, timeout in addresses)


def test_a_proxy_or_the_offline_flag_prevents_the_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("probed"))
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert hub_problem() is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_problem() == "HF_HUB_OFFLINE is set"


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_offline_affects_imported_libraries_and_is_undone(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, is_offline_mode

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", before == "1")
    if before is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", before)
    with offline():
        assert is_offline_mode()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert is_offline_mode() == (before == "1")
    assert os.environ.get("HF_HUB_OFFLINE") == before
