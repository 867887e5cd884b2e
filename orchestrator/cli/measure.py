"""Commands that measure models and show results: influence, evaluate, benchmark, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.command import setting, shared_options
from orchestrator.cli.options import (
    MAX_COUNT,
    TO_MEASURE,
    TO_TRAIN,
    CostOption,
    ModelsArgument,
    QualityOption,
    TeacherArgument,
    TrustOption,
    complete_models,
    complete_sweeps,
    one_schedule,
    schedules_option,
    split_list,
)
from orchestrator.cli.session import Call
from orchestrator.workspace.errors import UserError, quoted

if TYPE_CHECKING:
    from orchestrator.reporting.output import Output

app = typer.Typer()


@app.command("inspect", rich_help_panel="Measure")
@shared_options(
    reads=("data", "model", "training", "influence.metric", *TO_TRAIN), workspace="read"
)
def inspect(
    call: Call,
    model: Annotated[
        Path | None,
        typer.Argument(
            help="Checkpoint, run, trial or model folder, by path or name, or hub:OWNER/NAME; by "
            "default the newest of finished runs and what `pick` chose last.",
            autocompletion=complete_models,
        ),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        schedules_option(
            "Another iteration schedule, or the depth of a looped model of another project."
        ),
    ] = None,
    metric: Annotated[str | None, setting("influence.metric")] = None,
) -> "Output":
    """Show what a model is: type, sizes, FLOPs, cache, and the influence of its layers.

    Also shows what `pretrain --from` would take on this machine. The model does not run.

    Example: iiet-orch inspect my-model
    """
    from orchestrator.pipelines.inspecting import inspect_model

    return inspect_model(call.settings, model=model, schedule=one_schedule(schedule), **call.common)


@app.command("influence", rich_help_panel="Measure")
@shared_options(reads=("influence", *TO_MEASURE), plans=True)
def influence(
    call: Call,
    model: TeacherArgument = None,
    metric: Annotated[str | None, setting("influence.metric")] = None,
    device: Annotated[str | None, setting("cluster.device")] = None,
    address: Annotated[str | None, setting("cluster.address")] = None,
) -> "Output":
    """Measure how much each correction of each layer matters, and each whole layer.

    Example: iiet-orch influence my-run --metric loss
    """
    from orchestrator.pipelines.influence import plan_influence, run_influence

    plan = plan_influence(call.settings, model=call.imported(model), **call.common)
    return call.finish(plan, run_influence)


@app.command("evaluate", rich_help_panel="Measure")
@shared_options(reads=("evaluation", *TO_MEASURE), workspace="read", plans=True)
def evaluate(
    call: Call,
    models: ModelsArgument = None,
    schedule: Annotated[
        list[str] | None,
        schedules_option(
            "Another iteration schedule, 1 or 2,1,1,0,0,0, or a looped model's depth; may be "
            "repeated."
        ),
    ] = None,
    log_samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write results and samples in lm-eval's files, for other tools.",
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Write prompts with the model's chat template."),
    ] = False,
    chat_template: Annotated[
        str | None, typer.Option(help="The same, with one of its named templates.")
    ] = None,
    trust_remote_code: TrustOption = False,
    suite: Annotated[str | None, setting("evaluation.suite")] = None,
    include_path: Annotated[str | None, setting("evaluation.include_path")] = None,
    num_fewshot: Annotated[int | None, setting("evaluation.num_fewshot")] = None,
    limit: Annotated[int | None, setting("evaluation.limit")] = None,
    batch_size: Annotated[int | None, setting("evaluation.batch_size")] = None,
    device: Annotated[str | None, setting("cluster.device")] = None,
    address: Annotated[str | None, setting("cluster.address")] = None,
) -> "Output":
    """Measure accuracy and bits per byte with lm-eval; resumes after an interruption.

    Each model after the first is compared with the first over the same items; the difference has a
    95% confidence interval.

    Example: iiet-orch evaluate my-run -r 2 -r 2,1,1,0,0,0 --suite heldout
    """
    from orchestrator.pipelines import evaluating

    call.set("evaluation.apply_chat_template", chat_template or apply_chat_template or None)
    plan = evaluating.plan_evaluate(
        call.settings,
        models=models or (),
        log_samples=log_samples,
        schedules=schedule or (),
        trust_remote_code=trust_remote_code,
        **call.common,
    )
    return call.finish(plan, evaluating.run_evaluate)


@app.command("benchmark", rich_help_panel="Measure")
@shared_options(plans=True)
def benchmark(
    call: Call,
    models: ModelsArgument = None,
    schedule: Annotated[
        list[str] | None,
        schedules_option(
            "Iteration schedule, or a looped model's depth; may be repeated (default for one IIET: "
            "schedules from full to none)."
        ),
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Batch sizes: sequences that are decoded together (default: 1,8).",
        ),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Prompt lengths in tokens (default: 32 and half the context).",
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=MAX_COUNT,
            help="Tokens to decode after the prompt (default: 32, or what fits the context).",
        ),
    ] = None,
    repetitions: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Measurements of each model, in turns (default: 9)."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of PyTorch on a CPU.")] = 1,
    trust_remote_code: TrustOption = False,
    device: Annotated[str | None, setting("cluster.device")] = None,
    address: Annotated[str | None, setting("cluster.address")] = None,
) -> "Output":
    """Measure latency, throughput and memory, and compare them with the cost model.

    Example: iiet-orch benchmark my-run --batch-sizes 1,8
    """
    from orchestrator.evaluation.decode_timing import MeasurementSettings
    from orchestrator.pipelines.benchmarking import plan_benchmark, run_benchmark

    plan = plan_benchmark(
        models=models or (),
        schedules=schedule or (),
        conditions=MeasurementSettings(
            batch_sizes=whole_numbers(batch_sizes or "", "--batch-sizes") or (1, 8),
            contexts=whole_numbers(contexts or "", "--contexts"),
            new_tokens=new_tokens or 0,
            repetitions=repetitions or MeasurementSettings.repetitions,
            num_threads=threads,
        ),
        cluster=call.settings.cluster,
        trust_remote_code=trust_remote_code,
        **call.common,
    )
    return call.finish(plan, run_benchmark)


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers from 1 on with commas between them, without repetitions.

    Raises:
        UserError: If one is not such a number; names the option.
    """
    numbers = split_list(text)
    if not all(isinstance(number, int) and 1 <= number <= MAX_COUNT for number in numbers):
        raise UserError(
            f"{option} takes whole numbers from 1 to {MAX_COUNT} with commas between them; got "
            f"{quoted(text)}"
        )
    return tuple(dict.fromkeys(numbers))


@app.command("report", rich_help_panel="See results")
@shared_options(workspace="read")
def report(
    call: Call,
    sweeps: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SWEEP",
            autocompletion=complete_sweeps,
            help="Names of sweeps, several on one front (default: the newest).",
        ),
    ] = None,
    cost: CostOption = None,
    quality: QualityOption = None,
    time_again: Annotated[
        bool,
        typer.Option(
            "--time-again",
            help="First measure the time per token of the sweep's models again, such as after a "
            "measurement on a busy machine.",
        ),
    ] = False,
) -> "Output":
    """Write and show the front of one or several sweeps: table, pictures, one HTML page.

    Example: iiet-orch report --cost flops
    """
    from orchestrator.pipelines import reports

    return reports.report(
        sweeps=sweeps or [], cost=cost, quality=quality, time_again=time_again, **call.common
    )
