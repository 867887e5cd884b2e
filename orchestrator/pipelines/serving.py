"""Measure what models cost in transformers' own server, one after the other.

A checkpoint is exported to a temporary folder first, under its schedule; a folder that transformers
reads without code of its own is served as it is. The measurements stand in one file for each set of
conditions, and reports take their `--cost served_ms` from it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import Field, computed_field
from rich.console import RenderableType

from iiet.cost import inference_cost
from iiet.plain_models import MODEL_TYPES
from orchestrator.cluster.work import command_place
from orchestrator.evaluation.serving import (
    check_server_installed,
    measure_served,
    transformers_server,
)
from orchestrator.models.folder import read_config
from orchestrator.models.load import DTYPES, device_precision
from orchestrator.models.open import OpenedModel, by_label, open_models
from orchestrator.pipelines.benchmarking import USUAL_NEW_TOKENS, family_of
from orchestrator.pipelines.context import Context, in_one_call
from orchestrator.pipelines.models import export_checkpoint
from orchestrator.records.served import ServedCost, ServedTimes, ServingConditions, shape_key
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.reporting import command_tables
from orchestrator.reporting.model_card import ModelCard
from orchestrator.reporting.result import Result
from orchestrator.reporting.sections import two_column_table
from orchestrator.settings import ClusterSettings
from orchestrator.settings.training import Precision
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count, join_names
from orchestrator.terminal.server import check_port, free_port
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import Workspace, find_workspace
from orchestrator.workspace.provenance import content_key, installed_version, timing_environment

LOG_NAME = "transformers-server.log"
USUAL_AT_ONCE = (1, 4, 16)
"""Requests at a time by default."""
USUAL_REQUESTS = 32
"""Requests for each of these by default."""
USUAL_PROMPT_TOKENS = 128
"""Tokens of a prompt by default; at most half the model's context."""


