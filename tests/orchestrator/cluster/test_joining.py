"""Addresses where no Ray cluster answers are refused; real sockets stand for them."""

from __future__ import annotations

import http.server
import platform
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.cluster import joining, start
from orchestrator.cluster.joining import check_ray_can_run, check_reachable, joining_problem
from orchestrator.cluster.start import ray_cluster
from orchestrator.settings import ClusterSettings
from orchestrator.workspace.errors import UserError

SETTINGS_FRAME = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for an answer only briefly, and join although other tests' Ray may run here."""
    monkeypatch.setattr(joining, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(start, "_running", None)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A socket that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_port_where_nothing_listens_is_refused_with_what_to_type() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = address_of(unused)
        with pytest.raises(
            UserError, match=f"no Ray cluster answers at {address}.*cluster.address=local"
        ):
            check_reachable(address)
        with pytest.raises(UserError, match=address), ray_cluster(ClusterSettings(address=address)):
            pass


@pytest.mark.parametrize("command", ["pretrain", "quickstart"])
def test_a_command_ends_before_it_prepares_anything(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = address_of(unused)
        assert cli.main([command, "-w", str(tmp_path), "--address", address]) == 2
    assert f"iiet-orch: no Ray cluster answers at {address}" in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()


def test_a_host_without_an_address_is_refused() -> None:
    with pytest.raises(UserError, match=r"no Ray cluster answers at no-such-host\.invalid:6379"):
        check_reachable("no-such-host.invalid:6379")


def test_a_server_that_says_nothing_is_refused(server: socket.socket) -> None:
    with pytest.raises(UserError, match="is no Ray cluster"):
        check_reachable(address_of(server))


def test_a_web_server_is_refused() -> None:
    handler = http.server.SimpleHTTPRequestHandler
    with ExitStack() as stack:
        web = stack.enter_context(http.server.HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=web.serve_forever, daemon=True).start()
        stack.callback(web.shutdown)
        with pytest.raises(UserError, match="is no Ray cluster"):
            check_reachable(address_of(web.socket))


def test_a_server_that_greets_as_grpc_does_is_left_to_ray(server: socket.socket) -> None:
    def greet() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(SETTINGS_FRAME[:4])
            connection.sendall(SETTINGS_FRAME[4:])
            connection.recv(100)

    greeting = threading.Thread(target=greet)
    greeting.start()
    check_reachable(address_of(server))
    greeting.join()


def test_other_versions_are_named() -> None:
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as caught:
        check_version_info({"ray_version": "2.1.0", "python_version": "3.7.4"}, "node x")
    problem = joining_problem(caught.value, "head:6379")
    assert "the cluster at head:6379 runs Ray 2.1.0 and Python 3.7.4, and this command" in problem
    assert f"Python {platform.python_version()}; install the same" in problem


def test_what_ray_says_is_part_of_the_sentence_otherwise() -> None:
    problem = joining_problem(ConnectionError("first\nsecond"), "head:6379")
    assert "head:6379 cannot be joined (first);" in problem


def test_a_command_must_run_on_a_node_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "check_reachable", lambda _: None)
    monkeypatch.setattr(joining.psutil, "process_iter", lambda _: [])  # As on another machine.
    with pytest.raises(UserError, match="this machine is no node of the cluster at head:6379"):
        check_ray_can_run("head:6379")
    with pytest.raises(UserError, match="no Ray cluster runs on this machine"):
        check_ray_can_run("auto")
    check_ray_can_run("local")
