"""Commands that measure models and show fronts: influence, evaluate, compare, benchmark, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.cli.command import Call, Command, Setting
from orchestrator.cli.options import (
    MAX_COUNT,
    ConfigOption,
    CostOption,
    ModelsArgument,
    QualityOption,
    SchedulesOption,
    TeacherArgument,
    TrustRemoteCodeOption,
    complete_models,
    complete_sweeps,
    split_list,
)
from orchestrator.workspace.errors import UserError, quoted

if TYPE_CHECKING:
    from orchestrator.pipelines.result import Result

CLUSTER = {"--device": "cluster.device", "--address": "cluster.address"}
TASKS: dict[str, str | Setting] = {
    "--suite": "evaluation.suite",
    "--include-path": "evaluation.include_path",
    "--num-fewshot": "evaluation.num_fewshot",
    "--apply-chat-template": Setting(
        "evaluation.apply_chat_template", bool, help="Write prompts with the model's chat template."
    ),
    "--chat-template": Setting(
        "evaluation.apply_chat_template", str, help="The same, with one of its named templates."
    ),
    "--limit": "evaluation.limit",
    "--batch-size": "evaluation.batch_size",
}


@Command("influence", group="Measure", options={"--metric": "influence.metric", **CLUSTER},
         config=ConfigOption, plans=True)  # fmt: skip
def influence(call: Call, model: TeacherArgument = None) -> Result:
    """Measure how much each correction of each layer matters.

    Example: iiet-orch influence my-run --metric loss
    """
    from orchestrator.pipelines.influence import plan_influence, run_influence

    plan = plan_influence(call.settings, model=call.imported(model), **call.common)
    return call.finish(plan, run_influence)


@Command("evaluate", group="Measure", options={**TASKS, **CLUSTER}, config=ConfigOption,
         workspace="read", plans=True)  # fmt: skip
def evaluate(
    call: Call,
    models: ModelsArgument = None,
    schedule: SchedulesOption = None,
    log_samples: Annotated[Path | None, typer.Option(metavar="FOLDER")] = None,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> Result:
    """Measure accuracy and bits per byte with lm-eval; resumes after an interruption.

    Example: iiet-orch evaluate my-run -r 2 -r 2,1,1,0,0,0 --suite heldout

    Args:
        schedule: Another iteration schedule: 1, or 2,1,1,0,0,0; may be repeated.
        log_samples: Write results and samples in lm-eval's files, for other tools.
    """
    from orchestrator.pipelines.evaluating import plan_evaluate, run_evaluate

    plan = plan_evaluate(
        call.settings,
        models=models or (),
        schedules=schedule or (),
        log_samples=log_samples,
        trust_remote_code=trust_remote_code,
        **call.common,
    )
    return call.finish(plan, run_evaluate)


@Command("compare", group="Measure", options={**TASKS, **CLUSTER}, config=ConfigOption, plans=True)
def compare(
    call: Call,
    first: Annotated[str, typer.Argument(metavar="A", autocompletion=complete_models)],
    second: Annotated[str, typer.Argument(metavar="B", autocompletion=complete_models)],
    schedule: SchedulesOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> Result:
    """Compare two models on the same items: paired differences, intervals, McNemar's test.

    Example: iiet-orch compare my-run other-run --suite heldout

    Args:
        first: A checkpoint, a run (by path or name), a Hugging Face folder, hub:OWNER/NAME, or a
            folder that lm-eval wrote with --log_samples.
        second: The other one.
        schedule: Iteration schedule of both; given twice, of A and of B.
    """
    from orchestrator.pipelines.evaluating import plan_compare, run_compare

    plan = plan_compare(
        call.settings,
        models=(first, second),
        schedules=schedule or (),
        trust_remote_code=trust_remote_code,
        **call.common,
    )
    return call.finish(plan, run_compare)


class BenchmarkOptions(BaseModel):
    """The conditions of `benchmark`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    batch_sizes: str = "1,8"
    """Comma-separated numbers of rows that are decoded together."""
    contexts: str | None = None
    """Tokens of the prompt (default: 32 and half the context)."""
    new_tokens: int = Field(default=32, ge=2, le=MAX_COUNT)
    """Tokens decoded after it."""
    repetitions: int = Field(default=9, ge=1, le=10_000)
    """Measurements of each model, in turns."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Threads of PyTorch on a CPU."""
    drafts: str | None = None
    """Instead measure the schedules of this sweep as drafts of its full models, for its report."""


@Command("benchmark", group="Measure", options=CLUSTER, plans=True)
def benchmark(
    call: Call,
    conditions: BenchmarkOptions,
    models: ModelsArgument = None,
    schedule: SchedulesOption = None,
) -> Result:
    """Measure latency, throughput and memory, and compare them with the cost model.

    Example: iiet-orch benchmark my-run --batch-sizes 1,8

    Args:
        schedule: Iteration schedule; may be repeated. One IIET without it: from full to none.
    """
    if conditions.drafts:
        from orchestrator.pipelines.sweeps import plan_drafts, run_drafts

        cluster = call.settings.cluster
        return call.finish(
            plan_drafts(conditions.drafts, cluster=cluster, **call.common), run_drafts
        )
    batches = whole_numbers(conditions.batch_sizes, "--batch-sizes")
    prompts = whole_numbers(conditions.contexts or "", "--contexts")
    from orchestrator.evaluation.cost_measurement import MeasurementSettings
    from orchestrator.pipelines.benchmarking import plan_benchmark, run_benchmark

    plan = plan_benchmark(
        models=models or (),
        schedules=schedule or (),
        conditions=MeasurementSettings(
            batch_sizes=batches,
            contexts=prompts,
            new_tokens=conditions.new_tokens,
            repetitions=conditions.repetitions,
            num_threads=conditions.threads,
        ),
        cluster=call.settings.cluster,
        **call.common,
    )
    return call.finish(plan, run_benchmark)


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers from 1 on with commas between them, without repetitions.

    Raises:
        UserError: If one is not such a number; names the option.
    """
    found = split_list(text)
    if not all(isinstance(number, int) and 1 <= number <= MAX_COUNT for number in found):
        raise UserError(
            f"{option} takes whole numbers from 1 to {MAX_COUNT} with commas between them; got "
            f"{quoted(text)}"
        )
    return tuple(dict.fromkeys(found))


@Command("report", group="Results", workspace="read")
def report(
    call: Call,
    sweeps: Annotated[
        list[str] | None, typer.Argument(metavar="SWEEP", autocompletion=complete_sweeps)
    ] = None,
    cost: CostOption = None,
    quality: QualityOption = None,
) -> Result:
    """Write and show the front of one or several sweeps: table, pictures, one HTML page.

    Example: iiet-orch report --cost flops

    Args:
        sweeps: Names of sweeps, several on one front (default: the newest).
    """
    from orchestrator.pipelines.sweeps import report as write_report

    return write_report(sweeps=sweeps or [], cost=cost, quality=quality, **call.common)