class ServingPlan(Result):
    """Models, each under its schedule, and the requests that they are measured with."""

    opened: dict[str, OpenedModel] = Field(exclude=True)
    """By the labels of the result."""
    cluster: ClusterSettings = Field(exclude=True)
    conditions: ServingConditions
    """The requests."""
    port: int | None = Field(exclude=True)
    """Where the server listens; None for a free port."""
    trust_remote_code: bool = Field(exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(self.opened)

    def shown(self) -> Iterable[RenderableType]:
        """Return the models' names and the requests."""
        requests = self.conditions
        yield two_column_table(
            "Plan of the benchmark in transformers' server",
            [
                ("models", join_names(self.models)),
                ("requests at a time", ", ".join(map(str, requests.at_once))),
                ("requests", f"{requests.num_requests} for each of these"),
                ("tokens", f"{requests.prompt_tokens} of a prompt, {requests.new_tokens} new"),
                ("threads", str(requests.num_threads)),
            ],
        )


class ServingResult(Result):
    """All measurements of one call."""

    path: Path
    """The file that holds them, beside earlier ones under the same conditions."""
    server: str
    """Program and version."""
    device: str
    """CPU or GPU that it was measured on."""
    dtype: str
    """Type of the weights."""
    conditions: ServingConditions
    """The requests."""
    costs: list[ServedCost]
    """By the number of requests at a time, then by model in the order given."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per model and number of requests at a time."""
        return [{**cost.model_dump(), "ms_per_token": cost.ms_per_token} for cost in self.costs]

    def shown(self) -> Iterable[RenderableType]:
        """Return the table of costs, and what its numbers are."""
        requests = self.conditions
        yield command_tables.served_table(self.costs)
        yield (
            f"  {self.server} with continuous batching, {self.device}, {self.dtype}, "
            f"{format_count(requests.num_threads, 'thread')}; {requests.num_requests} requests at "
            f"each number, {requests.prompt_tokens} tokens of prompt and {requests.new_tokens} "
            "new ones"
        )
        yield (
            "  latency: from a request to the end of its answer, in ms; "
            f"`--cost served_ms` of `report` and `pick` is ms/token of {max(requests.at_once)} "
            "requests at a time"
        )
        yield f"  written to {self.path}"


def plan_serving(
    *,
    workspace: Workspace | Path | str | None = None,
    models: Sequence[Path | str] = (),
    schedules: Sequence[str] = (),
    at_once: Sequence[int] = (),
    num_requests: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    num_threads: int = 1,
    port: int | None = None,
    cluster: ClusterSettings | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ServingPlan:
    """Open the models, and check that transformers' server can run them.

    Args:
        models: Checkpoints or runs, by path or name, or model folders; when empty, the
            newest of finished runs and the last pick.
        schedules: Iteration schedules as typed. When empty, one IIET is measured under schedules
            from full to none, and several models each under their own.
        at_once: How many requests are sent at a time; 1, 4 and 16 when empty.
        num_requests: Requests for each of these numbers; 32 when unset.
        prompt_tokens: Tokens of a prompt; 128, or half of a shorter context, when unset.
        new_tokens: Tokens of an answer; 32, or fewer if no more fit, when unset.
        num_threads: Threads of the server on a CPU.
        port: Where the server listens; a free port when unset.
        cluster: Where they are measured; see `command_place`.
        trust_remote_code: Whether code in a folder from elsewhere may run.

    Raises:
        UserError: If the server is not installed or its port is taken, a model is missing, damaged,
            without a tokenizer or not served, or the requests do not fit it.
    """
    check_server_installed()
    if port is not None:
        check_port(port)
    space = find_workspace(workspace)
    note = (progress or Progress()).note
    opened = open_models(models, space, schedules, note=note)
    if len(opened) == 1 and not schedules:
        opened = family_of(opened[0])
    for model in opened:
        _check_is_served(model, trust_remote_code=trust_remote_code)
    shortest = min(opened, key=lambda model: model.context_length)
    length = shortest.context_length
    prompt_tokens = prompt_tokens or min(USUAL_PROMPT_TOKENS, length // 2)
    new_tokens = new_tokens or max(1, min(USUAL_NEW_TOKENS, length - prompt_tokens))
    if prompt_tokens + new_tokens > length:
        raise UserError(
            f"benchmark: {shortest.label} reads {length} tokens, not the {prompt_tokens} + "
            f"{new_tokens} of prompt and new tokens; lower --contexts or --new-tokens"
        )
    return ServingPlan(
        opened=by_label(opened),
        cluster=cluster or ClusterSettings(),
        conditions=ServingConditions(
            at_once=tuple(at_once) or USUAL_AT_ONCE,
            num_requests=num_requests or USUAL_REQUESTS,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            num_threads=num_threads,
        ),
        port=port,
        trust_remote_code=trust_remote_code,
    )


def _check_is_served(model: OpenedModel, *, trust_remote_code: bool) -> None:
    if model.loops and model.depth != model.loops.default_depth:
        raise UserError(
            f"--schedule: transformers' server runs {model.label} at the depth of its folder "
            "alone; leave --schedule out"
        )
    if model.config is None and "auto_map" in read_config(model.path) and not trust_remote_code:
        raise UserError(
            f"{model.path} has code of its own; add --trust-remote-code if it may run here"
        )
    if model.tokenizer(trust_remote_code=trust_remote_code).tokenizer is None:
        raise UserError(f"{model.path} has no tokenizer.json, which the requests are made with")


def run_serving(plan: ServingPlan, context: Context) -> ServingResult:
    """Measure models in transformers' server: tokens per second, latency, keys and values."""
    place = command_place(plan.cluster, context.workspace.root)
    started_ms = now_ms()
    log = context.workspace.logs / LOG_NAME
    context.progress.start("serve")  # Models take their time to load.
    try:
        costs, device, dtype = place.run(partial(_measure, plan, log), context.progress)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the server has ended, and nothing was stored") from None
    server = f"transformers {installed_version('transformers')}"
    machine = timing_environment()
    key = content_key("served", plan.conditions.model_dump(mode="json"), device, dtype, machine)
    path = context.workspace.benchmarks / f"served-{key}.json"
    earlier_times = ServedTimes.read(path)
    by_shape = dict(earlier_times.costs) if earlier_times else {}
    for name, model in plan.opened.items():
        if model.config is not None:
            costs_of_model = tuple(cost for cost in costs if cost.model == name)
            by_shape[shape_key(model.config)] = costs_of_model
    ServedTimes(
        time=time.time(),
        server=server,
        device=device,
        dtype=dtype,
        machine=machine,
        conditions=plan.conditions,
        costs=by_shape,
    ).write(path)
    context.progress.finish(f"{len(plan.models)} models, {len(costs)} measurements")
    for name, model in plan.opened.items():
        metrics: dict[str, float] = {}
        for cost in costs:
            if cost.model == name:
                metrics |= cost.metrics()
        context.log_measurement(
            TrackedRun.of(
                key=content_key("served", list(model.key), key),
                name=f"served {model.label}"[:80],
                kind="benchmark",
                params={
                    **model.parameters(),
                    "checkpoint": model.path,
                    "server": server,
                    "device": device,
                    "dtype": dtype,
                    "num_threads": plan.conditions.num_threads,
                },
                metrics=metrics,
            ),
            started_ms,
        )
    return ServingResult(
        path=path,
        server=server,
        device=device,
        dtype=dtype,
        conditions=plan.conditions,
        costs=costs,
    )


measure_serving = in_one_call(plan_serving, run_serving)


def _measure(
    plan: ServingPlan, log: Path, device: str, progress: Progress
) -> tuple[list[ServedCost], str, str]:
    """Return the costs, the name of the device, and the dtype of the weights."""
    requests = plan.conditions
    precision = device_precision(device)
    requests_per_model = len(requests.at_once) * requests.num_requests
    progress.start("serve", len(plan.opened) * requests_per_model)
    costs: list[ServedCost] = []
    for number, (name, model) in enumerate(plan.opened.items()):
        num_answers = number * requests_per_model
        try:
            costs += _costs_of(plan, name, model, device, precision, log, progress, num_answers)
        except RunFailed as error:
            raise RunFailed(f"{name}: {error}") from None
    costs.sort(key=lambda cost: requests.at_once.index(cost.at_once))
    on_gpu = torch.device(device).type == "cuda"
    device_name = torch.cuda.get_device_name(device) if on_gpu else device
    return costs, device_name, _dtype_name(precision)


def _costs_of(
    plan: ServingPlan,
    name: str,
    model: OpenedModel,
    device: str,
    precision: Precision,
    log: Path,
    progress: Progress,
    num_answers: int,
) -> list[ServedCost]:
    """Serve one model and measure it; the progress has come to `num_answers` already."""

    def count_answer(at_once: int) -> None:
        nonlocal num_answers
        num_answers += 1
        progress.advance(num_answers, f"{name}, {at_once} at a time")

    progress.advance(num_answers, f"{name}, its server starts")
    with TemporaryDirectory() as scratch:
        folder = _served_folder(model, Path(scratch) / "model", precision)
        with transformers_server(
            folder,
            plan.conditions,
            device=device,
            dtype=_dtype_name(precision),
            port=plan.port or free_port(),
            log=log,
            code_folder=Path(scratch) / "code",
            # What was exported has the code of this program.
            trust_remote_code=folder != model.path or plan.trust_remote_code,
        ) as server:
            server.wait_until_healthy()
            return measure_served(
                server,
                folder,
                model.tokenizer(trust_remote_code=plan.trust_remote_code),
                plan.conditions,
                name=name,
                kv_bytes_per_token=_kv_bytes_per_token(model, DTYPES[precision].itemsize),
                on_answer=count_answer,
            )


def _dtype_name(precision: Precision) -> str:
    return str(DTYPES[precision]).removeprefix("torch.")


def _served_folder(model: OpenedModel, folder: Path, precision: Precision) -> Path:
    """Return a folder that transformers reads: the model's own, or an export of it to `folder`."""
    is_plain = read_config(model.path).get("model_type") in MODEL_TYPES
    if model.is_external and (model.config is None or is_plain):
        return model.path
    decoder = model.decoder()
    card = ModelCard(name=model.label, config=decoder.config)
    return export_checkpoint(model.path, folder, decoder=decoder, card=card, dtype=precision)


def _kv_bytes_per_token(model: OpenedModel, bytes_per_value: int) -> int | None:
    if model.config is not None:
        return inference_cost(model.config, bytes_per_value=bytes_per_value).kv_bytes_per_token
    if model.loops is not None:
        loops, depth = model.looped()
        return bytes_per_value * loops.kv_numbers(depth)
    return None
