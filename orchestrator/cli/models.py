"""Commands that generate text with a model, or import, export or pick one."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.cli.command import setting, shared_options
from orchestrator.cli.options import (
    MAX_COUNT,
    TO_MEASURE,
    CostOption,
    NameOption,
    QualityOption,
    complete_models,
    complete_sweeps,
    one_schedule,
    schedules_option,
)
from orchestrator.cli.session import Call, Warnings
from orchestrator.workspace.errors import UserError

if TYPE_CHECKING:
    from orchestrator.reporting.output import Output

app = typer.Typer()

MAX_SEED = 2**32 - 1
"""Largest seed that every library's random generator takes."""
FolderToWriteOption = Annotated[
    Path | None, typer.Option("--to", help="Folder to write (default: inside the workspace).")
]
ReplaceModelOption = Annotated[
    bool, typer.Option("--force", help="With --to: replace an export of another model.")
]


@app.command("generate", rich_help_panel="Use models")
@shared_options(workspace="read")
def generate(
    call: Call,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]",
            autocompletion=complete_models,
            help="Checkpoint, run, trial or exported folder, by path or name, a sweep (its picked "
            "model), or hub:OWNER/NAME; by default the newest of finished runs and what `pick` "
            "chose last.",
        ),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        schedules_option("Another iteration schedule: 1, or 2,1,1,0,0,0."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Text to continue; several run as one batch."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Answer the prompt as a user's message, with the model's chat template.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            min=1,
            max=MAX_COUNT,
            help="Maximum number of tokens to add (default: 64, or what fits the context).",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", "-t", min=0.0, help="0 always takes the likeliest token."),
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_COUNT, help="Sample among the N likeliest tokens."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among the likeliest tokens that together hold this probability."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_SEED, help="Random seed for sampling (default: random)."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends the continuation; may be repeated."),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Draft under a cheaper schedule, or the best one (auto); no token changes."
        ),
    ] = None,
    device: Annotated[str | None, setting("cluster.device")] = None,
) -> "Output | None":
    """Continue a text and print it while it is generated.

    --chat puts the prompt into the chat template of an imported model. With --draft, a cheaper
    schedule drafts tokens and the model verifies several at once.

    Example: iiet-orch generate my-run --prompt "The list is" -n 40
    """
    if temperature == 0 and (top_k or top_p is not None):
        raise UserError(
            "--top-k and --top-p limit what is sampled; add a --temperature above 0, such as 0.8"
        )
    prompts = prompt or []
    if prompt is None:
        prompts = ["" if sys.stdin.isatty() else sys.stdin.read().rstrip("\n")]
        if prompts == [""]:
            raise UserError("there is nothing to continue; give --prompt TEXT, or pipe a text in")
    from orchestrator.evaluation.answers import Sampling
    from orchestrator.pipelines.generating import open_generator

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    terminal = call.session.terminal
    writer = open_generator(
        call.session.workspace,
        checkpoint,
        one_schedule(schedule),
        draft,
        device=call.settings.cluster.device,
        # The text goes to standard output, so warnings go elsewhere.
        progress=Warnings(terminal),
    )
    token_prompts = writer.texts_to_continue(prompts, chat=chat)
    own_schedule = writer.schedule
    if not isinstance(call.session.progress, Warnings):
        under = ",".join(map(str, own_schedule)) or "-"
        typer.echo(f"model: {writer.checkpoint}, schedule {under}", file=terminal)
    if not call.as_json and len(prompts) == 1:
        pieces = writer.stream(token_prompts[0], sampling)
        if not chat:  # An answer is printed without its question.
            typer.echo(prompts[0], nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()
        return None
    texts = writer.continue_all(token_prompts, sampling)
    values: dict[str, Any] = {
        "model": str(writer.checkpoint),
        "schedule": list(own_schedule) or None,
        "texts": [{"prompt": p, "text": text} for p, text in zip(prompts, texts, strict=True)],
    }
    between = ": " if chat else ""
    return call.answer(values, [f"{p}{between}{t}\n" for p, t in zip(prompts, texts, strict=True)])


@app.command("import", rich_help_panel="Use models")
@shared_options()
def import_folder(
    call: Call,
    folder: Annotated[
        Path,
        typer.Argument(
            help="Model folder, GGUF file, a checkpoint or run of another workspace, or "
            "hub:OWNER/NAME."
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A tokenizer.json, or hub:NAME, if the model has none."),
    ] = None,
    name: NameOption = None,
) -> "Output":
    """Import a published, Llama, GGUF or exported model, or a checkpoint of another workspace.

    Example: iiet-orch import hub:HuggingFaceTB/SmolLM2-135M --name smollm2
    """
    from orchestrator.pipelines.models import import_model

    checkpoint = import_model(folder, tokenizer=tokenizer, name=name, **call.common)
    return call.answer({"checkpoint": str(checkpoint)}, [f"checkpoint: {checkpoint}"])


@app.command("export", rich_help_panel="Use models")
@shared_options(reads=("influence.metric", "evaluation", *TO_MEASURE))
def export(
    call: Call,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            autocompletion=complete_models,
            help="Checkpoint, run or trial, by path or name, or hub:OWNER/NAME; by default the "
            "newest of finished runs and what `pick` chose last.",
        ),
    ] = None,
    to: FolderToWriteOption = None,
    force: ReplaceModelOption = False,
    schedule: Annotated[
        list[str] | None,
        schedules_option(
            "Another iteration schedule: 1, or 2,1,1,0,0,0. Servers run a folder under its "
            "schedule; export once for each."
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Evaluate the model for its card, unless that was done.")
    ] = True,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="Type of the weights (default: an import's own, else fp32)."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the folder to the Hugging Face hub, too."),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who can see a new repository (default: as in its owner's settings).",
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Token of the hub (default: HF_TOKEN, or that of `hf auth login`)."),
    ] = None,
    device: Annotated[str | None, setting("cluster.device")] = None,
) -> "Output":
    """Export a folder that transformers and lm-eval load without this package.

    Example: iiet-orch export my-run --to my-model --push-to-hub me/my-model --private
    """
    if push_to_hub is None and (private is not None or token):
        raise UserError(
            "--private, --public and --token are for --push-to-hub; name the repository"
        )
    if not measure:
        call.refuse_unread(("influence.metric",), reader="export --no-measure")
    from orchestrator.models.hub import check_upload, upload_model
    from orchestrator.pipelines import models

    if push_to_hub is not None:
        check_upload(push_to_hub, token)  # Before anything is measured.
    folder = models.export(
        checkpoint,
        settings=call.settings,
        to=to,
        force=force,
        schedule=one_schedule(schedule),
        measure=measure,
        dtype=dtype,
        **call.common,
    )
    lines = [f"exported: {folder}"]
    address = None
    if push_to_hub is not None:
        call.session.progress.start("push")
        address = upload_model(folder, push_to_hub, private=private, token=token)
        call.session.progress.finish(address)
        lines.append(f"pushed: {address}")
    return call.answer({"folder": str(folder), "hub": address}, lines)


