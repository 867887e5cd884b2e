"""A started cluster listens on loopback only, is shared, and refuses addresses without a Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.cluster.environment import prepare_environment
from orchestrator.workspace.errors import UserError


@pytest.mark.slow
def test_ray_listens_on_loopback_only(ray_session: None) -> None:
    me = psutil.Process()
    addresses = set()
    for process in [me, *me.children(recursive=True)]:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.slow
def test_a_second_cluster_is_the_first(ray_session: None) -> None:
    from orchestrator.cluster.start import ray_cluster

    with ray_cluster() as outer, ray_cluster() as inner:
        assert inner is outer
    with ray_cluster() as still:
        assert still is outer


def test_an_address_where_nobody_answers_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from orchestrator.cluster import start as cluster

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=f"RAY_ADDRESS={address}"):
            cluster._check_reachable(address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match="unset RAY_ADDRESS"):
            cluster._start(Path("unused"), None)


def test_a_token_is_asked_of_a_cluster_that_is_started_here_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here: dict[str, str] = {}
    elsewhere = {"RAY_ADDRESS": "ray.example:6379"}
    for environment in (here, elsewhere):
        monkeypatch.setattr(os, "environ", environment)
        prepare_environment()
    assert here["RAY_AUTH_MODE"] == "token"
    assert len(here["RAY_AUTH_TOKEN"]) == 64
    # `ray start` asks for none unless it was told to, and then says so itself.
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(elsewhere)


def test_the_package_sets_the_environment_before_any_of_its_modules_imports_ray() -> None:
    program = "import os, sys, orchestrator.cluster; print('ray' in sys.modules, *os.environ)"
    environment = {name: value for name, value in os.environ.items() if "RAY" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    ray_is_imported, *names = done.stdout.split()
    assert ray_is_imported == "False"
    assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_CHDIR_TO_TRIAL_DIR"} <= set(names)
