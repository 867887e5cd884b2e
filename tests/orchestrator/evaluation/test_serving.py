"""Requests to transformers' server: what they ask for, how many at a time, and what is said when
it does not answer."""

from __future__ import annotations

import ipaddress
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from orchestrator.data.store import open_tokens
from orchestrator.evaluation import serving
from orchestrator.evaluation.serving import draw_prompts, measure_served, percentile_95
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.records.served import ServedCost, ServingConditions
from orchestrator.terminal.server import LocalServer
from orchestrator.workspace.errors import RunFailed, UserError

CONDITIONS = ServingConditions(
    at_once=(1, 3), num_requests=6, prompt_tokens=5, new_tokens=4, num_threads=1
)
Answer = tuple[int, dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokens) -> ModelTokenizer:
    return ModelTokenizer(open_tokens(tiny_tokens).tokenizer_path)


@contextmanager
def answering_server(
    answer: Callable[[dict[str, Any]], Answer], folder: Path
) -> Iterator[LocalServer]:
    """Yield a server in this process that answers requests as a function says."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            values = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, answered = answer(values)
            data = json.dumps(answered).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    # A process that ends when its input does stands for the server's.
    waiting = [sys.executable, "-c", "input()"]
    try:
        with subprocess.Popen(waiting, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            yield LocalServer(
                name="the server",
                url=f"http://127.0.0.1:{listening.server_address[1]}",
                log=folder / "log",
                process=process,
            )
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def served_costs(
    server: LocalServer, tokenizer: ModelTokenizer, **options: Any
) -> list[ServedCost]:
    return measure_served(
        server,
        Path("model"),
        tokenizer,
        CONDITIONS,
        name="tiny",
        kv_bytes_per_token=7,
        on_answer=options.get("on_answer", lambda at_once: None),
    )


def test_as_many_requests_are_sent_at_a_time_as_asked_and_no_prompt_comes_twice(
    tokenizer, tmp_path
):
    requests: list[dict[str, Any]] = []
    # The warm-up, then six requests one by one, then six of which three must arrive before any is
    # answered.
    at_a_time = [3] * 3 + [1] * 6 + [3] * 6
    meetings = {number: threading.Barrier(number, timeout=60) for number in (1, 3)}
    lock = threading.Lock()

    def answer(values: dict[str, Any]) -> Answer:
        with lock:
            together = at_a_time[len(requests)]
            requests.append(values)
        meetings[together].wait()
        return 200, {"usage": {"completion_tokens": 4}}

    answers: list[int] = []
    with answering_server(answer, tmp_path) as server:
        costs = served_costs(server, tokenizer, on_answer=answers.append)
    assert answers == [1] * 6 + [3] * 6
    assert [(cost.model, cost.at_once) for cost in costs] == [("tiny", 1), ("tiny", 3)]
    assert all(0 < cost.latency_ms <= cost.latency_95_ms for cost in costs)
    assert all(cost.ms_per_token * cost.tokens_per_second == pytest.approx(1e3) for cost in costs)
    assert len({values["prompt"] for values in requests}) == 15
    for values in requests:
        assert values["model"] == "model"
        generation = json.loads(values["generation_config"])
        assert generation == {"max_new_tokens": 4, "eos_token_id": -1, "do_sample": False}


@pytest.mark.parametrize(
    ("code", "answered", "words"),
    [
        (503, {"error": "the worker is dead"}, "503.*the worker is dead.*log"),
        (200, {"usage": {"completion_tokens": 3}}, "wrote 3 tokens where 4 were asked for"),
    ],
)
def test_an_answer_that_is_none_is_named_with_the_log(tokenizer, tmp_path, code, answered, words):
    with (
        answering_server(lambda values: (code, answered), tmp_path) as server,
        pytest.raises(RunFailed, match=words),
    ):
        served_costs(server, tokenizer)


def test_prompts_have_the_tokens_that_were_asked_for(tokenizer):
    prompts = draw_prompts(tokenizer, 7, 20, seed=1)
    assert {len(tokenizer.encode(text, add_special_tokens=False)) for text in prompts} == {7}
    assert prompts == draw_prompts(tokenizer, 7, 20, seed=1)
    assert not set(prompts) & set(draw_prompts(tokenizer, 7, 20, seed=4))


def test_95_percent_of_the_values_are_below_the_percentile():
    assert percentile_95([3.0]) == 3.0
    assert percentile_95(range(101)) == pytest.approx(95)


def test_the_server_listens_to_this_machine_alone_and_its_cache_holds_the_requests(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "executable", "echo")  # It prints its arguments into the log.
    with serving.transformers_server(
        Path("model"), CONDITIONS, device="cpu", dtype="float32", port=5000,
        log=tmp_path / "log", code_folder=Path("code"), trust_remote_code=False,
    ) as server:  # fmt: skip
        assert server.process.wait(60) == 0
    arguments = server.log.read_text().split()
    options = dict(itertools.pairwise(arguments))
    assert ipaddress.ip_address(options["--host"]).is_loopback
    assert options["--port"] == "5000"
    assert int(options["--cb-num-blocks"]) >= max(CONDITIONS.at_once), "each has a block of its own"
    assert "--trust-remote-code" not in arguments


def test_a_missing_package_of_the_server_is_named(monkeypatch):
    monkeypatch.setattr(serving, "NEEDED_PACKAGES", ("json", "no_such_package"))
    with refused(UserError, "--serve", "no_such_package", "iiet-orch[serve]"):
        serving.check_server_installed()
