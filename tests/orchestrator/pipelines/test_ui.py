"""The server starts small, answers on loopback, stops with all its children, and refuses a taken
port."""

from __future__ import annotations

import ipaddress
import signal
import socket
import urllib.request

import psutil
import pytest
from browser import BROWSER, page_text
from commands import Started
from local_servers import free_port, servers
from refusals import refused

from orchestrator.pipelines.ui import serve, server_arguments
from orchestrator.records.tracked_run import REPORT_TAG, VIEW_TAG, TrackedRun
from orchestrator.terminal.server import check_port
from orchestrator.tracking.tracker import open_tracking
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import write_text
from orchestrator.workspace.layout import RESULTS_FILE


def test_a_taken_port_is_named_with_another():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with refused(UserError, port, "--port"):
            check_port(port)
    check_port(port)


def test_the_server_listens_to_this_machine_alone(workspace):
    arguments = server_arguments(workspace, 5000)
    host = arguments[arguments.index("--host") + 1]
    assert ipaddress.ip_address(host).is_loopback
    assert arguments[arguments.index("--port") + 1] == "5000"


def test_a_server_elsewhere_that_does_not_answer_has_no_pages_to_show(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:sesame@127.0.0.1:9")
    lines: list[str] = []
    with refused(RunFailed, "http://127.0.0.1:9") as failed:
        serve(workspace, say=lines.append)
    assert not any(word in line for line in lines for word in ("starting", "None", "sesame"))
    assert "sesame" not in str(failed.value)


@pytest.mark.slow
def test_the_server_answers_shows_the_runs_and_leaves_nothing_behind(workspace, monkeypatch):
    tracking = open_tracking(workspace, warn=pytest.fail)
    tags = {VIEW_TAG: "front-toy", REPORT_TAG: "a.html"}
    run = TrackedRun(key="key", name="toy", kind="sweep", tags=tags)
    trial = TrackedRun(key="trial", name="toy student", kind="trial", parent="key")
    tracking.publish(run, trial)
    run_id = tracking.run_id(run)
    page = workspace.sweeps / "toy" / "front.html"
    for path in (page, page.with_name(RESULTS_FILE)):
        write_text(path, "")
    ran = workspace.root / "ran"
    for name in ("mlflow", "random", "sqlalchemy", "uvicorn"):
        code = f"open({str(ran)!r}, 'a').write({name!r}); raise SystemExit('code of the workspace')"
        (workspace.root / f"{name}.py").write_text(code)
    monkeypatch.chdir(workspace.root)  # Where a person may well type the command.
    port = free_port()
    lines = []
    answers = []
    linked: list[str] = []

    def look_once() -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            answers.append(answer.status)
        if BROWSER is not None:
            answers.append(page_text(lines[2].partition(": ")[2], workspace.root / "profile"))
        # To another command this server is one elsewhere: it links to its pages and starts none.
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            serve(workspace, say=linked.append)
        return True

    serve(workspace, port=port, say=lines.append, should_stop=look_once)
    assert not ran.exists()
    assert answers[0] == 200
    assert lines[0] == linked[0] == f"newest sweep: {page.as_uri()}"
    assert lines[2].startswith("training runs: http://127.0.0.1:")
    assert any(f"/runs/{run_id}?workflowType=machine_learning" in line for line in lines)
    assert any("viewStateShareKey=front-toy" in line for line in lines)
    assert any(f"/runs/{run_id}/artifacts/a.html?" in line for line in lines)
    assert linked[1:] == [line for line in lines if "http://" in line][1:]
    if BROWSER is not None:
        assert "Model training" in answers[1]
        assert "toy student" in answers[1]
    assert servers(port) == []
    check_port(port)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_its_command(workspace, number):
    port = free_port()
    process = Started("ui", "--port", str(port), "--workspace", str(workspace.root))
    while "Ctrl-C stops the server" not in process.stdout.readline():
        assert process.poll() is None
    started = servers(port)
    assert len(started) > 1
    process.send_signal(number)
    assert process.wait(60) == (0 if number == signal.SIGTERM else -number)
    psutil.wait_procs(started, timeout=10)
    assert servers(port) == []
    check_port(port)


@pytest.mark.slow
def test_a_server_that_ends_names_its_last_line_and_its_log(workspace, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such host\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with refused(RunFailed, "(3)", "no such host", "log"):
        serve(workspace, port=free_port(), say=lambda line: None)
