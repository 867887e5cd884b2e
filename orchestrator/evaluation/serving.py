"""Measure a model in transformers' own server, `transformers serve --continuous-batching`.

The server is a process of its own on the loopback interface, without access to the hub. Requests
ask for a fixed number of tokens and ignore the end of a text, so that all models do the same work.
Prompts are random words, and none comes twice: the server keeps the keys and values of what it has
read.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request

from orchestrator.models.tokenizer import ModelTokenizer, num_token_ids
from orchestrator.records.served import ServedCost, ServingConditions
from orchestrator.terminal.server import HOST, OPENER, LocalServer, local_server
from orchestrator.workspace.errors import RunFailed, UserError, shortened

SERVER = "transformers' server"
PROGRAM = ("-m", "transformers.cli.transformers")
"""Arguments of a Python that runs the command `transformers`."""
NEEDED_PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")
"""What the extra `transformers[serving]` installs."""
REQUEST_TIMEOUT_SECONDS = 600.0
PAGE_TOKENS = 256
"""Tokens of a block of the server's cache."""
SPARE_BLOCKS = 2
MIN_BATCH_TOKENS = 1024
MAX_BATCH_TOKENS = 8192
"""Bounds of the tokens that the server computes at once; the upper one is its default."""
NUM_WORDS = 64
"""Different tokens that prompts are made of."""
NEVER = -1
"""An `eos_token_id` that no token has."""


def check_server_installed() -> None:
    """Raise `UserError` if a package that the server needs is missing."""
    if missing := [name for name in NEEDED_PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"--serve needs {', '.join(missing)}, not installed here; "
            "`pip install 'iiet-orch[serve]'` installs what the server needs"
        )


def transformers_server(
    folder: Path,
    conditions: ServingConditions,
    *,
    device: str,
    dtype: str,
    port: int,
    log: Path,
    code_folder: Path,
    trust_remote_code: bool,
) -> AbstractContextManager[LocalServer]:
    """Return the server of a folder, to be entered; it takes some seconds to answer.

    Args:
        folder: Of a model that transformers reads, with a tokenizer.
        conditions: The requests that it will get, which its cache has room for.
        device: `cpu` or `cuda:N`.
        dtype: Type of the weights, such as `float32`.
        port: Where it listens.
        log: The file that it prints to.
        code_folder: Where transformers copies a model's code to.
        trust_remote_code: Whether code in the folder may run.
    """
    busiest = max(conditions.at_once)
    num_tokens = conditions.prompt_tokens + conditions.new_tokens
    # By itself it takes 60% of the memory of a CPU, and a minute to fill that with zeros.
    num_blocks = busiest * math.ceil(num_tokens / PAGE_TOKENS) + SPARE_BLOCKS
    batch_tokens = min(max(busiest * conditions.prompt_tokens, MIN_BATCH_TOKENS), MAX_BATCH_TOKENS)
    arguments = [*PROGRAM, "serve", str(folder), "--continuous-batching"]
    arguments += ["--host", HOST, "--port", str(port), "--device", device, "--dtype", dtype]
    arguments += ["--cb-num-blocks", str(num_blocks), "--cb-max-batch-tokens", str(batch_tokens)]
    if trust_remote_code:
        arguments.append("--trust-remote-code")
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(code_folder),
        "OMP_NUM_THREADS": str(conditions.num_threads),
    }
    return local_server(SERVER, arguments, port=port, log=log, environment=environment)


