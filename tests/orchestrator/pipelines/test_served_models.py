"""`benchmark --serve`: what is served, what is stored for reports, and that no server is left."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import Started
from fake_tracking import untracked
from local_servers import servers
from refusals import refused

from orchestrator import cli
from orchestrator.evaluation import serving
from orchestrator.models.open import open_model
from orchestrator.pipelines.serving import measure_serving, plan_serving, run_serving
from orchestrator.records.served import newest_served_times
from orchestrator.terminal.server import check_port, free_port
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.layout import Workspace

FAKE = Path(__file__).parents[2] / "fake_transformers_server.py"
CONDITIONS: dict[str, Any] = {"at_once": (1, 2), "num_requests": 2, "new_tokens": 3}
COMMAND = """
import sys
from orchestrator.cli import main
from orchestrator.evaluation import serving

serving.PROGRAM = (sys.argv[1],)
serving.NEEDED_PACKAGES = ()
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.fixture
def requests(tmp_path, monkeypatch) -> Callable[[], list[dict[str, Any]]]:
    """A function that returns the requests so far to a server in the place of transformers'.

    The server in its place starts at once.
    """
    file = tmp_path / "requests"
    file.touch()
    monkeypatch.setattr(serving, "PROGRAM", (str(FAKE),))
    monkeypatch.setattr(serving, "NEEDED_PACKAGES", ())
    monkeypatch.setenv("FAKE_SERVER", "answer")
    monkeypatch.setenv("FAKE_SERVER_REQUESTS", str(file))
    return lambda: [json.loads(line) for line in file.read_text().splitlines()]


def folders_of(requests: list[dict[str, Any]]) -> list[str]:
    """Return the folders that were served, in order."""
    return list(dict.fromkeys(request["model"] for request in requests))


def test_usual_requests_fit_the_shortest_model(requests, workspace, save_tiny, tmp_path):
    tiny = save_tiny(tmp_path / "tiny", context_length=64)
    plan = plan_serving(workspace=workspace, models=[tiny])
    assert plan.models == ["r=2,1", "r=1", "r=0"]
    assert (plan.conditions.at_once, plan.conditions.num_requests) == ((1, 4, 16), 32)
    assert (plan.conditions.prompt_tokens, plan.conditions.new_tokens) == (32, 32)
    long = save_tiny(tmp_path / "long", context_length=512)
    plan = plan_serving(workspace=workspace, models=[long], schedules=["1"])
    assert (plan.conditions.prompt_tokens, plan.conditions.new_tokens) == (128, 32)
    plan = plan_serving(workspace=workspace, models=[tiny, long])
    assert (plan.models, plan.conditions.prompt_tokens) == (["tiny", "long"], 32)
    with refused(UserError, "64", "--contexts", "--new-tokens"):
        plan_serving(workspace=workspace, models=[long, tiny], prompt_tokens=60, new_tokens=5)


