"""MLflow's pages of a sweep, read in a browser, behind a path and a password.

The server stands behind a small proxy, as it does in many companies. All that is written and read
here goes through it.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

import pytest
from browser import BROWSER, page_text
from local_servers import free_port

from orchestrator.pipelines.ui import serve
from orchestrator.reporting.report import write_sweep_report
from orchestrator.reporting.results import StoredSweep
from orchestrator.tracking.tracker import open_tracking
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import open_workspace

PREFIX = "/team/mlflow"
USER = "ann"
PASSWORD = "open-sesame"
HEADERS_OF_ONE_HOP = ("host", "authorization", "connection", "transfer-encoding", "content-length")


class Proxy(BaseHTTPRequestHandler):
    """Forwards what is below the path, if the password is right; `/start` leads there."""

    protocol_version = "HTTP/1.1"
    server_port = 0
    seen: list[tuple[str, int]]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        expected = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {expected}":
            self._send(401, {"WWW-Authenticate": 'Basic realm="mlflow"'}, b"")
        elif self.path.startswith("/start?"):
            # A browser keeps the password; pages whose own address has one may not load data.
            link = json.dumps(unquote(self.path.partition("?")[2]))
            page = f"<script>location.replace({link})</script>"
            self._send(200, {"Content-Type": "text/html"}, page.encode())
        elif self.path.startswith(PREFIX):
            self._forward(body)
        else:
            self._send(404, {}, b"")

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _answer  # noqa: N815

    def _forward(self, body: bytes) -> None:
        connection = HTTPConnection("127.0.0.1", self.server_port, timeout=120)
        forwarded_headers = {
            k: v for k, v in self.headers.items() if k.lower() not in HEADERS_OF_ONE_HOP
        }
        connection.request(self.command, self.path.removeprefix(PREFIX), body, forwarded_headers)
        answer = connection.getresponse()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in HEADERS_OF_ONE_HOP}
        self._send(answer.status, headers, answer.read())
        connection.close()

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.seen.append((self.path, status))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def proxy_of(port: int) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Run a proxy of a server; yield its host, and the paths and states of its answers."""
    answers: list[tuple[str, int]] = []
    handler = type("ProxyOfServer", (Proxy,), {"server_port": port, "seen": answers})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", answers
        finally:
            server.shutdown()


def curve_heights(page: str) -> list[list[float]]:
    """Return the vertical positions of the points of each curve, in pixels."""
    paths = re.findall(r'class="js-line"[^>]* d="M([^"]+)"', page)
    return [[float(point.split(",")[1]) for point in path.split("L")] for path in paths]


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_pages_behind_a_path_and_a_password_show_the_sweep(tmp_path, monkeypatch, sample_results):
    at_home = open_workspace(tmp_path / "server")
    workspace = open_workspace(tmp_path / "ws")
    placed = []
    for result in sample_results:
        journal = Journal(workspace.trials / result.key)
        for step, loss in ((10, 4.5), (20, 4.0), (30, 5.0)):
            journal.metrics(step, {"validation/loss": loss})
        journal.close()
        checkpoint = workspace.trials / result.key / "step_00000030"
        placed.append(result.model_copy(update={"checkpoint": str(checkpoint)}))
    sweep = StoredSweep(name="toy", key="0123456789abcdef", results=tuple(placed))
    lines: list[str] = []
    pages: dict[str, str] = {}
    port = free_port()

    def look_once() -> bool:
        with proxy_of(port) as (host, answers), monkeypatch.context() as elsewhere:
            uri = f"http://{USER}:{PASSWORD}@{host}{PREFIX}"
            elsewhere.setenv("MLFLOW_TRACKING_URI", uri)
            tracking = open_tracking(workspace, warn=pytest.fail)
            write_sweep_report(workspace, sweep, tracking=lambda tracking=tracking: tracking)
            serve(workspace, say=lines.append)
            links = dict(re.findall(r"(.+?): +http(.+)", "\n".join(lines)))
            assert all(link.startswith(f"://{host}{PREFIX}/#/") for link in links.values())
            runs = tracking.store.connect().search_runs([str(tracking.open_experiment())])
            trials = [run.info.run_id for run in runs if run.data.tags["iiet.kind"] != "sweep"][:4]
            chosen = f"runs={json.dumps(trials)}&experiments=[%22{tracking.open_experiment()}%22]"
            links["compared"] = f"://{host}{PREFIX}/#/compare-runs?{chosen}"
            for name, link in links.items():
                start_page = f"http://{USER}:{PASSWORD}@{host}/start?{quote(f'http{link}')}"
                pages[name] = page_text(start_page, tmp_path / "profile")
            pictures = [
                state for path, state in answers if "get-artifact" in path and ".svg" in path
            ]
            assert pictures
            assert set(pictures) == {200}
            tags = [value for run in runs for value in run.data.tags.values()]
            assert not any(PASSWORD in value for value in tags)
        return True

    serve(at_home, port=port, say=lambda _: None, should_stop=look_once)
    names = ("teacher 3,3,3,3,3,3", "0,1,1,1,1,1", "vanilla", "cost/evaluations")
    # The page of training runs shows the runs of a sweep, too.
    assert all(name in pages["training runs"] for name in ("quality/accuracy", *names[:3]))
    assert all(name in pages["sweep toy, table"] for name in names)
    assert "0,1,1,1,1,1 keeps 99.4%" in pages["sweep toy, run"]
    charts = pages["sweep toy, charts"]
    assert "cost/evaluations vs. quality/accuracy" in charts
    assert "Parallel Coordinates" in charts
    # The losses are 4.5, 4.0 and 5.0. If they were smoothed, the steps would not be as 1 to -2.
    heights = [curve for curve in curve_heights(charts) if len(curve) == 3]
    assert heights
    for start_page, second, third in heights:
        assert (third - second) / (second - start_page) == pytest.approx(-2.0, abs=0.02)
    assert "<iframe" in pages["sweep toy, report"]
    assert "Comparing 4 Runs" in pages["compared"]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "profile" not in path.parts]
    assert len(files) > 20
    holders = [path for path in files if PASSWORD.encode() in path.read_bytes()]
    assert holders == []
    assert not any(PASSWORD in line for line in lines)