@app.command("pick", rich_help_panel="Use models")
@shared_options(plans=True)
def pick(
    call: Call,
    sweep: Annotated[
        str | None,
        typer.Argument(
            autocompletion=complete_sweeps, help="Name of a sweep (default: the newest)."
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Cheapest model that keeps this share of the quality, such as 0.99."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="With --keep: the required confidence, such as 0.9.")
    ] = 0.0,
    budget: Annotated[
        float | None,
        typer.Option(help="Best model of at most this cost, in the unit of --cost."),
    ] = None,
    knee: Annotated[
        bool, typer.Option("--knee", help="Model farthest above the line between the ends.")
    ] = False,
    best: Annotated[bool, typer.Option("--best", help="Model of highest quality.")] = False,
    cheapest: Annotated[bool, typer.Option("--cheapest", help="Model of lowest cost.")] = False,
    cost: CostOption = None,
    quality: QualityOption = None,
    allow_loss: Annotated[
        bool,
        typer.Option(
            "--allow-loss",
            help="Also allow a model that has lost more against the teacher's source model than "
            "the sweep's evaluation.retention permits.",
        ),
    ] = False,
    to: FolderToWriteOption = None,
    force: ReplaceModelOption = False,
) -> "Output":
    """Choose a model from a sweep's front; export it and register it in MLflow.

    Example: iiet-orch pick --keep 0.99 --to my-model
    """
    if call.dry_run and to is not None:
        raise UserError("--dry-run exports nothing, and --to says where to; leave one out")
    from orchestrator.pipelines.models import plan_pick, run_pick

    plan = plan_pick(
        sweep,
        keep=keep,
        confidence=confidence,
        budget=budget,
        knee=knee,
        best=best,
        cheapest=cheapest,
        cost=cost,
        quality=quality,
        allow_loss=allow_loss,
        to=to,
        force=force,
        **call.common,
    )
    return call.finish(plan, run_pick)
