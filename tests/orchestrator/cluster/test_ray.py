"""A started Ray is closed to others and shared; addresses that cannot be joined are refused."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from commands import Started, run_workers
from pretended_cluster import LOOPBACK, listening_addresses
from refusals import refused

from orchestrator import cli
from orchestrator.cluster import prepare_environment, ray
from orchestrator.cluster.placement import Signal
from orchestrator.cluster.ray import (
    LONGEST_TEMPORARY_FOLDER,
    address_variables,
    check_ray_can_run,
    ray_cluster,
    worker_variables,
)
from orchestrator.settings import ClusterSettings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import SCRATCH_NAME

PACKAGE = Path(ray.__file__).parent


@pytest.mark.slow
def test_a_started_ray_is_closed_to_others_and_is_used_again(ray_session):
    import ray

    addresses = set().union(*listening_addresses().values())
    assert addresses
    assert addresses <= LOOPBACK

    (path,) = {node["ObjectStoreSocketName"] for node in ray.nodes()}
    (outer,) = (path for path in Path(path).parents if path.name.startswith(f".{SCRATCH_NAME}."))
    assert outer.stat().st_mode & 0o777 == 0o700
    longest = len(path) - len(str(outer)) + LONGEST_TEMPORARY_FOLDER + len("4194304")
    assert longest - len(str(os.getpid())) <= 107

    with ray_cluster() as first, ray_cluster() as second:
        assert second == first
    with ray_cluster() as still:
        assert still == first


@pytest.mark.slow
def test_a_signal_reaches_the_processes_that_look_for_it_and_no_others(ray_session):
    import ray

    def wait(sent: Signal) -> bool:
        while not sent.is_sent():
            time.sleep(0.01)
        return sent.is_sent()

    sent = Signal()
    never_sent = Signal()
    waiting = ray.remote(num_cpus=1)(wait).remote(sent)
    for _ in range(2):
        sent.send()
    assert ray.get(waiting, timeout=60)
    assert [sent.is_sent(), never_sent.is_sent()] == [True, False]


def test_only_one_function_uses_what_is_private_in_ray():
    """A version of Ray may change it; that function works without it, too."""
    users = []
    for path in PACKAGE.glob("*.py"):
        for function in path.read_text(encoding="utf-8").split("\ndef "):
            if re.search(r"_internal|_raylet|ray\._private\.(?!worker\"\))", function):
                users.append(function.partition("(")[0])
    assert users == ["_send_messages_to_log"]


@pytest.mark.parametrize(
    ("address", "variable", "own_token"),
    [("local", None, True), ("auto", None, False), ("head:6379", "head:6379", False)],
)
def test_the_environment_follows_the_address_and_keeps_what_the_user_has_set(
    address, variable, own_token, monkeypatch
):
    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "of.the.shell:6379"})
    variables = address_variables(address)
    assert variables["RAY_ADDRESS"] == variable
    # A cluster asks for a token only if it was told to.
    assert (variables.get("RAY_AUTH_MODE") == "token") is own_token
    assert (len(variables.get("RAY_AUTH_TOKEN") or "") == 64) is own_token

    set_by_user = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "token"}
    monkeypatch.setattr(os, "environ", set_by_user)
    variables = {**set_by_user, **address_variables(address)}
    assert {name: variables.get(name) for name in (*set_by_user, "RAY_AUTH_TOKEN")} == {
        **set_by_user, "RAY_AUTH_TOKEN": None,
    }  # fmt: skip


INTERRUPTED = """
import signal, sys
from orchestrator.cluster.ray import ray_cluster
try:
    with ray_cluster(num_cpus=1, say=lambda _: open(sys.argv[1], "w").close()):
        import ray
        ray.get(ray.remote(num_cpus=1)(lambda: 1).remote())
        open(sys.argv[2], "w").close()
        signal.pause()
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("start", signal.SIGINT),
        ("gcs_server", signal.SIGTERM),
        ("raylet", signal.SIGINT),
        ("raylet", signal.SIGHUP),
        ("work", signal.SIGINT),
        ("work", signal.SIGTERM),
    ],
)
def test_a_signal_at_any_moment_of_a_start_leaves_no_process(moment, number, tmp_path):
    begun = tmp_path / "begun"
    at_work = tmp_path / "at work"
    driver = Started(str(begun), str(at_work), code=INTERRUPTED)
    started: list[psutil.Process] = []

    def has_come() -> bool:
        started[:] = psutil.Process(driver.pid).children(recursive=True)
        if moment == "start":
            return begun.exists()
        if moment == "work":
            return at_work.exists()
        return any(process.name() == moment for process in started)

    driver.wait_for(has_come)
    driver.send_signal(number)
    printed, _ = driver.communicate(timeout=60)  # Ten seconds, if the machine is not busy.
    assert driver.returncode == 130, printed
    gone, left = psutil.wait_procs(started, timeout=10)
    assert not left
    assert gone or moment == "start"


IMPORTED_BEFORE = """
import os
os.environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
import ray
from orchestrator.cluster.ray import ray_environment
from orchestrator.workspace.errors import UserError
try:
    with ray_environment("local"):
        raise SystemExit("its sockets would be open to others")
except UserError as error:
    assert "start another process" in str(error)
with ray_environment("head:6379"):
    pass
"""


@pytest.mark.slow
def test_a_ray_that_was_imported_with_open_sockets_is_not_used_as_a_local_one():
    run_workers(IMPORTED_BEFORE, 1)


def test_workers_of_a_cluster_get_named_variables(monkeypatch):
    named = {"HF_TOKEN": "secret", "AWS_A": "1", "IIET_PRETENDED_GPUS": "1"}
    monkeypatch.setattr(os, "environ", {**named, "AWS_B": "2", "PATH": "/"})
    entries = ("HF_TOKEN", "AWS_*", "NCCL_*", "AWS_B=3", "EMPTY=")
    assigned = {"AWS_B": "3", "EMPTY": ""}
    assert worker_variables(entries, "head:6379") == {**named, **assigned}
    # Workers of a local Ray inherit the other variables.
    assert worker_variables(entries, "local") == assigned
    # The user's options of the GPU allocator stay.
    for environment, usual in (({}, True), ({"PYTORCH_ALLOC_CONF": "x"}, False)):
        monkeypatch.setattr(os, "environ", environment)
        prepare_environment()
        assert ("PYTORCH_CUDA_ALLOC_CONF" in environment) is usual


@pytest.mark.parametrize("command", ["pretrain", "quickstart"])
def test_an_address_where_nothing_answers_is_refused_before_anything_is_prepared(
    command, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(ray, "_running", None)  # Other tests' Ray may run here.
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert cli.main([command, "-w", str(tmp_path), "--address", address]) == 2
        settings = ClusterSettings(address=address)
        with pytest.raises(UserError, match=f"{address}.*cluster.address=local"):
            ray_cluster(settings).__enter__()
    assert address in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()
    with refused(UserError, "no-such-host.invalid:6379"):
        check_ray_can_run("no-such-host.invalid:6379")


def test_a_command_must_run_on_a_node_of_the_cluster(monkeypatch):
    monkeypatch.setattr(psutil, "process_iter", lambda _: [])  # As on another machine.
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with refused(UserError, address):
            check_ray_can_run(address)
    with refused(UserError, "Ray", "this machine"):
        check_ray_can_run("auto")
    check_ray_can_run("local")