def test_a_model_that_cannot_be_served_is_refused_before_anything_starts(
    requests, workspace, save_llama, tmp_path
):
    own_code = save_llama("own-code", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    config = json.loads((own_code / "config.json").read_text())
    (own_code / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with refused(UserError, "own-code", "--trust-remote-code"):
        plan_serving(workspace=workspace, models=[own_code])
    without = save_llama("without")
    (without / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        plan_serving(workspace=workspace, models=[without])
    assert requests() == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--serve --port {taken}", "port {taken} cannot be used"),
        ("--serve --repetitions 3", "--requests"),
        ("--serve --contexts 3,4", "--contexts 3,4"),
        ("--requests 3", "--serve"),
        ("--port 3000", "--serve"),
    ],
)
def test_a_mistake_is_one_sentence(requests, tmp_path, capfd, words, sentence):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        typed = words.format(taken=port).split()
        assert cli.main(["benchmark", *typed, "--workspace", str(tmp_path / "ws")]) == 2
    printed = capfd.readouterr().err
    assert sentence.format(taken=port) in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_what_transformers_reads_is_served_as_it_is_and_anything_else_as_an_export(
    requests, workspace, save_tiny, save_llama, tmp_path
):
    tiny = save_tiny(tmp_path / "tiny", context_length=32)
    llama = save_llama()
    result = measure_serving(workspace=workspace, models=[tiny, llama], **CONDITIONS)
    export, folder = folders_of(requests())
    assert folder == str(llama)
    assert not Path(export).exists()
    arguments = {request["model"]: request["arguments"] for request in requests()}
    assert "--trust-remote-code" in arguments[export]
    assert "--trust-remote-code" not in arguments[folder]
    assert "--continuous-batching" in arguments[folder]
    assert [(cost.model, cost.at_once) for cost in result.costs] == [
        ("tiny", 1), ("llama", 1), ("tiny", 2), ("llama", 2),
    ]  # fmt: skip
    # Five evaluations, each with keys and values of 16 float32 numbers.
    assert result.costs[0].kv_bytes_per_token == 5 * 2 * 16 * 4
    assert len(result.to_pandas()) == 4


@pytest.mark.slow
def test_reports_get_the_newest_times_under_the_same_conditions(
    requests, workspace, save_tiny, tmp_path
):
    assert newest_served_times(workspace) is None
    tiny = save_tiny(tmp_path / "tiny", context_length=32)
    full, cheap = (open_model(tiny, schedule=schedule).config for schedule in (None, "0"))
    assert full is not None
    assert cheap is not None
    options: dict[str, Any] = {"workspace": workspace, "models": [tiny], **CONDITIONS}
    full_result = measure_serving(schedules=["2,1"], **options)
    [_, busiest] = full_result.costs
    times_of_full = newest_served_times(workspace)
    assert times_of_full is not None
    assert times_of_full.ms_per_token(full) == busiest.ms_per_token
    assert times_of_full.ms_per_token(cheap) is None
    cheap_result = measure_serving(schedules=["0"], **options)
    assert cheap_result.path == full_result.path
    times_of_both = newest_served_times(workspace)
    assert times_of_both is not None
    assert None not in (times_of_both.ms_per_token(full), times_of_both.ms_per_token(cheap))
    # Other requests do not compare.
    measure_serving(schedules=["0"], **{**options, "num_requests": 3})
    newest = newest_served_times(workspace)
    assert newest is not None
    assert newest.ms_per_token(full) is None


@pytest.mark.parametrize(("mode", "words"), [("fail", "503.*the worker is dead"), ("end", "ended")])
def test_a_server_that_fails_is_named_with_its_model_and_its_log(
    requests, workspace, save_tiny, tmp_path, monkeypatch, mode, words
):
    monkeypatch.setenv("FAKE_SERVER", mode)
    plan = plan_serving(
        workspace=workspace, models=[save_tiny(tmp_path / "tiny")], schedules=["0"], **CONDITIONS
    )
    with pytest.raises(RunFailed, match=rf"^tiny r=0: .*{words}.*transformers-server\.log"):
        run_serving(plan, untracked(workspace))
    assert newest_served_times(workspace) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_server_is_left_when_the_command_is_ended(
    requests, workspace, save_tiny, tmp_path, monkeypatch, number
):
    monkeypatch.setenv("FAKE_SERVER", "hang")
    port = free_port()
    words = ["benchmark", "--serve", str(save_tiny(tmp_path / "tiny")), "--port", str(port)]
    words += ["--batch-sizes", "2", "--workspace", str(workspace.root)]
    process = Started(str(FAKE), *words, code=COMMAND)
    process.wait_for(requests)
    started = servers(port)
    assert started
    process.send_signal(number)
    printed, _ = process.communicate()
    psutil.wait_procs(started, timeout=10)  # A killed process may need a moment to be gone.
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert "interrupted; the server has ended" in printed
        assert "Traceback" not in printed
    assert servers(port) == []
    check_port(port)


@pytest.mark.slow
def test_transformers_server_itself_is_measured(workspace: Workspace, save_tiny, tmp_path):
    if any(serving.find_spec(name) is None for name in serving.NEEDED_PACKAGES):
        pytest.skip("`pip install '.[serve]'` installs what this needs")
    plain = save_tiny(tmp_path / "plain", method="vanilla", schedule=None, context_length=32)
    result = measure_serving(workspace=workspace, models=[plain], **CONDITIONS)
    assert [cost.at_once for cost in result.costs] == [1, 2]
    assert all(cost.tokens_per_second > 0 for cost in result.costs)
    assert result.server.startswith("transformers ")