def measure_served(
    server: LocalServer,
    folder: Path,
    tokenizer: ModelTokenizer,
    conditions: ServingConditions,
    *,
    name: str,
    kv_bytes_per_token: int | None,
    on_answer: Callable[[int], None],
) -> list[ServedCost]:
    """Measure a server with each number of requests at a time.

    Args:
        server: It answers.
        folder: The folder that it serves.
        tokenizer: Of the model.
        conditions: The requests.
        name: Of the model, in the result.
        kv_bytes_per_token: Bytes that the model keeps for a token, as the cost model counts them.
        on_answer: Called after each answer with the number of requests at a time.

    Raises:
        RunFailed: If the server does not answer a request.
    """
    # The first request sets up its cache.
    warm_up = draw_prompts(tokenizer, conditions.prompt_tokens, max(conditions.at_once), seed=0)
    _answers(server, folder, warm_up, conditions.new_tokens, len(warm_up))
    costs = []
    for at_once in conditions.at_once:
        prompts = draw_prompts(
            tokenizer, conditions.prompt_tokens, conditions.num_requests, seed=at_once
        )
        started = time.perf_counter()
        latencies = _answers(
            server, folder, prompts, conditions.new_tokens, at_once, partial(on_answer, at_once)
        )
        seconds = time.perf_counter() - started
        costs.append(
            ServedCost(
                model=name,
                at_once=at_once,
                tokens_per_second=len(prompts) * conditions.new_tokens / seconds,
                latency_ms=statistics.median(latencies),
                latency_95_ms=percentile_95(latencies),
                kv_bytes_per_token=kv_bytes_per_token,
            )
        )
    return costs


def percentile_95(values: Sequence[float]) -> float:
    """Return the value that 95% of the values do not exceed."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def draw_prompts(tokenizer: ModelTokenizer, num_tokens: int, count: int, *, seed: int) -> list[str]:
    """Return random texts of a number of tokens each."""
    words = _separate_tokens(tokenizer)
    draw = random.Random(seed)
    return [tokenizer.decode(draw.choices(words, k=num_tokens)) for _ in range(count)]


def _separate_tokens(tokenizer: ModelTokenizer) -> list[int]:
    """Return tokens that stay what they are beside each other: whole words if there are some."""
    vocabulary = list(range(num_token_ids(tokenizer.tokenizer)))
    random.Random(0).shuffle(vocabulary)
    words: list[int] = []
    symbols: list[int] = []
    for token in vocabulary:
        text = tokenizer.decode([token, token])
        try:
            is_separate = tokenizer.encode(text, add_special_tokens=False) == (token, token)
        except UserError:  # The tokenizer reads symbols alone, and this token is none.
            is_separate = False
        if text and is_separate:
            is_word = len(text.split()) == 2  # Twice the same, with a space between.
            if is_word:
                words.append(token)
            else:
                symbols.append(token)
        if len(words) == NUM_WORDS:
            break
    return words or symbols


def _answers(
    server: LocalServer,
    folder: Path,
    prompts: Sequence[str],
    new_tokens: int,
    at_once: int,
    on_answer: Callable[[], None] = lambda: None,
) -> list[float]:
    """Send all prompts, some at a time, and return the milliseconds until each was answered."""
    latencies = []
    pool = ThreadPoolExecutor(at_once)
    try:
        for latency in pool.map(lambda text: _answer(server, folder, text, new_tokens), prompts):
            latencies.append(latency)
            on_answer()
    finally:
        # After Ctrl-C nobody waits for answers: the server ends.
        pool.shutdown(wait=False, cancel_futures=True)
    return latencies


def _answer(server: LocalServer, folder: Path, prompt: str, new_tokens: int) -> float:
    generation = {"max_new_tokens": new_tokens, "eos_token_id": NEVER, "do_sample": False}
    values = {
        "model": str(folder), "prompt": prompt, "generation_config": json.dumps(generation),
    }  # fmt: skip
    request = Request(
        f"{server.url}/v1/completions",
        json.dumps(values).encode(),
        {"Content-Type": "application/json"},
    )
    started = time.perf_counter()
    try:
        with OPENER.open(request, timeout=REQUEST_TIMEOUT_SECONDS) as answer:
            num_written = json.load(answer)["usage"]["completion_tokens"]
    except HTTPError as error:
        detail = shortened(error.read().decode(errors="replace").strip() or error.reason)
        raise RunFailed(
            f"{SERVER} answered a request with {error.code}: {detail}; see {server.log}"
        ) from None
    except (URLError, OSError) as error:
        if server.process.poll() is not None:
            raise server.failure() from None
        raise RunFailed(f"{SERVER} did not answer a request: {error}; see {server.log}") from None
    seconds = time.perf_counter() - started
    if num_written != new_tokens:
        raise RunFailed(
            f"{SERVER} wrote {num_written} tokens where {new_tokens} were asked for; see "
            f"{server.log}"
        )
    return 1e3 * seconds
