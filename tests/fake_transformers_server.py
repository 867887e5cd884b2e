"""Takes what `transformers serve` takes, and writes no text: a server that starts at once.

The variable FAKE_SERVER says what it does with requests: `answer`, `hang`, `fail`, or `end`, before
there is any. Each request becomes a line of the file FAKE_SERVER_REQUESTS.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODE = os.environ["FAKE_SERVER"]


class Handler(BaseHTTPRequestHandler):
    """Answers `/health` and completions."""

    def do_GET(self) -> None:
        self._send(200, {"status": "ok"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        values = json.loads(body)
        with Path(os.environ["FAKE_SERVER_REQUESTS"]).open("a") as file:
            file.write(json.dumps({**values, "arguments": sys.argv[1:]}) + "\n")
        if MODE == "hang":
            threading.Event().wait()
        if MODE == "fail":
            self._send(503, {"error": "the worker is dead"})
            return
        number = json.loads(values["generation_config"])["max_new_tokens"]
        self._send(200, {"usage": {"completion_tokens": number}})

    def _send(self, code: int, values: object) -> None:
        data = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    if MODE == "end":
        raise SystemExit("it cannot start")
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
