"""A started cluster listens on loopback only and is shared; its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from pretended_cluster import run_driver

from orchestrator.cluster.environment import (
    address_variables,
    prepare_environment,
    worker_variables,
)
from orchestrator.workspace.files import SCRATCH_NAME


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
def test_only_this_user_may_enter_rays_folder(ray_session: None) -> None:
    import ray

    from orchestrator.cluster.start import LONGEST_TEMPORARY_FOLDER

    (socket,) = {node["ObjectStoreSocketName"] for node in ray.nodes()}
    (outer,) = (path for path in Path(socket).parents if path.name.startswith(f".{SCRATCH_NAME}."))
    assert outer.stat().st_mode & 0o777 == 0o700
    longest = len(socket) - len(str(outer)) + LONGEST_TEMPORARY_FOLDER + len("4194304")
    assert longest - len(str(os.getpid())) <= 107


@pytest.mark.slow
def test_a_second_cluster_is_the_first(ray_session: None) -> None:
    from orchestrator.cluster.start import ray_cluster

    with ray_cluster() as outer, ray_cluster() as inner:
        assert inner == outer
    with ray_cluster() as still:
        assert still == outer


@pytest.mark.parametrize(
    ("address", "variable", "own_token"),
    [("local", None, True), ("auto", None, False), ("head:6379", "head:6379", False)],
)
def test_the_environment_follows_the_address(
    address: str, variable: str | None, own_token: bool
) -> None:
    found = address_variables(address, {"RAY_ADDRESS": "of.the.shell:6379"})
    assert found["RAY_ADDRESS"] == variable
    # A cluster asks for a token only if it was told to.
    assert (found.get("RAY_AUTH_MODE") == "token") is own_token
    assert (len(found.get("RAY_AUTH_TOKEN") or "") == 64) is own_token


@pytest.mark.parametrize("address", ["local", "head:6379"])
def test_what_the_user_has_set_stays(address: str) -> None:
    given = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "token"}
    found = {**given, **address_variables(address, given)}
    assert {name: found.get(name) for name in (*given, "RAY_AUTH_TOKEN")} == {
        **given, "RAY_AUTH_TOKEN": None,
    }  # fmt: skip


def test_the_environment_is_restored() -> None:
    # In a process of its own: one with a running Ray must keep its token.
    program = (
        "import os, orchestrator.cluster, ray\n"
        "from orchestrator.cluster.environment import ray_environment\n"
        "before = dict(os.environ)\n"
        "with ray_environment('local'):\n"
        "    inside = dict(os.environ)\n"
        "print(inside != before, dict(os.environ) == before)\n"
    )
    assert run_driver(program, timeout=60).split() == ["True", "True"]


def test_workers_of_a_cluster_get_named_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {
        "HF_TOKEN": "secret",
        "AWS_A": "1",
        "AWS_B": "2",
        "PATH": "/",
        "IIET_PRETENDED_GPUS": "1",
    }
    monkeypatch.setattr(os, "environ", here)
    entries = ("HF_TOKEN", "AWS_*", "NCCL_*", "AWS_B=3", "EMPTY=")
    given = {"AWS_B": "3", "EMPTY": ""}
    named = {"HF_TOKEN": "secret", "AWS_A": "1", "IIET_PRETENDED_GPUS": "1"}
    assert worker_variables(entries, "head:6379") == {**named, **given}
    # Those of a local Ray inherit the others.
    assert worker_variables(entries, "local") == given


def test_options_of_the_gpu_allocator_stay_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    usual: dict[str, str] = {}
    chosen = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}
    for environment in (usual, chosen):
        monkeypatch.setattr(os, "environ", environment)
        prepare_environment()
    assert usual["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in chosen


def test_the_package_sets_the_environment_before_any_of_its_modules_imports_ray() -> None:
    program = "import os, sys, orchestrator.cluster; print('ray' in sys.modules, *os.environ)"
    environment = {name: value for name, value in os.environ.items() if "RAY" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    ray_is_imported, *names = done.stdout.split()
    assert ray_is_imported == "False"
    assert {"RAY_USAGE_STATS_ENABLED", "RAY_CHDIR_TO_TRIAL_DIR"} <= set(names)
