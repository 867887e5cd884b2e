"""A server of transformers for one folder, in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from transformers.utils.import_utils import is_serve_available

START = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
SECONDS_TO_START = 120
Ask = Callable[..., Any]
PAGED = ("--continuous-batching", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "512")
"""Options of continuous batching that take little memory."""


@contextmanager
def served(folder: Path, home: Path, *options: str) -> Iterator[Ask]:
    """Yield a function that asks the server of a folder: the end of an address, then values.

    It returns the answer, or with `stream=True` the list of its parts. Without the extra
    `transformers[serving]`, skip.
    """
    if not is_serve_available():
        pytest.skip("`pip install 'transformers[serving]'` installs what this needs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options += ("--trust-remote-code", "--device", "cpu", "--dtype", "float32", "--port", str(port))
    process = subprocess.Popen(
        [sys.executable, "-c", START, "serve", str(folder), *options],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(path: str, **values: Any) -> Any:
        data = json.dumps({"model": str(folder), **values}).encode() if values else None
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"http://localhost:{port}/{path}", data, headers)) as answer:
            if not values.get("stream"):
                return json.load(answer)
            lines = [line.decode().strip() for line in answer]
        return [json.loads(line.removeprefix("data: ")) for line in lines if line]

    try:
        for _ in range(SECONDS_TO_START):
            assert process.poll() is None, "the server has ended"
            try:
                ask("health")
                break
            except URLError:
                time.sleep(1)
        else:
            raise AssertionError(f"the server does not answer after {SECONDS_TO_START} s")
        yield ask
    finally:
        process.kill()
        process.wait()
